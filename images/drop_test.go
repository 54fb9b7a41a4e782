package images

import (
	"context"
	"errors"
	iofs "io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/fetch/registrytest"
)

// reopen closes the store and opens it again.
func (h *hub) reopen() {
	h.t.Helper()
	o := h.o
	if err := h.Close(); err != nil {
		h.t.Fatal(err)
	}
	o.Log = slog.New(slog.NewTextHandler(h.t.Output(), nil))
	s, err := Open(o)
	if err != nil {
		h.t.Fatal(err)
	}
	h.Store = s
}

func (h *hub) read(ino Ino) string {
	h.t.Helper()
	p := make([]byte, 1<<20)
	n, err := h.ReadAt(context.Background(), ino, p, 0)
	if err != nil {
		h.t.Fatalf("ReadAt = %v", err)
	}
	return string(p[:n])
}

func countFiles(t *testing.T, dir string) int {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// TestDropLayer removes an image, drops its layers while a reader has its files,
// reads on, and brings the image back.
func TestDropLayer(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	body := noise(300 << 10)
	lazy := lazyLayer(t, file("d/", ""), file("d/lazy", body))
	plain := gzipLayer(t, file("d/plain", "world"))
	h.pushAll("app", "v1", lazy, mutate.Addendum{Layer: plain})
	n := h.name("app", "v1")
	root := h.root(n)
	if err := h.Settle(ctx, root); err != nil {
		t.Fatal(err)
	}
	dir := h.lookup(root, "d")
	inos := map[string]Ino{"lazy": h.lookup(dir, "lazy"), "plain": h.lookup(dir, "plain")}
	if h.read(inos["lazy"]) != body {
		t.Fatal("wrong bytes")
	}
	layers, err := h.Layers()
	if err != nil || len(layers) != 2 {
		t.Fatalf("Layers() = %v, %v", layers, err)
	}
	for _, l := range layers {
		if _, err := h.DropLayer(ctx, l.Key); !errors.Is(err, ErrConflict) {
			t.Errorf("DropLayer of a layer in use = %v", err)
		}
	}
	if n := countFiles(t, filepath.Join(h.o.Dir, "trees")); n != 1 {
		t.Errorf("%d trees for one image", n)
	}
	if _, err := h.Remove(n); err != nil {
		t.Fatal(err)
	}
	if n := countFiles(t, filepath.Join(h.o.Dir, "trees")); n != 0 {
		t.Errorf("%d trees are left of an image that is gone", n)
	}
	for _, l := range layers {
		freed, err := h.DropLayer(ctx, l.Key)
		if err != nil || freed < l.Cached || l.Cached == 0 {
			t.Errorf("DropLayer = %d, %v, %d were cached", freed, err, l.Cached)
		}
		if h.cache.StoredOf(l.Key) != 0 || h.cache.Has(cache.Index, l.Key) {
			t.Errorf("of a dropped layer %d bytes are left, its index: %v", h.cache.StoredOf(l.Key), h.cache.Has(cache.Index, l.Key))
		}
		if _, err := h.DropLayer(ctx, l.Key); !errors.Is(err, iofs.ErrNotExist) {
			t.Errorf("DropLayer again = %v", err)
		}
		if _, err := h.LayerRoot(ctx, l.Key); !errors.Is(err, iofs.ErrNotExist) {
			t.Errorf("LayerRoot of a dropped layer = %v", err)
		}
	}
	// The reader goes on.
	if got := h.read(inos["lazy"]); got != body {
		t.Error("wrong bytes of a lazy layer that was dropped")
	}
	if got := h.read(inos["plain"]); got != "world" {
		t.Errorf("a plain layer that was dropped has %q", got)
	}
	if h.lookup(dir, "plain") != inos["plain"] {
		t.Error("a file has another number")
	}
	if used := h.cache.IdleUsed(); used == 0 {
		t.Error("what the reader brought back is not idle")
	}
	// A restart is the end for the reader, and for what it brought.
	h.reopen()
	h.sweepDropped() // also runs by itself, sooner or later
	if used := h.Usage().Used; used != 0 {
		t.Errorf("%d bytes are used after a restart, want none", used)
	}
	// It comes back, and stays after a restart without being asked for again.
	root = h.root(n)
	for name, ino := range inos {
		if got := h.lookup(h.lookup(root, "d"), name); got != ino {
			t.Errorf("%s is number %d again, was %d", name, got, ino)
		}
	}
	for _, l := range layers {
		if !h.cache.Has(cache.Index, l.Key) {
			t.Errorf("layer %s has no index on this disk again", l.Key)
		}
	}
	if used := h.cache.IdleUsed(); used != 0 {
		t.Errorf("%d bytes of an image that is here are idle", used)
	}
	if h.read(inos["lazy"]) != body {
		t.Error("wrong bytes of a layer that came back")
	}
	h.reopen()
	before := h.Requests("")
	root, err = h.Root(ctx, n)
	if err != nil {
		t.Fatal(err)
	}
	if got := h.read(h.lookup(h.lookup(root, "d"), "lazy")); got != body {
		t.Error("wrong bytes after a restart")
	}
	if asked := h.Requests("") - before; asked != 0 {
		t.Errorf("%d requests after a restart, want 0", asked)
	}
}

// TestDropWhileArriving drops a layer that still streams for a reader.
func TestDropWhileArriving(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	l := gzipLayer(t, file("first", "1"), file("rest", noise(4<<20)))
	h.push("app", "v1", l)
	stall := &registrytest.Fault{Path: digestOf(t, l).String(), Stall: 1 << 20}
	h.Add(stall)
	n := h.name("app", "v1")
	root := h.root(n)
	first := h.lookup(root, "first")
	if _, err := h.Remove(n); err != nil {
		t.Fatal(err)
	}
	if _, err := h.DropLayer(ctx, digestOf(t, l)); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, stall.Release)
	if err := h.Settle(ctx, root); err != nil {
		t.Fatal(err)
	}
	if h.cache.Has(cache.Index, digestOf(t, l)) {
		t.Error("the index of a dropped layer is on this disk")
	}
	h.Clear()
	if got := h.read(first); got != "1" {
		t.Errorf("a file of the layer has %q", got)
	}
	if got := h.read(h.lookup(h.root(n), "first")); got != "1" {
		t.Errorf("it came back with %q", got)
	}
	if !h.cache.Has(cache.Index, digestOf(t, l)) {
		t.Error("the layer came back without its index")
	}
}

