package fs

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFacts(t *testing.T) {
	w, app, _, _ := builtWorld(t, Options{})
	get := func(path, name string) (string, error) {
		buf := make([]byte, 1000)
		n, err := unix.Lgetxattr(path, "user.imgfs."+name, buf)
		return string(buf[:max(n, 0)]), err
	}
	image := w.path("app", "1")
	made := filepath.Join(image, "made")
	w.read(made)
	var layers []layerJSON
	w.decode(&layers, "meta", w.host, "app/1/layers.json")
	for _, c := range []struct{ path, name, want string }{
		{image, "image", w.host + "/app:1"},
		{image, "id", "sha256:" + hexOf(t, app.ConfigName)},
		{image, "digest", "sha256:" + hexOf(t, app.Digest)},
		{image, "size", "4000"}, {image, "shared", "3000"},
		{made, "size", "1000"}, {made, "cached", "1000"}, {made, "layer", layers[1].Digest}, {made, "method", "gzip"},
	} {
		if got, err := get(c.path, c.name); got != c.want || err != nil {
			t.Errorf("%s of %s = %q, %v, want %q", c.name, filepath.Base(c.path), got, err, c.want)
		}
	}
	_, err := get(made, "nothing")
	w.wantErr("a fact that there is not", err, syscall.ENODATA)
	_, err = get(image, "error")
	w.wantErr("the error of what has none", err, syscall.ENODATA)
	buf := make([]byte, 1000)
	for _, p := range []string{image, made} {
		if n, err := unix.Llistxattr(p, buf); n != 0 || err != nil {
			t.Errorf("listxattr = %q, %v", buf[:max(n, 0)], err)
		}
	}
}

func TestDuCached(t *testing.T) {
	w := newWorld(t, Options{Du: DuCached})
	w.push("app:1", layer(t, dir("d/"), file("d/a", strings.Repeat("a", 5000))))
	a := w.path("app", "1", "d", "a")
	w.read(a)
	var st unix.Stat_t
	eventually(t, "5,000 bytes are 10 blocks of the disk", func() bool { // once the layer has passed
		return unix.Lstat(a, &st) == nil && st.Size == 5000 && st.Blocks == 10
	})
	lookups := w.stats().Fuse["GETATTR"]
	unix.Lstat(a, &st)
	unix.Lstat(a, &st)
	if got := w.stats().Fuse["GETATTR"] - lookups; got < 2 {
		t.Errorf("two stats made %d GETATTR: the kernel keeps what changes", got)
	}
}
