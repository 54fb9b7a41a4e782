package images

import (
	"context"
	"testing"
)

// TestAllocations counts what the answers that the kernel asks for most allocate,
// once an image is merged and its bytes are here.
func TestAllocations(t *testing.T) {
	h := newHub(t)
	h.push("app", "v1", gzipLayer(t, file("d/", ""), file("d/hello", "world")), gzipLayer(t, file("d/", ""), file("d/other", "x")))
	ctx := context.Background()
	root := h.root(h.name("app", "v1"))
	if err := h.Settle(ctx, root); err != nil {
		t.Fatal(err)
	}
	dir := h.lookup(root, "d")
	ino := h.lookup(dir, "hello")
	var a Attr
	p := make([]byte, 16)
	for _, c := range []struct {
		name string
		want float64
		do   func() error
	}{
		{"Lookup", 0, func() error { _, _, err := h.Lookup(ctx, dir, "hello", &a); return err }},
		{"Lookup of nothing", 0, func() error { _, _, err := h.Lookup(ctx, dir, "no", &a); return err }},
		{"Stat of a file", 0, func() error { _, err := h.Stat(ctx, ino, &a); return err }},
		{"Stat of a directory", 0, func() error { _, err := h.Stat(ctx, dir, &a); return err }},
		{"ReadAt", 0, func() error { _, err := h.ReadAt(ctx, ino, p, 0); return err }},
		{"CachedBytes", 0, func() error { _, err := h.CachedBytes(ctx, ino); return err }},
		{"ReadDir", 2, func() error {
			return h.ReadDir(ctx, dir, 0, func(int, Entry, *Attr) bool { return true })
		}},
	} {
		got := testing.AllocsPerRun(100, func() {
			if err := c.do(); err != nil {
				t.Fatal(err)
			}
		})
		if got > c.want {
			t.Errorf("%s: %v allocations, want %v", c.name, got, c.want)
		}
	}
}
