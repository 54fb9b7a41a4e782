package fs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/images"
)

// Every form of the target of a link, and what the link is then.
func TestTagTargets(t *testing.T) {
	w := newWorld(t, Options{})
	img := w.images("debian:12", "team/app:v1", "gone:1")
	id, digest := configHex(t, img[0]), manifestOf(t, img[0])
	gone := configHex(t, img[2])
	w.push("debian:13", layer(t, file("a", "13")))
	w.push("gone:1", layer(t, file("a", "gone again"), file("b", "")))
	w.wantSh("touch $H/gone/1", "")
	w.read(w.path("gone", "1", "a")) // its layer has been asked for
	w.requests.Store(0)

	reads := map[string]string{}
	for i, c := range []struct {
		target, want string
		errno        syscall.Errno
	}{
		// As of a link.
		{"12", "debian:12", 0},
		{"./12", "debian:12", 0},
		{"../team/app/v1", "team/app:v1", 0},
		{"../../" + w.host + "/team/app/v1", "team/app:v1", 0},
		{w.path("debian", "12"), "debian:12", 0},
		{w.path("debian", "12") + "/", "debian:12", 0},
		{w.path("team", "..", "debian", "12"), "debian:12", 0},
		// From the mount's root.
		{w.host + "/debian/12", "debian:12", 0},
		// From the link, as a directory.
		{"../../team/app/v1", "team/app:v1", 0},
		{"../12", "debian:12", 0},
		// As docker writes it, by digest and by ID.
		{w.host + "/debian:12", "debian:12", 0},
		{w.host + "/team/app:v1", "team/app:v1", 0},
		{w.path("team") + "/app:v1", "team/app:v1", 0},
		{"../debian:12", "debian:12", 0},
		{".imgfs/ids/" + id, "debian:12", 0},
		{".imgfs/ids/sha256:" + id, "debian:12", 0},
		{".imgfs/ids/" + id[:20], "debian:12", 0},
		{filepath.Join(w.dir, ".imgfs/ids", id), "debian:12", 0},
		{"../../.imgfs/ids/" + id[:20], "debian:12", 0},
		{".imgfs/dangling/" + gone, "gone:1", 0},
		// Nothing is there, although a registry has it.
		{"13", "", syscall.ENOENT},
		{"nosuch", "", syscall.ENOENT},
		{"../nosuch/v1", "", syscall.ENOENT},
		{w.host + "/debian:13", "", syscall.ENOENT},
		{w.host + "/debian@" + digest.String(), "debian:12", 0}, // what another name of the repository stands for
		{w.path("debian", "13"), "", syscall.ENOENT},
		{"12/nosuch", "", syscall.ENOENT},
		{"12/a/nosuch", "", syscall.ENOENT},
		{".imgfs/ids/" + strings.Repeat("0", 64), "", syscall.ENOENT},
		{".imgfs/ids/xyz", "", syscall.ENOENT},
		{".imgfs/dangling/" + id, "", syscall.ENOENT},
		{"bad name", "", syscall.ENOENT},
		{"../../../outside", "", syscall.ENOENT},
		// It is no image.
		{"12/a", "", syscall.EINVAL},
		{"12/d", "", syscall.ENOENT},
		{"../debian", "", syscall.EINVAL},
		{"../team", "", syscall.EINVAL},
		{w.host, "", syscall.EINVAL},
		{w.dir, "", syscall.EINVAL},
		{".imgfs", "", syscall.EINVAL},
		{".imgfs/stats", "", syscall.EINVAL},
		{"/etc/passwd", "", syscall.EINVAL},
		{w.dir + "x", "", syscall.EINVAL},
	} {
		tag := fmt.Sprintf("t%d", i)
		err := os.Symlink(c.target, w.path("debian", tag))
		if c.errno != 0 {
			w.wantErr("symlink to "+c.target, err, c.errno)
			if !errors.Is(err, c.errno) {
				continue
			}
			w.wantReason(unix.ErrnoName(c.errno), "symlink", w.host+"/debian/"+tag)
			continue
		}
		if err != nil {
			t.Errorf("symlink to %s: %v", c.target, err)
			continue
		}
		if fi, err := os.Lstat(w.path("debian", tag)); err != nil || !fi.IsDir() {
			t.Errorf("the tag for %s is %v, %v, want a directory", c.target, fi, err)
		}
		reads[tag] = c.want
	}
	if got := w.requests.Load(); got != 0 {
		t.Errorf("%d requests", got)
	}
	reads["12"] = "debian:12"
	w.wantImages("debian", reads)

	// A tag outlives the one that it was made from, and the server.
	if err := syscall.Rmdir(w.path("debian", "12")); err != nil {
		t.Error(err)
	}
	delete(reads, "12")
	w.restart()
	w.wantImages("debian", reads)
}

