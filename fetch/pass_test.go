package fetch

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// passing is a pass that a test looks into.
type passing struct {
	*Pass
	b    *unionfs.Builder
	pack *cache.Pack
}

func startPass(tb testing.TB, l Layer, c *cache.Cache) *passing {
	tb.Helper()
	b, err := unionfs.NewBuilder(c.TempDir())
	if err != nil {
		tb.Fatal(err)
	}
	pack, err := c.Pack(l.Desc.Digest)
	if err != nil {
		tb.Fatal(err)
	}
	p := StartPass(l, b, pack, c)
	tb.Cleanup(func() { p.Close(); b.Close(); pack.Close() })
	return &passing{p, b, pack}
}

// lookup waits until the layer has a path.
func (p *passing) lookup(tb testing.TB, path string) unionfs.ID {
	tb.Helper()
	id := unionfs.RootID
	for name := range strings.SplitSeq(path, "/") {
		for {
			changed := p.b.Changed()
			c, err := p.b.Lookup(id, name)
			if err != nil {
				tb.Fatal(err)
			}
			if c.Kind == unionfs.ChildInode {
				id = c.ID
				break
			}
			select {
			case <-changed:
			case <-time.After(10 * time.Second):
				tb.Fatalf("%q has not passed", path)
			}
		}
	}
	return id
}

func TestPassIsProgressive(t *testing.T) {
	big := layerNoise(3, 8<<20)
	files := []layerFile{
		ldir("etc/"), lfile("etc/os-release", layerText(1, 300)), lfile("etc/early", layerText(2, 5000)),
		lfile("big", big), lfile("late", layerText(3, 70000)),
	}
	raw := tarOf(t, files)
	for name, blob := range map[string][]byte{"gzip": gzipOf(raw), "zstd": zstdOf(raw), "tar": raw} {
		t.Run(name, func(t *testing.T) {
			l := layerOf(blob, nil)
			m := l.Blob.(*memBlob)
			m.limit, m.open = int64(len(blob))*6/10, make(chan struct{})
			p := startPass(t, l, newCache(t, 1<<30))
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			buf := make([]byte, 1000)
			n, err := p.ReadAt(ctx, p.lookup(t, "etc/os-release"), buf, 0)
			if err != nil || !bytes.Equal(buf[:n], files[1].body) {
				t.Fatalf("a file that has passed: %d bytes, %v", n, err)
			}
			id := p.lookup(t, "big")
			n, err = p.ReadAt(ctx, id, buf, 3<<20)
			if err != nil || !bytes.Equal(buf[:n], big[3<<20:][:1000]) {
				t.Fatalf("part of a file that is passing: %d bytes, %v", n, err)
			}
			short, stop := context.WithTimeout(ctx, 20*time.Millisecond)
			if _, err := p.ReadAt(short, id, buf, 7<<20); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("bytes that have not passed: %v, want to wait", err)
			}
			stop()
			if p.b.Done() {
				t.Error("done before its end")
			}
			done := make(chan error, 1)
			go func() {
				b := make([]byte, 1000)
				n, err := p.ReadAt(ctx, id, b, 8<<20-500)
				if err == nil && !bytes.Equal(b[:n], big[8<<20-500:]) {
					err = errors.New("wrong bytes at the end")
				}
				done <- err
			}()
			close(m.open)
			if err := <-done; err != nil {
				t.Error(err)
			}
			if err := p.Wait(ctx); err != nil {
				t.Fatal(err)
			}
			if n, err := p.ReadAt(ctx, p.lookup(t, "late"), buf, 0); err != nil || !bytes.Equal(buf[:n], files[4].body[:1000]) {
				t.Errorf("after the end: %d, %v", n, err)
			}
			if done, total := p.Progress(); done != total || m.requests != 1 {
				t.Errorf("progress %d of %d, %d requests", done, total, m.requests)
			}
		})
	}
}

