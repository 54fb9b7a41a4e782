package fs

import (
	"archive/tar"
	"fmt"
	iofs "io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestOverlay mounts the kernel's overlayfs over .imgfs/layers/* and compares it
// with our own merge of the same layers: names, types, modes, owners, times,
// contents, link targets, devices, extended attributes.
func TestOverlay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root mounts an overlayfs")
	}
	w := newWorld(t, Options{Dev: true, ExactModes: true})
	mode := func(e entry, mode int64, uid int) entry {
		e.Mode, e.Uid, e.Gid = mode, uid, uid+1
		return e
	}
	special := func(name string, typ byte, major, minor int64) entry {
		return entry{tar.Header{Name: name, Typeflag: typ, Mode: 0o600, Devmajor: major, Devminor: minor}, ""}
	}
	hard := func(name, target string) entry {
		return entry{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target}, ""}
	}
	var many, fewer []entry
	for i := range 300 {
		many = append(many, file(fmt.Sprintf("many/%03d", i), fmt.Sprint(i)))
		if i%3 == 0 {
			fewer = append(fewer, file(fmt.Sprintf("many/.wh.%03d", i), ""))
		}
	}
	w.push("app:1",
		layer(t, append(many,
			dir("a/"), file("a/kept", "kept"), file("a/gone", "gone"), file("a/changed", "old"), dir("a/sub/"), file("a/sub/x", "x"),
			dir("opaque/"), file("opaque/hidden", "hidden"), dir("opaque/deep/"), file("opaque/deep/y", "y"),
			dir("removed/"), file("removed/z", "z"), file("becomes-dir", "f"), dir("becomes-file/"), file("becomes-file/q", "q"),
			hard("a/hard", "a/kept"), link("a/link", "../a/kept"), mode(file("setuid", "s"), 0o4755, 7), special("null", tar.TypeChar, 1, 3),
			special("pipe", tar.TypeFifo, 0, 0), xattr(file("attr", "attr"), "user.colour", "blue"), file("empty", ""),
			xattr(dir("redirected/"), "trusted.overlay.redirect", "/a"), dir("again/"), file("again/1", "1"))...),
		layer(t, append(fewer,
			file("a/.wh.gone", ""), file("a/changed", "new"), file("a/added", "added"), mode(dir("a/sub/"), 0o700, 3),
			file("opaque/.wh..wh..opq", ""), file("opaque/shown", "shown"), file(".wh.removed", ""), dir("becomes-dir/"), file("becomes-dir/in", "in"),
			file("becomes-file", "now a file"), file(".wh.again", ""), xattr(file("attr2", ""), "user.shape", "round"))...),
		layer(t, dir("again/"), file("again/2", "2"), file("removed/back", "back"), file("opaque/third", "3"), xattr(dir("a/"), "user.colour", "red")))
	merged := w.path("app", "1")
	w.list(merged)
	var layers []layerJSON
	w.decode(&layers, "meta", w.host, "app/1/layers.json")
	var lower []string
	for _, l := range layers { // lowest first; overlayfs wants the topmost first
		lower = append([]string{"layers/" + strings.TrimPrefix(l.Key, "sha256:")}, lower...)
	}
	// What hides is said in overlayfs' own way.
	var st unix.Stat_t
	second := w.ctl(lower[1])
	if err := unix.Lstat(filepath.Join(second, "removed"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("a whiteout is mode %o, device %#x, %v", st.Mode, st.Rdev, err)
	}
	buf := make([]byte, 10)
	if n, err := unix.Lgetxattr(filepath.Join(second, "opaque"), "trusted.overlay.opaque", buf); err != nil || string(buf[:n]) != "y" {
		t.Errorf("trusted.overlay.opaque = %q, %v", buf[:max(n, 0)], err)
	}
	_, err := unix.Lgetxattr(w.ctl(lower[2], "redirected"), "trusted.overlay.redirect", buf)
	w.wantErr("a layer's own redirect", err, syscall.ENODATA)

	over := t.TempDir()
	// The options are relative to a directory: paths of layers are long. The shell
	// goes there, not a child of ours before its exec: this process would wait for
	// that without answering it.
	cmd := exec.Command("sh", "-c", `cd "$1" && exec mount -t overlay -o "$2" overlay "$3"`, "sh", w.ctl(), "ro,lowerdir="+strings.Join(lower, ":"), over)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("mounting: %v: %s", err, out)
	}
	defer func() {
		if err := syscall.Unmount(over, 0); err != nil {
			t.Error(err)
			syscall.Unmount(over, syscall.MNT_DETACH)
		}
	}()
	want, got := describe(t, merged), describe(t, over)
	if len(want) < 200 {
		t.Errorf("the merged tree has %d names", len(want))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("overlayfs (+) differs from our merge (-):\n%s", diff)
	}
}

// describe is all of a tree but inode numbers and link counts, which are one
// tree's own.
func describe(t *testing.T, root string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		s := fmt.Sprintf("%o %d:%d %d.%d rdev %d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, st.Rdev)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %q", data)
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			s += " -> " + target
		}
		names := make([]byte, 1000)
		n, err := unix.Llistxattr(path, names)
		if err != nil {
			return err
		}
		for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
			if name == "" {
				continue
			}
			value := make([]byte, 100)
			n, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %s=%q", name, value[:n])
		}
		rel, err := filepath.Rel(root, path)
		tree[rel] = s
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}