// Every place for a tag.
func TestTagPlaces(t *testing.T) {
	w := newWorld(t, Options{})
	img := w.images("debian:12", "debian:11")[0]
	target := w.path("debian", "12")
	digest := "@" + manifestOf(t, img).String()
	for _, c := range []struct {
		link  string // below the mount
		errno syscall.Errno
	}{
		{w.host + "/debian/v", 0},
		{w.host + "/debian/_v.-", 0},
		{w.host + "/new/v", 0},
		{w.host + "/a/b/c/d", 0},
		{"mine/v", 0}, // on Docker Hub
		{"me/mine/v", 0},
		{"registry.example:5000/team/app/v", 0},
		{w.host + "/debian:spelled", 0},
		{"mine:spelled", 0},
		{w.host + "/debian/12", syscall.EEXIST},
		{w.host + "/debian:12", syscall.EEXIST},
		{w.host + "/debian", syscall.EEXIST},
		{w.host, syscall.EEXIST},
		{"docker.io", syscall.EEXIST},
		{".imgfs", syscall.EEXIST},
		{w.host + "/debian/a b", syscall.EINVAL},
		{w.host + "/debian/-v", syscall.EINVAL},
		{w.host + "/debian/ü", syscall.EINVAL},
		{w.host + "/debian/" + strings.Repeat("v", 129), syscall.EINVAL},
		{w.host + "/debian/" + digest, syscall.EINVAL},
		{w.host + "/debian@" + digest[1:], syscall.EINVAL},
		{w.host + "/debian:-v", syscall.EINVAL},
		{"unused", syscall.EINVAL},
		{"registry.example", syscall.EINVAL},
		{".git", syscall.EINVAL},
		{".imgfs/x", syscall.EPERM},
		{w.host + "/debian/11/x", syscall.EROFS},
		{w.host + "/debian/11/a", syscall.EEXIST},
	} {
		err := os.Symlink(target, filepath.Join(w.dir, c.link))
		if c.errno != 0 {
			w.wantErr("symlink "+c.link, err, c.errno)
			continue
		}
		if err != nil {
			t.Errorf("symlink %s: %v", c.link, err)
			continue
		}
		if got := w.read(filepath.Join(w.dir, c.link, "a")); got != "debian:12" {
			t.Errorf("read %s = %q", c.link, got)
		}
	}
	if got := w.requests.Load(); got != 0 {
		t.Errorf("%d requests", got)
	}
	w.wantReason("EINVAL", "symlink", "debian/a b")
	w.wantReason("EPERM", "symlink", ".imgfs/…/x")
	w.wantSh("rmdir $H/new/v", "")
	w.wantSh("ls $H mine me", w.host+":\na\ndebian\n\nme:\nmine\n\nmine:\nspelled\nv\n")
}

