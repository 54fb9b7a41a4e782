package fs

import (
	"archive/tar"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A link in the root of an image, called as its target, tags the image when it
// leads to one; what could be an image and is none is ENOENT, all else EROFS.
func TestRetag(t *testing.T) {
	w := newWorld(t, Options{})
	w.push("app:1", layer(t, dir("etc/"), file("etc/me", "one")))
	w.push("app:2", layer(t, dir("etc/"), file("etc/me", "two")))
	w.list(w.path("app", "1"))
	w.list(w.path("app", "2"))
	for _, row := range []struct {
		target, below string
		errno         syscall.Errno
	}{
		{"3", "", syscall.ENOENT},
		{"../app/3", "", syscall.ENOENT},
		{"app/3", "", syscall.ENOENT},
		{"app:3", "", syscall.ENOENT},
		{w.path("app", "3"), "", syscall.ENOENT},
		{"app/@sha256:" + strings.Repeat("0", 64), "", syscall.ENOENT},
		{".imgfs/ids/0123456789ab", "", syscall.ENOENT},
		{".imgfs/dangling/" + strings.Repeat("0", 64), "", syscall.ENOENT},
		{"3", "etc", syscall.EROFS},          // not in the root
		{w.host + "/app", "", syscall.EROFS}, // here, no image
		{"/etc/passwd", "", syscall.EROFS},
		{".hidden", "", syscall.EROFS}, // can be no image
		{"../../../x", "", syscall.EROFS},
		{".imgfs/df", "", syscall.EROFS},
	} {
		err := os.Symlink(row.target, filepath.Join(w.path("app", "1"), row.below, filepath.Base(row.target)))
		w.wantErr("symlink to "+row.target, err, row.errno)
	}
	w.wantErr("another name", os.Symlink("app/3", w.path("app", "1", "x")), syscall.EROFS)
	if got := w.read(w.path("app", "1", "etc", "me")); got != "one" {
		t.Errorf("after all of them the image has %q", got)
	}
	if err := os.Symlink("../2", w.path("app", "1", "2")); err != nil {
		t.Fatal(err)
	}
	if got := w.read(w.path("app", "1", "etc", "me")); got != "two" {
		t.Errorf("after the tag the image has %q", got)
	}
}

// The mode of an image's root directory, which whoever made the image chose, lets
// nobody change what a name stands for.
func TestRetagByOthers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("another user can be no one but by root")
	}
	w := newWorld(t, Options{AllowOther: true})
	open := entry{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o777}, ""}
	w.push("app:1", layer(t, open, file("me", "one")))
	w.push("app:2", layer(t, open, file("me", "two")))
	w.list(w.path("app", "2"))
	root, err := unix.Open(w.path("app", "1"), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(root)
	now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}
	other := func(f func() error) (err error) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // the thread ends with the goroutine
			if _, _, e := syscall.RawSyscall(syscall.SYS_SETFSUID, 12345, 0, 0); e != 0 {
				err = e
				return
			}
			err = f()
		}()
		<-done
		return err
	}
	w.wantErr("tag by another user", other(func() error { return unix.Symlinkat("../2", root, "2") }), syscall.EACCES)
	w.wantErr("touch by another user", other(func() error { return unix.UtimesNanoAt(root, ".", now, 0) }), syscall.EACCES)
	w.wantErr("link by another user", other(func() error { return unix.Symlinkat("x", root, "y") }), syscall.EROFS)
	if got := w.read(w.path("app", "1", "me")); got != "one" {
		t.Errorf("after that the image has %q", got)
	}
	if err := unix.Symlinkat("../2", root, "2"); err != nil {
		t.Error(err)
	}
	if got := w.read(w.path("app", "1", "me")); got != "two" {
		t.Errorf("after the tag the image has %q", got)
	}
}
