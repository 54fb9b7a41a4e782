package integration

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestReadersOfRemovedImages holds files of images that are removed: who holds them
// reads on, to the last byte, and the other image is not disturbed.
func TestReadersOfRemovedImages(t *testing.T) {
	const size = 3 << 20
	r := startSmall(t)
	shared, own := filler("shared", size), filler("own", size)
	r.pushTar(t, "a/v1", []entry{file("shared", shared)}, []entry{file("own", own), dir("d"), file("d/f", "in a directory")})
	r.pushTar(t, "b/v1", []entry{file("shared", shared)}, []entry{file("b", "b")})
	m := startMount(t)
	a, b := m.path(r.host, "a/v1"), m.path(r.host, "b/v1")
	if _, err := os.ReadFile(filepath.Join(b, "b")); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(a, "own"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	first := make([]byte, 4096)
	if _, err := io.ReadFull(f, first); err != nil {
		t.Fatal(err)
	}
	g, err := os.Open(filepath.Join(a, "shared"))
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	d, err := os.Open(filepath.Join(a, "d"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	id := strings.TrimPrefix(m.row(r.host+"/a:v1").ID, "sha256:")
	var top string
	var of []layerRow
	m.control("meta/"+r.host+"/a/v1/layers.json", &of)
	top = strings.TrimPrefix(of[1].Key, "sha256:")

	if err := os.Remove(a); err != nil {
		t.Fatal(err)
	}
	wantErrno(t, "stat of the removed image's ID", lstat(m.path(".imgfs/ids", id)), unix.ENOENT)
	if out, err := m.try("prune", "-f"); err == nil {
		t.Logf("prune: %s", out)
	} else {
		t.Errorf("prune: %v\n%s", err, out)
	}
	if err := os.Remove(m.path(".imgfs/layers", top)); err != nil && !os.IsNotExist(err) {
		t.Errorf("dropping its layer: %v", err)
	}
	dropCaches(t)
	rest, err := io.ReadAll(f)
	if got := string(first) + string(rest); err != nil || got != own {
		t.Errorf("a removed image's file: %d bytes, %v, want all %d", len(got), err, len(own))
	}
	if data, err := io.ReadAll(g); err != nil || string(data) != shared {
		t.Errorf("a removed image's file in a layer that another image has: %d bytes, %v", len(data), err)
	}
	if fd, err := unix.Openat(int(d.Fd()), "f", unix.O_RDONLY, 0); err == nil {
		buf := make([]byte, 100)
		n, err := unix.Read(fd, buf)
		unix.Close(fd)
		if err != nil || string(buf[:n]) != "in a directory" {
			t.Errorf("a name in a directory that is held: %q, %v", buf[:n], err)
		}
	} else if err != unix.ESTALE && err != unix.ENOENT {
		t.Errorf("a name in a directory that is held: %v, want it, ESTALE or ENOENT", err)
	}
	m.row(r.host + "/b:v1")
	if data, err := os.ReadFile(filepath.Join(b, "shared")); err != nil || string(data) != shared {
		t.Errorf("the other image's file: %d bytes, %v", len(data), err)
	}
	for _, held := range []*os.File{f, g, d} {
		held.Close()
	}
	m.restart() // what the readers have brought back is nobody's
	m.recount()
}

func lstat(path string) error {
	var st unix.Stat_t
	return unix.Lstat(path, &st)
}

// dropCaches has the kernel forget what it has read.
func dropCaches(t testing.TB) {
	t.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Logf("the kernel's caches stay: %v", err)
	}
}

// packBytes are the bytes of layers' contents on the disk.
func (m *mount) packBytes() int64 {
	m.t.Helper()
	return diskUsage(m.t, filepath.Join(m.cache, "packs"))
}

// TestPruneFrees removes images: what no image uses stays cached until prune, or
// until there is no room, and then goes before everything else.
func TestPruneFrees(t *testing.T) {
	const size = 8 << 20
	r := startSmall(t)
	for _, name := range []string{"one", "two", "three", "four"} {
		r.pushTar(t, name+"/v1", []entry{file("f", filler(name, size))})
	}
	m := startMount(t, "--cache-size", "28MiB")
	read := func(name string) {
		t.Helper()
		if data, err := os.ReadFile(m.path(r.host, name, "v1/f")); err != nil || string(data) != filler(name, size) {
			t.Fatalf("%s: %d bytes, %v", name, len(data), err)
		}
	}
	bytesOf := func(name string) int64 {
		var n int64
		for _, q := range r.log() {
			if strings.Contains(q.path, "/"+name+"/blobs/") {
				n += q.bytes
			}
		}
		return n
	}
	read("one")
	read("two")
	full := m.df()
	if full.Cached < 2*size {
		t.Errorf("after reading both, df says cached %d, want %d", full.Cached, 2*size)
	}
	if err := os.Remove(m.path(r.host, "two/v1")); err != nil {
		t.Fatal(err)
	}
	df := m.df()
	if df.Idle != 1 || df.ReclaimableCached < size {
		t.Errorf("after rmdir: idle %d, reclaimable %d of the cache, want 1 and %d", df.Idle, df.ReclaimableCached, size)
	}
	// No room for four: the idle one goes, although it was used last, and one stays.
	read("three")
	read("four")
	dropCaches(t)
	r.reset()
	read("one")
	if n := bytesOf("one"); n > 0 {
		t.Errorf("%d bytes of an image that is here were evicted before those of one that is not", n)
	}
	if err := os.Remove(m.path(r.host, "three/v1")); err != nil {
		t.Fatal(err)
	}
	out := m.imgfs("prune", "-f")
	t.Logf("prune: %s", out)
	df = m.df()
	if df.Idle != 0 || df.ReclaimableCached != 0 {
		t.Errorf("after prune: %+v", df)
	}
	for end := time.Now().Add(patience); m.packBytes() > 2*size+size/2; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after prune %d bytes of packs are on the disk, want %d", m.packBytes(), 2*size)
		}
	}
	dropCaches(t)
	read("one")
	read("four")
	m.recount()
}
