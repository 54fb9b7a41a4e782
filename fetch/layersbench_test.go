package fetch

import (
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"testing"

	kgzip "github.com/klauspost/compress/gzip"
)

var _ blobReader = (*Blob)(nil)

// benchLayer is a gzip layer of some 100 MB that compresses as programs do.
func benchLayer(b *testing.B) (Layer, int) {
	var files []layerFile
	for i := range 3000 {
		body := layerText(i, 20_000)
		copy(body[5000:], layerNoise(uint64(i), 8000))
		files = append(files, lfile(fmt.Sprintf("d%02d/f%04d", i%40, i), body))
	}
	for i := range 4 {
		body := layerText(i, 10<<20)
		for at := 0; at < len(body); at += 30_000 {
			copy(body[at:], layerNoise(uint64(at+i), 12_000))
		}
		files = append(files, lfile(fmt.Sprintf("lib%d", i), body))
	}
	raw := tarOf(b, files)
	return layerOf(gzipOf(raw), nil), len(raw)
}

// BenchmarkPass is the whole pass; the others are what it is compared with.
func BenchmarkPass(b *testing.B) {
	l, n := benchLayer(b)
	m := l.Blob.(*memBlob)
	b.Run("gunzip/std", func(b *testing.B) {
		b.SetBytes(int64(n))
		for b.Loop() {
			r, _ := gzip.NewReader(&memBody{b: m, ctx: context.Background(), end: m.Size()})
			io.Copy(io.Discard, r)
		}
	})
	b.Run("gunzip/klauspost", func(b *testing.B) {
		b.SetBytes(int64(n))
		for b.Loop() {
			r, _ := kgzip.NewReader(&memBody{b: m, ctx: context.Background(), end: m.Size()})
			io.Copy(io.Discard, r)
		}
	})
	b.Run("pass", func(b *testing.B) {
		b.SetBytes(int64(n))
		for b.Loop() {
			b.StopTimer()
			c := newCache(b, 1<<30)
			bl := mustBuilder(b)
			pack, err := c.Pack(l.Desc.Digest)
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			p := StartPass(l, bl, pack, c)
			if err := p.Wait(context.Background()); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			pack.Close()
			b.StartTimer()
		}
	})
}

// BenchmarkReadHit is a read that the pack answers.
func BenchmarkReadHit(b *testing.B) {
	ld := load(b, layerOf(gzipOf(tarOf(b, layerCorpus())), nil), newCache(b, 1<<30), ReaderOptions{})
	id := ld.find(b, "lib/text")
	buf := make([]byte, 128<<10)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ld.reader.ReadAt(context.Background(), id, buf, 1<<20); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkIndex reads a table of contents of 20,000 files.
func BenchmarkIndex(b *testing.B) {
	var files []layerFile
	for i := range 20_000 {
		files = append(files, lfile(fmt.Sprintf("usr/share/some/directory%03d/file%05d", i/100, i), layerText(i, 20)))
	}
	for name, l := range map[string]Layer{
		"estargz": estargzOf(b, tarOf(b, files)), "zstdchunked": zstdChunkedOf(b, files, 64<<10, nil),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				bl := mustBuilder(b)
				b.StartTimer()
				if t, err := Index(context.Background(), l, bl); t.Format == 0 {
					b.Fatal(t.Why, err)
				}
			}
			b.ReportMetric(float64(len(files)), "files/op")
		})
	}
}
