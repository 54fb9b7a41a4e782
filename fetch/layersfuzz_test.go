package fetch

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// tocSeeds are tables of contents as writers make them, and some that lie.
func tocSeeds(tb testing.TB) (docs [][]byte) {
	entries := []map[string]any{
		tocEnt("name", "d/", "type", "dir", "mode", 0o755, "modtime", "2023-11-14T22:13:20Z"),
		tocReg("d/a", 5, 10, "xattrs", map[string][]byte{"user.x": []byte("y")}),
		tocReg("d/b", 10, 20, "chunkSize", 5, "chunkDigest", someDigest), chunkAt(5, 5, 30),
		tocEnt("name", "l", "type", "hardlink", "linkName", "d/a"),
		tocEnt("name", "s", "type", "symlink", "linkName", "d"),
		tocEnt("name", "c", "type", "char", "devMajor", 1, "devMinor", 3),
		tocEnt("name", "d/.wh.x", "type", "reg", "digest", someDigest),
	}
	docs = append(docs, tocDoc(tb, entries...), tocDoc(tb), []byte(`{"entries":[`), []byte(`{}`))
	lie := bytes.Replace(docs[0], []byte(`"offset":20`), []byte(`"offset":-20`), 1)
	inner := tocDoc(tb, tocReg("a", 5, 10), tocReg("b", 5, 10, "innerOffset", 5), tocReg("z", 9, 40, "chunkType", "zeros"))
	return append(docs, lie, inner)
}

// checkIndexed asserts what every index that was accepted must hold: chunks make
// up their contents and lie within the blob.
func checkIndexed(t *testing.T, l Layer, b *unionfs.Builder, f Format) {
	c := newCache(t, 1<<20)
	ld := &loaded{format: f, blob: l.Blob.(*memBlob)}
	var err error
	if ld.pack, err = c.Pack(l.Desc.Digest); err != nil {
		t.Fatal(err)
	}
	defer ld.pack.Close()
	if err := ld.install(t, l, b, c, ReaderOptions{}); err != nil {
		t.Fatal(err)
	}
	s := ld.idx.Stats()
	for k := range s.Contents {
		ci, err := ld.idx.ContentByNumber(k)
		if err != nil {
			t.Fatal(err)
		}
		next := int64(0)
		for i := range ci.NChunks {
			ch, size, err := ld.idx.Chunk(ci.FirstChunk + i)
			if err != nil || ch.Off != next || size <= 0 || size > maxChunk {
				t.Fatalf("chunk %d of content %d: %+v, %d, %v", i, k, ch, size, err)
			}
			if ch.BlobOff < 0 || ch.BlobLen < 0 || ch.BlobOff+ch.BlobLen > l.Blob.Size() {
				t.Fatalf("chunk %d of content %d is outside the blob: %+v", i, k, ch)
			}
			next += size
		}
		if next != ci.Size && ci.NChunks > 0 {
			t.Fatalf("content %d has %d bytes, its chunks %d", k, ci.Size, next)
		}
	}
	// Reading must end, with bytes or with an error.
	for i := range min(s.Files, 20) {
		ld.reader.ReadAt(context.Background(), unionfs.FileID(i), make([]byte, 1000), 0)
	}
	ld.reader.Close()
}

func fuzzTOC(t *testing.T, l Layer) {
	b, err := unionfs.NewBuilder(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	toc, err := Index(context.Background(), l, b)
	if (toc.Format != 0) != (toc.Why == "" && err == nil) || toc.Prioritized < 0 || toc.Prioritized > l.Blob.Size() {
		t.Fatalf("Index = %+v, %v", toc, err)
	}
	if toc.Format != 0 {
		checkIndexed(t, l, b, toc.Format)
	}
}

func FuzzEstargzTOC(f *testing.F) {
	for _, doc := range tocSeeds(f) {
		f.Add(doc)
	}
	payload := append(gzipOf([]byte("xxxxx")), make([]byte, 1000)...)
	f.Fuzz(func(t *testing.T, doc []byte) { fuzzTOC(t, eStargzLayer(payload, doc)) })
}

func FuzzZstdChunkedTOC(f *testing.F) {
	for _, doc := range tocSeeds(f) {
		f.Add(doc)
	}
	payload := append(zstdOf([]byte("xxxxx")), make([]byte, 1000)...)
	f.Fuzz(func(t *testing.T, doc []byte) { fuzzTOC(t, zstdChunkedLayer(payload, doc)) })
}

// FuzzPass takes random bytes as a layer, and as what a gzip or zstd layer expands to.
func FuzzPass(f *testing.F) {
	small := []layerFile{ldir("a/"), lfile("a/b", []byte("x")), llink('2', "a/c", "b"), lfile("a/.wh.d", nil), lfile("e", layerText(1, 3000))}
	raw := tarOf(f, small)
	f.Add(raw, byte(0))
	f.Add(raw, byte(1))
	f.Add(raw, byte(2))
	f.Add(gzipOf(raw), byte(0))
	f.Add(zstdOf(raw), byte(0))
	f.Add(append(skippable(nil), zstdOf(raw)...), byte(0))
	f.Add(sparseTar("s", 2<<20, []byte("data")), byte(1))
	f.Add(sparseTar("s", 1<<40, []byte("data")), byte(1))
	f.Fuzz(func(t *testing.T, data []byte, wrap byte) {
		switch wrap % 3 {
		case 1:
			data = gzipOf(data)
		case 2:
			data = zstdOf(data)
		}
		l := layerOf(data, nil)
		c, err := cache.Open(t.TempDir(), cache.Options{Size: 64 << 20})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		p := startPass(t, l, c)
		defer p.Close()
		err = p.Wait(context.Background())
		if (err == nil) != p.b.Done() || (err == nil) != (p.b.Err() == nil) {
			t.Fatalf("pass: %v, builder done %v, %v", err, p.b.Done(), p.b.Err())
		}
		var e *Error
		var ee *unionfs.EntryError
		if err != nil && !errors.As(err, &e) && !errors.As(err, &ee) {
			t.Fatalf("an error of no kind: %v", err)
		}
		if err == nil {
			s := p.b.Stats()
			for i := range s.Files {
				var a unionfs.Attr
				if p.b.Attr(unionfs.FileID(i), &a) == nil && a.Mode&0o170000 == 0o100000 {
					buf := make([]byte, min(a.Size, 1<<20))
					if n, err := p.ReadAt(context.Background(), unionfs.FileID(i), buf, 0); err != nil || n != len(buf) {
						t.Fatalf("ReadAt(%d) = %d of %d, %v", i, n, a.Size, err)
					}
				}
			}
		} else if p.pack.Stored() != 0 {
			t.Fatal("a failed pass keeps bytes")
		}
	})
}
