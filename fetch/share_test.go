package fetch

import (
	"context"
	"crypto/sha256"
	"os"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// TestShareNamesThePack looks where contents are said to be when a layer's pack
// is not named after its blob: a place in another pack would be other bytes.
func TestShareNamesThePack(t *testing.T) {
	files := layerCorpus()
	raw := tarOf(t, files)
	for name, l := range map[string]Layer{"estargz": estargzOf(t, raw), "gzip": layerOf(gzipOf(raw), nil)} {
		t.Run(name, func(t *testing.T) {
			c := newCache(t, 1<<30)
			key := v1.Hash{Algorithm: "sha256", Hex: "11" + l.Desc.Digest.Hex[2:]}
			pack, err := c.Pack(key)
			if err != nil {
				t.Fatal(err)
			}
			defer pack.Close()
			if _, err := c.Pack(l.Desc.Digest); err != nil { // of another layer with this blob
				t.Fatal(err)
			}
			readOne(t, l, c, pack)
			where, ok := c.Find(sha256.Sum256(files[1].body))
			if !ok || where.Pack != key {
				t.Errorf("Find = %v, %v, want pack %v", where.Pack, ok, key)
			}
		})
	}
}

// readOne indexes l and reads etc/os-release.
func readOne(t *testing.T, l Layer, c *cache.Cache, pack *cache.Pack) {
	t.Helper()
	b, err := unionfs.NewBuilder(c.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	ld := &loaded{pack: pack}
	toc, err := Index(context.Background(), l, b)
	if err != nil {
		t.Fatal(err)
	}
	if ld.format = toc.Format; ld.format == 0 {
		p := StartPass(l, b, pack, c)
		defer p.Close()
		if err := p.Wait(context.Background()); err != nil {
			t.Fatal(err)
		}
		ld.format = p.Format()
	}
	idx := t.TempDir() + "/idx"
	f, err := os.Create(idx)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := b.Write(f, unionfs.Meta{BlobSize: l.Desc.Size, Format: uint8(ld.format)}); err != nil {
		t.Fatal(err)
	}
	if ld.idx, err = unionfs.Open(idx); err != nil {
		t.Fatal(err)
	}
	defer ld.idx.Close()
	ld.reader = NewReader(l, ld.idx, pack, c, ReaderOptions{})
	defer ld.reader.Close()
	ld.read("etc/os-release", 0, 4096, t)
}