// TestDropCrash leaves the files of a layer behind, as a crash right after the
// catalogue's transaction does, and those of layers that are here.
func TestDropCrash(t *testing.T) {
	h := newHub(t)
	gone, idle, used := gzipLayer(t, file("gone", "1")), gzipLayer(t, file("idle", "2")), gzipLayer(t, file("used", "3"))
	h.push("app", "v1", gone, idle)
	h.push("app", "v2", used)
	if err := h.Settle(context.Background(), h.root(h.name("app", "v1"))); err != nil {
		t.Fatal(err)
	}
	if err := h.Settle(context.Background(), h.root(h.name("app", "v2"))); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Remove(h.name("app", "v1")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.cat.dropLayer(digestOf(t, gone)); err != nil {
		t.Fatal(err)
	}
	h.reopen()
	h.sweepDropped()
	for l, want := range map[v1.Layer]bool{gone: false, idle: true, used: true} {
		key := digestOf(t, l)
		if has, n := h.cache.Has(cache.Index, key), h.cache.StoredOf(key); has != want || n > 0 != want {
			t.Errorf("layer %s: index %v, %d bytes, want any: %v", key, has, n, want)
		}
	}
	if kinds, c := h.check(false); kinds != "" || c.Indexes != 2 || c.Packs != 2 {
		t.Errorf("Check found %q, and looked at %+v", kinds, c)
	}
}

// TestDropRace pulls, removes and drops at once. What is here in the end is whole.
func TestDropRace(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	lazy := lazyLayer(t, file("hello", "world"))
	h.pushAll("app", "v1", lazy)
	n := h.name("app", "v1")
	h.root(n)
	all, err := h.Layers()
	if err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	key := all[0].Key
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := h.DropLayer(ctx, key); err != nil && !errors.Is(err, ErrConflict) && !errors.Is(err, iofs.ErrNotExist) {
				t.Errorf("DropLayer = %v", err)
			}
		}
	})
	for range 15 {
		if err := h.Pull(ctx, n); err != nil {
			t.Fatal(err)
		}
		if !h.cache.Has(cache.Index, key) {
			t.Fatal("an image was pulled and its layer has no index")
		}
		root, err := h.Root(ctx, n)
		if err != nil {
			t.Fatal(err)
		}
		if got := h.read(h.lookup(root, "hello")); got != "world" {
			t.Fatalf("hello has %q", got)
		}
		if _, err := h.Remove(n); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	if kinds, _ := h.check(false); kinds != "" {
		t.Errorf("Check found %q", kinds)
	}
}

// TestDropShared drops a layer whose pack has a content that another layer has, too:
// that is read on without a registry.
func TestDropShared(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	body, large := noise(300<<10), noise(3<<20)
	a := gzipLayer(t, file("shared", body), file("large", large), file("a", "a"))
	b := gzipLayer(t, file("b", "b"), file("again", body), file("large", large))
	h.push("drop/a", "v1", a)
	h.push("drop/b", "v1", b)
	if err := h.Settle(ctx, h.root(h.name("drop/a", "v1"))); err != nil {
		t.Fatal(err)
	}
	root := h.root(h.name("drop/b", "v1"))
	if err := h.Settle(ctx, root); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Remove(h.name("drop/a", "v1")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.DropLayer(ctx, digestOf(t, a)); err != nil {
		t.Fatal(err)
	}
	h.Add(&registrytest.Fault{Reset: true})
	for range 2 {
		for name, want := range map[string]string{"again": body, "large": large, "b": "b"} {
			var attr Attr
			ino, _, err := h.Lookup(ctx, root, name, &attr)
			if err != nil || ino == 0 {
				t.Fatalf("Lookup(%q) = %v, %v", name, ino, err)
			}
			p := make([]byte, len(want))
			if n, err := h.ReadAt(ctx, ino, p, 0); err != nil || string(p[:n]) != want {
				t.Errorf("ReadAt(%q) = %d, %v", name, n, err)
			}
		}
		h.reopen()
		var err error
		if root, err = h.Root(ctx, h.name("drop/b", "v1")); err != nil {
			t.Fatal(err)
		}
	}
}
