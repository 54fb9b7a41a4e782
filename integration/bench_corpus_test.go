package integration

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// benchImage is an image that the benchmarks start something from.
type benchImage struct {
	name     string
	packages [][]string // of each of its package layers
	command  []string   // the first useful thing that is done with it
}

// benchImages are made of Debian packages: the layers base and common, one or two
// of packages, one of an application, one that removes and changes what is below.
var benchImages = []benchImage{
	{"python", [][]string{{"python3"}, {"python3-yaml", "python3-requests", "python3-numpy"}}, []string{"python3", "-c", "import json,ssl; print(1)"}},
	{"nginx", [][]string{{"nginx"}}, []string{"nginx", "-t"}},
	{"redis", [][]string{{"redis-server"}}, []string{"redis-server", "--version"}},
	{"node", [][]string{{"nodejs"}, {"node-express", "node-semver", "node-lodash"}}, []string{"node", "-e", "console.log(1)"}},
	{"perl", [][]string{{"perl"}, {"libwww-perl", "libjson-perl"}}, []string{"perl", "-e", "print 1"}},
	{"java", [][]string{{"openjdk-17-jre-headless"}}, []string{"java", "-version"}},
	{"gcc", [][]string{{"gcc", "libc6-dev", "make"}, {"g++"}}, []string{"gcc", "-c", "/srv/app/hello.c", "-o", "/tmp/hello.o"}},
}

// benchPrefix begins the names of layers and images of the benchmarks.
const benchPrefix = "bench-"

// layerNames are the image's layers in the corpus, lowest first.
func (b benchImage) layerNames() []string {
	names := []string{"base", "common"}
	for i := range b.packages {
		names = append(names, fmt.Sprintf("%s%s-%d", benchPrefix, b.name, i+1))
	}
	return append(names, benchPrefix+"app", benchPrefix+b.name+"-end")
}

const (
	helloC  = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\nint main(void){ printf(\"hello %zu\\n\", strlen(\"world\")); return 0; }\n"
	blobLen = 4 << 20 // bytes of the application's data
)

// writeApp writes the layer with the application.
func writeApp(w io.Writer) error {
	data := make([]byte, blobLen)
	rand.NewChaCha8([32]byte([]byte("the file srv/app/blob.bin holds."))).Read(data)
	return writeTar(w, []entry{dir("srv"), dir("srv/app"), file("srv/app/blob.bin", string(data)), file("srv/app/hello.c", helloC),
		file("srv/app/main.js", "console.log(JSON.stringify({ok:1}))\n"), file("srv/app/main.py", "import json, ssl\nprint(json.dumps({\"ssl\": ssl.OPENSSL_VERSION}))\n")})
}

// makeBench makes the layers of a benchmark's image. The corpus is locked.
func (c *corpus) makeBench(t testing.TB, layer string) error {
	app := filepath.Join(c.dir, benchPrefix+"app.tar")
	if _, err := os.Stat(app); err != nil {
		if err := c.writeTar(benchPrefix+"app", writeApp); err != nil {
			return err
		}
	}
	if layer == benchPrefix+"app" {
		return nil
	}
	for _, b := range benchImages {
		if !strings.HasPrefix(layer, benchPrefix+b.name+"-") {
			continue
		}
		work, err := os.MkdirTemp(c.dir, "bench-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(work)
		return c.makeBenchImage(debian{t, filepath.Join(work, "root")}, b, app)
	}
	return errors.New("unknown layer")
}

func (c *corpus) makeBenchImage(d debian, b benchImage, app string) error {
	if err := os.Mkdir(d.root, 0o755); err != nil {
		return err
	}
	for _, l := range []string{"base", "common"} { // made before: they are lower layers of the image
		if err := d.unpack(filepath.Join(c.dir, l+".tar")); err != nil {
			return err
		}
	}
	old, err := takeSnapshot(d.root, transient)
	if err != nil {
		return err
	}
	if err := errors.Join(d.prepare(), d.run("chroot", d.root, "apt-get", "update", "-qq")); err != nil {
		return err
	}
	// What prepare writes is of the base already; the JRE wants a directory for manuals.
	if err := os.MkdirAll(filepath.Join(d.root, "usr/share/man/man1"), 0o755); err != nil {
		return err
	}
	for i, packages := range b.packages {
		layer := fmt.Sprintf("%s%s-%d", benchPrefix, b.name, i+1)
		made := filepath.Join(c.dir, layer+".tar")
		if _, err := os.Stat(made); err == nil { // by a run that was cut off; it adds and changes, and removes nothing
			if err := d.unpack(made); err != nil {
				return err
			}
			if old, err = takeSnapshot(d.root, transient); err != nil {
				return err
			}
			continue
		}
		if err := d.installWithProc(packages...); err != nil {
			return err
		}
		if old, err = c.addLayer(d, layer, old); err != nil {
			return err
		}
	}
	if err := d.unpack(app); err != nil {
		return err
	}
	if old, err = takeSnapshot(d.root, transient); err != nil {
		return err
	}
	// The copy is what overlayfs makes of a file of a lower layer that gets a link:
	// containerd takes no layer with a link to a file of another.
	end := `set -e; rm -rf usr/share/doc usr/share/man; mkdir -p usr/share/doc; echo replaced > usr/share/doc/README
cp -p srv/app/blob.bin srv/app/new; mv srv/app/new srv/app/blob.bin; ln -f srv/app/blob.bin srv/app/blob-hardlink.bin
ln -sf blob.bin srv/app/blob-link.bin
chmod 0700 srv/app/hello.c; rm -f etc/motd; mkdir -p opt/empty
if [ -d var/www/html ]; then echo "<h1>hi</h1>" > var/www/html/index.html; fi`
	if err := d.run("sh", "-c", `cd "$1" && eval "$2"`, "sh", d.root, end); err != nil {
		return err
	}
	_, err = c.addLayer(d, benchPrefix+b.name+"-end", old)
	return err
}

func (d debian) unpack(archive string) error {
	return d.run("tar", "-C", d.root, "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", archive)
}

// installWithProc installs packages whose scripts look at /proc.
func (d debian) installWithProc(packages ...string) error {
	proc := filepath.Join(d.root, "proc")
	if err := unix.Mount("proc", proc, "proc", 0, ""); err != nil {
		return fmt.Errorf("mounting %s: %w", proc, err)
	}
	err := d.install(packages...)
	return errors.Join(err, unix.Unmount(proc, unix.MNT_DETACH))
}
