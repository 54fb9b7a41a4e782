package images

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/imgfs/imgfs/cache"
)

// flip changes a byte in the middle of a file.
func flip(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, st.Size()/2); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b, st.Size()/2); err != nil {
		t.Fatal(err)
	}
}

// check runs Check, sorts what it found, and keeps the kinds alone.
func (h *hub) check(repair bool) (kinds string, c Checked) {
	h.t.Helper()
	var list []string
	c, err := h.Check(context.Background(), repair, func(f Finding) {
		h.t.Logf("%+v", f)
		kind := f.Kind
		if f.Repaired {
			kind += "+"
		}
		list = append(list, kind)
	})
	if err != nil {
		h.t.Fatalf("Check = %v", err)
	}
	slices.Sort(list)
	return strings.Join(slices.Compact(list), " "), c
}

// TestCheck flips a byte in each kind of file, under a reader, and repairs.
func TestCheck(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	body := noise(300 << 10)
	lazy := lazyLayer(t, file("d/", ""), file("d/lazy", body))
	plain := gzipLayer(t, file("d/", ""), file("d/plain", "world"))
	img := h.pushAll("app", "v1", lazy, mutate.Addendum{Layer: plain})
	n := h.name("app", "v1")
	root := h.root(n)
	if err := h.Settle(ctx, root); err != nil {
		t.Fatal(err)
	}
	good := func(when string) {
		t.Helper()
		dir := h.lookup(root, "d")
		if h.read(h.lookup(dir, "lazy")) != body || h.read(h.lookup(dir, "plain")) != "world" {
			t.Errorf("%s: wrong bytes", when)
		}
		var names []string
		if err := h.ReadDir(ctx, dir, 0, func(_ int, e Entry, _ *Attr) bool { names = append(names, e.Name); return true }); err != nil {
			t.Errorf("%s: ReadDir = %v", when, err)
		}
		if d, err := h.Details(ctx, n); err != nil || len(d.RawManifest) == 0 || len(d.RawConfig) == 0 || !slices.Equal(names, []string{"lazy", "plain"}) {
			t.Errorf("%s: Details = %v, the directory has %q", when, err, names)
		}
	}
	good("at first")
	if err := h.cache.Sync(); err != nil {
		t.Fatal(err)
	}
	kinds, c := h.check(false)
	if want := (Checked{Blobs: 2, Indexes: 2, Trees: 1, Packs: 2, Chunks: 6, Names: 1}); kinds != "" || c != want {
		t.Errorf("Check of a good cache found %q, and looked at %+v, want %+v", kinds, c, want)
	}
	id, _ := img.ConfigName()
	d, err := h.Details(ctx, n)
	if err != nil {
		t.Fatal(err)
	}
	key := d.Layers[0].Key
	tree, _ := filepath.Glob(filepath.Join(h.o.Dir, "trees", "*"))
	for _, damage := range []struct{ kind, path string }{
		{"blob", h.cache.Path(cache.Blob, id)},
		{"index", h.cache.Path(cache.Index, key)},
		{"index", h.cache.Path(cache.Index, digestOf(t, plain))},
		{"tree", tree[0]},
		{"pack", filepath.Join(h.o.Dir, "packs", key.Hex+".pack")},
	} {
		flip(t, damage.path)
		// Damage is found, and stays.
		for range 2 {
			if kinds, _ := h.check(false); kinds != damage.kind {
				t.Errorf("%s damaged: Check found %q", damage.kind, kinds)
			}
		}
		if kinds, _ := h.check(true); kinds != damage.kind+"+" {
			t.Errorf("%s damaged: Check repaired %q", damage.kind, kinds)
		}
		good(damage.kind + " repaired")
		if kinds, _ := h.check(false); kinds != "" {
			t.Errorf("%s repaired: Check found %q", damage.kind, kinds)
		}
		if _, err := os.Stat(damage.path); err != nil {
			t.Errorf("%s repaired: %v", damage.kind, err)
		}
	}
	stray := strings.Repeat("ab", 32)
	os.WriteFile(filepath.Join(h.o.Dir, "layers", stray+".idx"), []byte("x"), 0o600)
	if kinds, _ := h.check(true); kinds != "index+" {
		t.Errorf("an index of no layer: Check found %q", kinds)
	}
	h.reopen()
	if root, err = h.Root(ctx, n); err != nil {
		t.Fatal(err)
	}
	good("after a restart")
}