// What coreutils make of links.
func TestTagLn(t *testing.T) {
	w := newWorld(t, Options{})
	img := w.images("debian:1", "debian:2", "team/etc:a")
	w.wantSh("cd $H; ln -s debian/1 debian/x 2>&1 | grep -o 'No such.*'; ln -s ../1 debian/x; cat debian/x/a", "No such file or directory\ndebian:1")
	w.wantSh("cd $H/debian && ln -s 1 y && cat y/a", "debian:1")
	w.wantSh("cd $H/debian && ln -s $M/$H/debian/1 z && cat z/a", "debian:1")
	// Onto a tag that is here.
	w.wantSh("ln -sfn $H/debian/2 $H/debian/x && cat $H/debian/x/a", "debian:2")
	w.wantImages("debian", map[string]string{"1": "debian:1", "2": "debian:2", "x": "debian:2", "y": "debian:1", "z": "debian:1"})
	w.wantSh("cd $H/debian && ln -sfn ../2 y && cat y/a", "debian:2")
	w.wantSh("cd $H/debian && ln -sfn 2 z && ln -sfn 1 z && ln -sfn 2 z && cat z/a", "debian:2")
	w.wantNoSh("cd $H/debian && ln -sfT ../1 z", "cannot overwrite directory")
	w.wantSh("cd $H/debian && ln -sfn ../1 z", "")
	w.wantSh("cd $H/debian && ln -sfT ../1 new && cat new/a", "debian:1")
	w.wantNoSh("ln -sfn $H/debian/nosuch $H/debian/x", "No such file")
	w.wantNoSh("ln -sfn /etc/passwd $H/debian/x", "Read-only")
	w.wantReason("EROFS", "symlink", "debian:x")
	w.wantNoSh("ln -s $H/debian/2 $H/debian/x/y", "Read-only")
	w.wantNoSh("ln $H/debian/2/a $H/debian/a", "")
	w.wantImages("debian", map[string]string{"1": "debian:1", "2": "debian:2", "x": "debian:2", "y": "debian:2", "z": "debian:1", "new": "debian:1"})
	// The image that loses its last name dangles.
	w.wantSh("ln -sfn $H/debian/1 $H/team/etc/a && cat $H/team/etc/a/a", "debian:1")
	if !w.dangling(img[2]) {
		t.Error("the image whose last name stands for another is not dangling")
	}
	w.wantSh("ln -s .imgfs/dangling/"+configHex(t, img[2])+" $H/team/etc/back && cat $H/team/etc/back/a", "team/etc:a")
	if w.dangling(img[2]) {
		t.Error("an image with a name dangles")
	}
	w.wantErr("rmdir of a spelling", syscall.Rmdir(w.path("debian:1")), syscall.ENOTDIR)
	w.wantErr("unlink of a tag", syscall.Unlink(w.path("debian", "1")), syscall.EISDIR)
	w.wantErr("unlink of a spelling", syscall.Unlink(w.path("debian:1")), syscall.EPERM)
}

// A prefix that several IDs have is nothing, and the reason is said.
func TestTagAmbiguous(t *testing.T) {
	w := newWorld(t, Options{})
	ids := map[byte]string{}
	var prefix, other string
	for i := 0; prefix == ""; i++ {
		img := w.images(fmt.Sprintf("r%d:v", i))[0]
		id := configHex(t, img)
		if ids[id[0]] != "" {
			prefix, other = id[:1], id
		}
		ids[id[0]] = id
	}
	w.wantErr("link to an ambiguous ID", os.Symlink(".imgfs/ids/"+prefix, w.path("x", "y")), syscall.ENOENT)
	w.wantReason("ENOENT", "symlink", "/x/y", "ambiguous")
	if err := os.Symlink(".imgfs/ids/"+other, w.path("x", "y")); err != nil {
		t.Error(err)
	}
}

// Below another platform's root, names are names.
func TestTagTargetOfPlatform(t *testing.T) {
	w := newWorld(t, Options{})
	img := w.images("debian:12")[0]
	arm := images.Name{Repo: images.PlatformsDir + "/linux-arm64/" + w.host + "/debian", Tag: "12"}
	if _, err := w.store.Tag(manifestOf(t, img), arm); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Rmdir(w.path("debian", "12")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(arm.Repo+"/12", w.path("debian", "arm")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(arm.Repo+":12", w.path("debian", "arm2")); err != nil {
		t.Fatal(err)
	}
	w.wantImages("debian", map[string]string{"arm": "debian:12", "arm2": "debian:12"})
	if got := w.list(w.dir); len(got) != 2 {
		t.Errorf("list of the root = %q, want .imgfs once", got)
	}
}
