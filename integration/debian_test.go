package integration

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// debian is a tree that packages are installed into.
type debian struct {
	t    testing.TB
	root string
}

// mirror finds out which mirror and which release of Debian apt uses here.
func mirror() (site, suite string, err error) {
	out, err := exec.Command("apt-get", "indextargets", "--format", "$(SITE) $(CODENAME) $(LABEL)", "Created-By: Packages").Output()
	if err != nil {
		return "", "", fmt.Errorf("apt-get indextargets: %w", err)
	}
	var all [][]string
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 3 && (f[2] == "Debian" || f[2] == "Ubuntu") {
			all = append(all, f)
		}
	}
	if len(all) == 0 {
		return "", "", errors.New("apt has no Debian mirror here (apt-get update?)")
	}
	i := max(0, slices.IndexFunc(all, func(f []string) bool { return f[1] == "bookworm" }))
	return all[i][0], all[i][1], nil
}

// makeDebian makes the layers base, common, python and nginx: a minimal Debian,
// then what apt-get adds to it.
func (c *corpus) makeDebian(t testing.TB) error {
	site, suite, err := mirror()
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp(c.dir, "debian-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	d := debian{t, filepath.Join(work, "root")}
	if err := d.run("debootstrap", "--variant=minbase", suite, d.root, site); err != nil {
		return err
	}
	if err := d.prepare(); err != nil {
		return err
	}
	base, err := c.addLayer(d, "base", snapshot{})
	if err != nil {
		return err
	}
	if err := errors.Join(d.run("chroot", d.root, "apt-get", "update", "-qq"), d.install("ca-certificates", "netbase", "tzdata")); err != nil {
		return err
	}
	common, err := c.addLayer(d, "common", base)
	if err != nil {
		return err
	}
	branch := debian{t, filepath.Join(work, "branch")}
	if err := d.run("cp", "-a", d.root, branch.root); err != nil {
		return err
	}
	if err := d.install("python3", "python3-yaml"); err != nil {
		return err
	}
	if _, err := c.addLayer(d, "python", common); err != nil {
		return err
	}
	// The copy has other inodes and the same files.
	if common, err = takeSnapshot(branch.root, transient); err != nil {
		return err
	}
	if err := branch.install("nginx"); err != nil {
		return err
	}
	_, err = c.addLayer(branch, "nginx", common)
	return err
}

// transient are names that serve the building and belong to no layer.
func transient(rel string) bool {
	switch rel {
	case "etc/resolv.conf", "usr/sbin/policy-rc.d", "var/cache/apt", "var/lib/apt/lists", "var/cache/debconf", "var/log/apt":
		return true
	}
	return strings.HasPrefix(rel, "tmp/")
}

// prepare lets apt-get work in the tree, and lets no package start a service.
func (d debian) prepare() error {
	conf, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(d.root, "etc/hostname"), []byte("imgfs\n"), 0o644); err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(d.root, "etc/resolv.conf"), conf, 0o644),
		os.WriteFile(filepath.Join(d.root, "usr/sbin/policy-rc.d"), []byte("#!/bin/sh\nexit 101\n"), 0o755),
	)
}

func (d debian) install(packages ...string) error {
	return d.run("chroot", append([]string{d.root, "apt-get", "install", "-y", "-qq", "--no-install-recommends"}, packages...)...)
}

func (d debian) run(name string, args ...string) error {
	d.t.Logf("%s %s", name, strings.Join(args, " "))
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, out[max(0, len(out)-2000):])
	}
	return nil
}

// addLayer writes what has changed in the tree since the snapshot old.
func (c *corpus) addLayer(d debian, layer string, old snapshot) (snapshot, error) {
	now, err := takeSnapshot(d.root, transient)
	if err != nil {
		return nil, err
	}
	return now, c.writeTar(layer, func(w io.Writer) error { return writeLayer(w, d.root, old, now) })
}