// TestCheckBeside runs Check with repair while readers read and damage happens.
func TestCheckBeside(t *testing.T) {
	h := newHub(t)
	ctx, cancel := context.WithCancel(context.Background())
	body := noise(1 << 20)
	h.pushAll("app", "v1", lazyLayer(t, file("d/", ""), file("d/f", body)), mutate.Addendum{Layer: gzipLayer(t, file("d/", ""), file("d/g", "x"))})
	n := h.name("app", "v1")
	root := h.root(n)
	if err := h.Settle(ctx, root); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			p := make([]byte, len(body))
			for ctx.Err() == nil {
				var a Attr
				dir, _, err := h.Lookup(context.Background(), root, "d", &a)
				if err != nil {
					t.Errorf("Lookup = %v", err)
					return
				}
				ino, _, err := h.Lookup(context.Background(), dir, "f", &a)
				if err != nil || ino == 0 {
					t.Errorf("Lookup = %v, %v", ino, err)
					return
				}
				if n, err := h.ReadAt(context.Background(), ino, p, 0); err != nil || string(p[:n]) != body {
					t.Errorf("ReadAt = %d, %v, wrong bytes: %v", n, err, string(p[:n]) != body)
					return
				}
			}
		})
	}
	for i := range 12 {
		dir := []string{"layers", "trees", "blobs/sha256"}[i%3]
		files, _ := filepath.Glob(filepath.Join(h.o.Dir, dir, "*"))
		if len(files) == 0 {
			continue
		}
		flip(t, files[0])
		if kinds, _ := h.check(true); !strings.Contains(kinds, "+") && kinds != "" {
			t.Errorf("Check found %q", kinds)
		}
	}
	cancel()
	wg.Wait()
	if _, err := h.Check(ctx, false, func(Finding) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("Check with a context that has ended = %v", err)
	}
}

// TestCheckCatalogue makes a counter wrong, and has it set right.
func TestCheckCatalogue(t *testing.T) {
	h := newHub(t)
	h.push("app", "v1", gzipLayer(t, file("hello", "world")))
	if err := h.Settle(context.Background(), h.root(h.name("app", "v1"))); err != nil {
		t.Fatal(err)
	}
	if _, err := h.cat.write(func(tx *txn) error {
		sum, err := tx.total()
		if err == nil {
			sum.Expanded += 7
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"catalogue", "catalogue+", ""} {
		if kinds, _ := h.check(i == 1); kinds != want {
			t.Errorf("Check number %d found %q, want %q", i, kinds, want)
		}
	}
	if sum, err := h.Totals(); err != nil || sum.Expanded != 5 {
		t.Errorf("Totals() = %+v, %v", sum, err)
	}
}

// The first Check after Open has made the catalogue again says so, the next not.
func TestCheckRebuilt(t *testing.T) {
	h := newHub(t)
	h.push("app", "v1", gzipLayer(t, file("hello", "world")))
	if err := h.Settle(context.Background(), h.root(h.name("app", "v1"))); err != nil {
		t.Fatal(err)
	}
	h.cat.suspect(errDamaged)
	h.reopen()
	for _, want := range []string{"catalogue+", ""} {
		if kinds, _ := h.check(false); kinds != want {
			t.Errorf("Check found %q, want %q", kinds, want)
		}
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"a b\"é": "a b\"é", "\x1b[2J\n\x00\xff": `\x1b[2J\n\x00\xff`,
		strings.Repeat("x", 200): strings.Repeat("x", 200), strings.Repeat("x", 201): strings.Repeat("x", 197) + "…",
	} {
		if got := printable(in, maxFound); got != want {
			t.Errorf("printable(%q) = %q, want %q", in, got, want)
		}
	}
}

// A check of the catalogue stops when its context ends meanwhile.
func TestCheckCatalogueEnds(t *testing.T) {
	s, _ := testCatalog(t)
	for _, tag := range []string{"1", "2", "3"} {
		add(t, s.cat, Name{"a", tag}, "base"+tag)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := s.cat.write(func(tx *txn) error {
		for _, b := range [][]byte{bucketHere, bucketUsers} {
			if err := tx.Bucket(b).Put([]byte("stray\x1b"), nil); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	found := 0
	_, err := s.cat.check(ctx, true, func(string, string) { found++; cancel() })
	if !errors.Is(err, context.Canceled) || found != 1 {
		t.Errorf("check = %v, after %d findings, want it to end at the first", err, found)
	}
}