// TestPassReaders reads everything by many goroutines while it passes.
func TestPassReaders(t *testing.T) {
	files := layerCorpus()
	files = append(files, lfile("dup", files[11].body), lfile("dup-text", files[14].body))
	c := newCache(t, 1<<30)
	l := layerOf(gzipOf(tarOf(t, files)), nil)
	p := startPass(t, l, c)
	var wg sync.WaitGroup
	for i := range files {
		f := &files[i]
		if f.Typeflag != tar.TypeReg || strings.Contains(f.Name, ".wh.") {
			continue
		}
		wg.Go(func() {
			id := p.lookup(t, f.Name)
			for off := 0; off < len(f.body); off += 100_000 {
				buf := make([]byte, 100_000)
				n, err := p.ReadAt(context.Background(), id, buf, int64(off))
				if err != nil || !bytes.Equal(buf[:n], f.body[off:min(off+len(buf), len(f.body))]) {
					t.Errorf("%q at %d: %d, %v", f.Name, off, n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := p.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// TestPassShares reads a content once, whichever layer has it.
func TestPassShares(t *testing.T) {
	c := newCache(t, 1<<30)
	big := layerNoise(8, 3<<20)
	one := load(t, layerOf(gzipOf(tarOf(t, []layerFile{lfile("a", layerText(1, 9000)), lfile("b", big)})), nil), c, ReaderOptions{})
	before := one.pack.Stored()
	two := load(t, layerOf(zstdOf(tarOf(t, []layerFile{lfile("x", big), lfile("y", layerText(1, 9000)), lfile("z", layerText(2, 100))})), nil), c, ReaderOptions{})
	if n := two.pack.Stored(); n >= 1<<20 {
		t.Errorf("the second layer keeps %d bytes, the first %d", n, before)
	}
	two.blob.reset()
	if got := two.read("x", 1<<20, 5000, t); !bytes.Equal(got, big[1<<20:][:5000]) {
		t.Error("wrong bytes")
	}
	if req, _ := two.blob.counts(); req != 0 {
		t.Errorf("%d requests for what another layer has", req)
	}
}

// TestPassReadsShared reads, while it passes, a content that another pack has, and
// one that it has not any more.
func TestPassReadsShared(t *testing.T) {
	c := newCache(t, 1<<30)
	big := layerNoise(8, 3<<20)
	one := load(t, layerOf(gzipOf(tarOf(t, []layerFile{lfile("a", layerText(1, 9000)), lfile("b", big)})), nil), c, ReaderOptions{})
	blob := gzipOf(tarOf(t, []layerFile{lfile("x", big), lfile("y", layerText(1, 9000)), lfile("z", layerNoise(2, 3<<20))}))
	l := layerOf(blob, nil)
	m := l.Blob.(*memBlob)
	m.limit, m.open = int64(len(blob))*7/10, make(chan struct{})
	p := startPass(t, l, c)
	id := p.lookup(t, "z") // so x and y have passed
	buf := make([]byte, 5000)
	for path, want := range map[string][]byte{"x": big[1<<20:], "y": layerText(1, 9000)[2000:]} {
		off := map[string]int64{"x": 1 << 20, "y": 2000}[path]
		if n, err := p.ReadAt(context.Background(), p.lookup(t, path), buf, off); err != nil || !bytes.Equal(buf[:n], want[:5000]) {
			t.Errorf("%s: %d, %v", path, n, err)
		}
	}
	if err := one.pack.Drop(0, one.idx.Stats().Chunks); err != nil {
		t.Fatal(err)
	}
	close(m.open)
	if _, err := p.ReadAt(context.Background(), p.lookup(t, "x"), buf, 0); !errors.Is(err, ErrNotKept) {
		t.Errorf("what is gone: %v, want ErrNotKept", err)
	}
	if n, err := p.ReadAt(context.Background(), id, buf, 0); err != nil || n != len(buf) {
		t.Errorf("z: %d, %v", n, err)
	}
}

func TestPassFails(t *testing.T) {
	raw := tarOf(t, layerCorpus())
	gz := gzipOf(raw)
	flip := func(b []byte, at int) []byte {
		b = bytes.Clone(b)
		b[at] ^= 1
		return b
	}
	same := func(blob, data []byte) Layer { // the descriptor is that of data
		l := layerOf(data, nil)
		l.Blob = &memBlob{data: blob}
		return l
	}
	withDiff := layerOf(gz, nil)
	withDiff.DiffID = shaOf([]byte("another"))
	short := layerOf(gz, nil)
	short.Blob = &shortBlob{memBlob{data: gz[:len(gz)-100]}, int64(len(gz))}
	oldDigest := layerOf(raw, nil)
	oldDigest.Desc.Digest = v1.Hash{Algorithm: "sha512", Hex: strings.Repeat("0", 128)}
	for _, tc := range []struct {
		name string
		l    Layer
		want error
	}{
		{"corrupt", same(flip(gz, len(gz)/2), gz), ErrDigest},
		{"corrupt tar", same(flip(raw, 700), raw), ErrDigest},
		{"truncated", short, ErrDigest},
		{"longer", same(append(bytes.Clone(gz), 0), gz), ErrDigest},
		{"wrong diffID", withDiff, ErrDigest},
		{"truncated gzip", layerOf(gz[:len(gz)-100], nil), ErrNotImage},
		{"garbage after gzip", layerOf(append(bytes.Clone(gz), "garbage"...), nil), ErrNotImage},
		{"garbage after zstd", layerOf(append(zstdOf(raw), "garbage"...), nil), ErrNotImage},
		{"truncated zstd", layerOf(zstdOf(raw)[:5000], nil), ErrNotImage},
		{"truncated tar", layerOf(raw[:5000], nil), ErrNotImage},
		{"garbage", layerOf(layerNoise(1, 5000), nil), ErrNotImage},
		{"gzip of garbage", layerOf(gzipOf(layerNoise(1, 5000)), nil), ErrNotImage},
		{"name with ..", layerOf(gzipOf(tarOf(t, []layerFile{lfile("../x", nil)})), nil), iofs.ErrInvalid},
		{"bomb", layerOf(gzipOf(zstdOf(make([]byte, 300<<20))), nil), ErrNotImage},
		{"zstd bomb", layerOf(zstdOf(make([]byte, 300<<20)), nil), ErrNotImage},
		{"zstd bomb in tar", layerOf(zstdOf(tarOf(t, []layerFile{lfile("x", make([]byte, 300<<20))})), nil), ErrNotImage},
		{"sparse bomb", layerOf(gzipOf(sparseTar("x", 64<<30, nil)), nil), ErrNotImage},
		{"unknown type", layerOf(tarOf(t, []layerFile{{Header: tar.Header{Name: "x", Typeflag: 'Q'}}}), nil), ErrNotImage},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCache(t, 1<<30)
			p := startPass(t, tc.l, c)
			err := p.Wait(context.Background())
			if !errors.Is(err, tc.want) {
				t.Fatalf("error %v, want %v", err, tc.want)
			}
			if p.b.Err() == nil || p.b.Done() {
				t.Error("the builder has not failed")
			}
			if n := p.pack.Stored(); n != 0 {
				t.Errorf("%d bytes are kept", n)
			}
			if _, err := p.ReadAt(context.Background(), unionfs.FileID(0), make([]byte, 1), 0); err == nil {
				t.Error("a read after the failure succeeded")
			}
		})
	}
	p := StartPass(oldDigest, mustBuilder(t), nil2pack(t), newCache(t, 0))
	if err := p.Wait(context.Background()); !errors.Is(err, ErrNotImage) {
		t.Errorf("sha512: %v", err)
	}
}

func mustBuilder(tb testing.TB) *unionfs.Builder {
	b, err := unionfs.NewBuilder(tb.TempDir())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { b.Close() })
	return b
}

func nil2pack(tb testing.TB) *cache.Pack {
	pack, err := newCache(tb, 0).Pack(shaOf(nil))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { pack.Close() })
	return pack
}

// shortBlob says that it is longer than it is.
type shortBlob struct {
	memBlob
	size int64
}

func (b *shortBlob) Size() int64 { return b.size }

func (b *shortBlob) Stream(ctx context.Context, p Priority, off int64) (io.ReadCloser, error) {
	return &memBody{b: &b.memBlob, ctx: ctx, off: off, end: int64(len(b.data))}, nil
}

// sparseTar is an archive of one GNU sparse file (PAX, version 1.0) of the given
// size, with data at its middle.
func sparseTar(name string, size int64, data []byte) []byte {
	at := size / 2 / 512 * 512
	sparse := fmt.Sprintf("1\n%d\n%d\n", at, len(data))
	body := make([]byte, 512)
	copy(body, sparse)
	body = append(body, data...)
	recs := ""
	for _, kv := range [][2]string{
		{"GNU.sparse.major", "1"}, {"GNU.sparse.minor", "0"}, {"GNU.sparse.name", name},
		{"GNU.sparse.realsize", fmt.Sprint(size)},
	} {
		recs += paxRecord(kv[0], kv[1])
	}
	var out []byte
	out = append(out, ustar("PaxHeaders/"+name, 'x', int64(len(recs)))...)
	out = append(out, padBlock([]byte(recs))...)
	out = append(out, ustar("GNUSparseFile.0/"+name, '0', int64(len(body)))...)
	return append(out, padBlock(body)...)
}

func padBlock(b []byte) []byte { return append(b, make([]byte, (512-len(b)%512)%512)...) }

func paxRecord(k, v string) string {
	n := len(k) + len(v) + 3
	for len(fmt.Sprint(n))+len(k)+len(v)+3 != n {
		n = len(fmt.Sprint(n)) + len(k) + len(v) + 3
	}
	return fmt.Sprintf("%d %s=%s\n", n, k, v)
}

func ustar(name string, typ byte, size int64) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x0014524770400\x00", size))
	copy(b[148:], "        ")
	b[156] = typ
	copy(b[257:], "ustar\x0000")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

func TestSparse(t *testing.T) {
	data := layerNoise(6, 70_000)
	const size = 20 << 20
	want := make([]byte, size)
	copy(want[size/2:], data)
	small := append(make([]byte, 4096), data[:512]...)
	raw := append(sparseTar("var/log/lastlog", size, data), sparseTar("small", 8192, data[:512])...)
	raw = append(raw, tarOf(t, []layerFile{lfile("after", layerText(1, 5000))})...)
	for name, blob := range map[string][]byte{"gzip": gzipOf(raw), "zstd": zstdOf(raw), "tar": raw} {
		t.Run(name, func(t *testing.T) {
			l := layerOf(blob, nil)
			ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
			if n := ld.pack.Stored(); n > 4<<20 {
				t.Errorf("%d bytes are kept of a file of %d", n, len(data))
			}
			for range 2 {
				if got := ld.read("var/log/lastlog", 0, size, t); !bytes.Equal(got, want) {
					t.Errorf("wrong bytes, the first at %d", firstDiff(got, want))
				}
				if got := ld.read("after", 0, 5000, t); !bytes.Equal(got, layerText(1, 5000)) {
					t.Error("wrong bytes after it")
				}
				if got := ld.read("small", 0, len(small), t); !bytes.Equal(got, small) {
					t.Error("wrong bytes of a small one")
				}
				if err := ld.pack.Drop(0, ld.idx.Stats().Chunks); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestPassFull streams a layer into a cache that cannot hold it.
func TestPassFull(t *testing.T) {
	files := layerCorpus()
	l := layerOf(gzipOf(tarOf(t, files)), nil)
	c := newCache(t, 2<<20)
	p := startPass(t, l, c)
	if err := p.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
	if p.Kept() == nil {
		t.Error("everything was kept")
	}
	if _, err := p.ReadAt(context.Background(), p.lookup(t, "lib/implicit/big"), make([]byte, 10), 0); !errors.Is(err, ErrNotKept) {
		t.Errorf("ReadAt = %v, want ErrNotKept", err)
	}
}

func TestPassClose(t *testing.T) {
	l := layerOf(gzipOf(tarOf(t, layerCorpus())), nil)
	m := l.Blob.(*memBlob)
	m.limit, m.open = 1<<20, make(chan struct{})
	p := startPass(t, l, newCache(t, 1<<30))
	p.lookup(t, "etc/passwd")
	p.Close()
	if err := p.Err(); !errors.Is(err, context.Canceled) {
		t.Errorf("Err() = %v", err)
	}
	if p.pack.Stored() != 0 {
		t.Error("bytes are kept")
	}
}

// firstDiff is where a and b begin to differ.
func firstDiff(a, b []byte) int {
	for i := range a {
		if i >= len(b) || a[i] != b[i] {
			return i
		}
	}
	return len(a)
}
