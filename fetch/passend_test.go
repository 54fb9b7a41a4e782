package fetch

import (
	"archive/tar"
	"bytes"
	"context"
	"testing"
)

// A bug in what the pass calls costs the pass, not everyone who waits for it.
func TestPassPanicUnlocks(t *testing.T) {
	p := &Pass{}
	p.store.init()
	r := &blockReader{}
	for name, fn := range map[string]func() error{
		"entry": func() error {
			return p.entry(t.Context(), &tar.Header{Name: "a", Typeflag: tar.TypeReg}, r, place{}, r)
		},
		"large": func() error { return p.large(t.Context(), &passFile{size: 1 << 30}) },
		"small": func() error { return p.small(t.Context(), &passFile{}) },
	} {
		if err := recovered(fn); err == nil {
			t.Fatalf("%s: no panic without a Builder", name)
		}
		if !p.mu.TryLock() {
			t.Fatalf("%s: locked after a panic", name)
		}
		p.mu.Unlock()
	}
}

// After its end a pass does not look at what is staged: that may be another's.
func TestReadAfterAnotherPassBegan(t *testing.T) {
	body := layerNoise(4, 3<<20)
	l := layerOf(gzipOf(tarOf(t, []layerFile{lfile("big", body)})), nil)
	p := startPass(t, l, newCache(t, 1<<30))
	if err := p.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
	id := p.lookup(t, "big")
	if err := p.pack.Stage(2<<20, []byte("the bytes of another")); err != nil {
		t.Fatal(err)
	}
	defer p.pack.Rollback()
	buf := make([]byte, 1000)
	if n, err := p.ReadAt(t.Context(), id, buf, 2<<20); err == nil && !bytes.Equal(buf[:n], body[2<<20:][:n]) {
		t.Error("wrong bytes")
	}
}
