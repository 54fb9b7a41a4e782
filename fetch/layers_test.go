package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-cmp/cmp"
	ggcrname "github.com/google/go-containerregistry/pkg/name"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// loaded is a layer that a test has indexed.
type loaded struct {
	idx    *unionfs.Index
	pack   *cache.Pack
	reader *Reader
	format Format
	why    string
	blob   *memBlob
}

func newCache(tb testing.TB, size int64) *cache.Cache {
	tb.Helper()
	c, err := cache.Open(tb.TempDir(), cache.Options{Size: size})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

// load indexes l in c, by its table of contents or by a pass.
func load(tb testing.TB, l Layer, c *cache.Cache, o ReaderOptions) *loaded {
	tb.Helper()
	ld, err := tryLoad(tb, l, c, o)
	if err != nil {
		tb.Fatal(err)
	}
	return ld
}

func tryLoad(tb testing.TB, l Layer, c *cache.Cache, o ReaderOptions) (*loaded, error) {
	tb.Helper()
	ctx := context.Background()
	b, err := unionfs.NewBuilder(c.TempDir())
	if err != nil {
		return nil, err
	}
	defer func() { b.Close() }()
	ld := &loaded{}
	ld.blob, _ = l.Blob.(*memBlob)
	toc, err := Index(ctx, l, b)
	if err != nil {
		return nil, err
	}
	ld.format, ld.why = toc.Format, toc.Why
	if ld.pack, err = c.Pack(l.Desc.Digest); err != nil {
		return nil, err
	}
	tb.Cleanup(func() { ld.pack.Close() })
	if ld.format == 0 {
		b.Close()
		if b, err = unionfs.NewBuilder(c.TempDir()); err != nil {
			return nil, err
		}
		p := StartPass(l, b, ld.pack, c)
		defer p.Close()
		if err := p.Wait(ctx); err != nil {
			return nil, err
		}
		ld.format = p.Format()
	}
	return ld, ld.install(tb, l, b, c, o)
}

func (ld *loaded) install(tb testing.TB, l Layer, b *unionfs.Builder, c *cache.Cache, o ReaderOptions) error {
	err := c.Install(cache.Index, l.Desc.Digest, func(f *os.File) error {
		return b.Write(f, unionfs.Meta{BlobSize: l.Desc.Size, Format: uint8(ld.format)})
	})
	if err != nil {
		return err
	}
	if ld.idx, err = unionfs.Open(c.Path(cache.Index, l.Desc.Digest)); err != nil {
		return err
	}
	tb.Cleanup(func() { ld.idx.Close() })
	ld.reader = NewReader(l, ld.idx, ld.pack, c, o)
	tb.Cleanup(func() { ld.reader.Close() })
	return nil
}

// find returns the inode of a path.
func (ld *loaded) find(tb testing.TB, path string) unionfs.ID {
	tb.Helper()
	id := unionfs.RootID
	for name := range strings.SplitSeq(path, "/") {
		c, err := ld.idx.Lookup(id, name)
		if err != nil || c.Kind != unionfs.ChildInode {
			tb.Fatalf("Lookup(%q) = %+v, %v", path, c, err)
		}
		id = c.ID
	}
	return id
}

// read returns n bytes at off of a path.
func (ld *loaded) read(path string, off int64, n int, tb testing.TB) []byte {
	tb.Helper()
	b := make([]byte, n)
	m, err := ld.reader.ReadAt(context.Background(), ld.find(tb, path), b, off)
	if err != nil {
		tb.Fatalf("ReadAt(%q, %d, %d): %v", path, off, n, err)
	}
	return b[:m]
}

// dump describes the whole index, a line for each name.
func (ld *loaded) dump(tb testing.TB) []string {
	tb.Helper()
	var out []string
	var walk func(dir unionfs.ID, path string)
	walk = func(dir unionfs.ID, path string) {
		first, n, err := ld.idx.Children(dir)
		if err != nil {
			tb.Fatal(err)
		}
		opaque, _ := ld.idx.Opaque(dir)
		out = append(out, fmt.Sprintf("%s/ opaque %v", path, opaque))
		for i := range n {
			name, c, err := ld.idx.ChildAt(first + i)
			if err != nil {
				tb.Fatal(err)
			}
			full := path + "/" + name
			if c.Kind != unionfs.ChildInode {
				out = append(out, fmt.Sprintf("%s kind %d %s", full, c.Kind, c.Target))
				continue
			}
			out = append(out, full+" "+ld.describe(tb, c.ID))
			if c.ID.IsDir() {
				walk(c.ID, full)
			}
		}
	}
	walk(unionfs.RootID, "")
	sort.Strings(out)
	return out
}

func (ld *loaded) describe(tb testing.TB, id unionfs.ID) string {
	tb.Helper()
	var a unionfs.Attr
	if err := ld.idx.Attr(id, &a); err != nil {
		tb.Fatal(err)
	}
	s := fmt.Sprintf("%+v", a)
	names, err := ld.idx.XattrNames(id)
	if err != nil {
		tb.Fatal(err)
	}
	for _, n := range names {
		v, _, _ := ld.idx.Xattr(id, n)
		s += fmt.Sprintf(" %s=%x", n, v)
	}
	switch a.Mode & 0o170000 {
	case 0o120000:
		target, err := ld.idx.Readlink(id)
		if err != nil {
			tb.Fatal(err)
		}
		s += " -> " + target
	case 0o100000:
		ci, err := ld.idx.Content(id)
		if err != nil {
			tb.Fatal(err)
		}
		data := make([]byte, a.Size+1)
		n, err := ld.reader.ReadAt(context.Background(), id, data, 0)
		if err != nil || int64(n) != a.Size {
			tb.Fatalf("ReadAt(%s) = %d, %v", s, n, err)
		}
		if sum := sha256.Sum256(data[:n]); sum != ci.Digest {
			tb.Fatalf("content is %x, the index says %x", sum, ci.Digest)
		}
		s += fmt.Sprintf(" %x", ci.Digest[:8])
	}
	return s
}

// allFormats are the layers of one archive in every format.
func allFormats(tb testing.TB, files []layerFile) map[string]Layer {
	raw := tarOf(tb, files)
	half := len(raw) / 2
	inner := estargzOf(tb, raw, estargz.WithChunkSize(1<<20), estargz.WithMinChunkSize(64<<10))
	bare := estargzOf(tb, raw)
	bare.Desc.Annotations = nil
	return map[string]Layer{
		"estargz":        estargzOf(tb, raw, estargz.WithChunkSize(1<<20)),
		"estargz-inner":  inner,
		"estargz-prio":   estargzOf(tb, raw, estargz.WithPrioritizedFiles([]string{"etc/passwd", "etc/os-release"})),
		"estargz-plain":  bare,
		"zstdchunked":    zstdChunkedOf(tb, files, 300_000, nil),
		"gzip":           layerOf(gzipOf(raw), nil),
		"gzip-members":   layerOf(append(gzipOf(raw[:half]), gzipOf(raw[half:])...), nil),
		"zstd":           layerOf(zstdOf(raw), nil),
		"zstd-frames":    layerOf(bytes.Join([][]byte{skippable([]byte("x")), zstdOf(raw[:half]), skippable(nil), zstdOf(raw[half:])}, nil), nil),
		"tar":            layerOf(raw, nil),
		"tar-no-trailer": layerOf(raw[:len(raw)-1024], nil),
	}
}

var formatOf = map[string]Format{
	"estargz": FormatEstargz, "estargz-inner": FormatEstargz, "estargz-prio": FormatEstargz, "estargz-plain": FormatGzip,
	"zstdchunked": FormatZstdChunked, "gzip": FormatGzip, "gzip-members": FormatGzip, "zstd": FormatZstd,
	"zstd-frames": FormatZstd, "tar": FormatTar, "tar-no-trailer": FormatTar,
}

func TestFormatsAgree(t *testing.T) {
	files := layerCorpus()
	layers := allFormats(t, files)
	want := load(t, layers["tar"], newCache(t, 1<<30), ReaderOptions{}).dump(t)
	if n := len(want); n < 80 {
		t.Fatalf("the corpus has %d names", n)
	}
	for name, l := range layers {
		for _, strict := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/strict=%v", name, strict), func(t *testing.T) {
				ld := load(t, l, newCache(t, 1<<30), ReaderOptions{Strict: strict})
				if ld.format != formatOf[name] {
					t.Errorf("format %v, want %v (%s)", ld.format, formatOf[name], ld.why)
				}
				if diff := cmp.Diff(want, ld.dump(t)); diff != "" {
					t.Errorf("-tar +%s\n%s", name, diff)
				}
				req, _ := ld.blob.counts()
				ld.dump(t)
				if again, _ := ld.blob.counts(); again != req {
					t.Errorf("%d requests for what had been read", again-req)
				}
			})
		}
	}
}

func TestRandomRanges(t *testing.T) {
	files := layerCorpus()
	for name, l := range allFormats(t, files) {
		t.Run(name, func(t *testing.T) {
			// A cache that keeps nearly nothing, so that everything is fetched again.
			for _, size := range []int64{1 << 30, 3 << 20} {
				ld := load(t, l, newCache(t, size), ReaderOptions{})
				rnd := rand.New(rand.NewPCG(3, 4))
				for range 40 {
					f := &files[rnd.IntN(len(files))]
					if len(f.body) == 0 {
						continue
					}
					off := rnd.Int64N(int64(len(f.body)) + 10)
					n := 1 + rnd.IntN(300_000)
					want := []byte{}
					if off < int64(len(f.body)) {
						want = f.body[off:min(int(off)+n, len(f.body))]
					}
					if got := ld.read(f.Name, off, n, t); !bytes.Equal(got, want) {
						t.Fatalf("cache of %d: %q at %d: %d bytes differ from the %d that are there", size, f.Name, off, len(got), len(want))
					}
				}
			}
		})
	}
}

func TestIndexCounts(t *testing.T) {
	files := layerCorpus()
	l := estargzOf(t, tarOf(t, files))
	ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
	req, n := ld.blob.counts()
	if req != 1 || n > maxTOCGuess {
		t.Errorf("eStargz index: %d requests, %d bytes, want 1, at most %d", req, n, maxTOCGuess)
	}
	ld.blob.reset()
	ld.read("etc/os-release", 0, 4096, t)
	ld.read("etc/passwd", 0, 4096, t)
	if req, n := ld.blob.counts(); req != 1 || n > 256<<10 {
		t.Errorf("two neighbours: %d requests, %d bytes, want 1, at most 256 KiB", req, n)
	}

	many := []layerFile{}
	for i := range 20_000 {
		many = append(many, lfile(fmt.Sprintf("d%02d/f%05d", i%50, i), layerNoise(uint64(i), 8+i%16)))
	}
	l = estargzOf(t, tarOf(t, many))
	ld = load(t, l, newCache(t, 1<<30), ReaderOptions{})
	if req, _ := ld.blob.counts(); req != 2 {
		t.Errorf("a large eStargz table: %d requests, want 2", req)
	}
	zl := zstdChunkedOf(t, layerCorpus(), 64<<10, nil)
	ld = load(t, zl, newCache(t, 1<<30), ReaderOptions{})
	if req, n := ld.blob.counts(); req != 1 || n > 64<<10 {
		t.Errorf("zstd:chunked index: %d requests, %d bytes, want 1", req, n)
	}
}

func TestMiddleOfLargeFile(t *testing.T) {
	body := layerNoise(1, 40<<20)
	files := []layerFile{lfile("a", layerText(1, 1000)), lfile("big", body), lfile("z", layerText(2, 1000))}
	raw := tarOf(t, files)
	for name, l := range map[string]Layer{
		"estargz": estargzOf(t, raw), "zstdchunked": zstdChunkedOf(t, files, 1<<20, nil),
	} {
		ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
		got := ld.read("big", 20<<20+5000, 4096, t)
		if !bytes.Equal(got, body[20<<20+5000:][:4096]) {
			t.Errorf("%s: wrong bytes", name)
		}
		if req, n := ld.blob.counts(); req > 3 || n > 5_000_000 {
			t.Errorf("%s: 4 KiB moved %d bytes in %d requests, want fewer than 5 MB, 3", name, n, req)
		}
		ld.blob.reset()
		for off := int64(0); off < int64(len(body)); off += 128 << 10 {
			if got := ld.read("big", off, 128<<10, t); !bytes.Equal(got, body[off:off+int64(len(got))]) {
				t.Fatalf("%s: wrong bytes at %d", name, off)
			}
		}
		if req, n := ld.blob.counts(); req > 20 || n > int64(len(body))+1<<20 {
			t.Errorf("%s: 40 MiB in order took %d requests and %d bytes", name, req, n)
		}
	}
}

func TestReplay(t *testing.T) {
	files := layerCorpus()
	c := newCache(t, 1<<30)
	l := layerOf(gzipOf(tarOf(t, files)), nil)
	ld := load(t, l, c, ReaderOptions{})
	if err := ld.pack.Drop(0, ld.idx.Stats().Chunks); err != nil {
		t.Fatal(err)
	}
	ld.blob.reset()
	want := ld.find(t, "lib/text")
	done := make(chan error, 8)
	for i := range 8 {
		go func() {
			b := make([]byte, 64<<10)
			_, err := ld.reader.ReadAt(context.Background(), want, b, int64(i)<<19)
			done <- err
		}()
	}
	for range 8 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if ld.blob.streams > 3 {
		t.Errorf("8 readers made %d streams", ld.blob.streams)
	}
	ld.dump(t)
	ld.blob.reset()
	ld.dump(t)
	if req, _ := ld.blob.counts(); req != 0 {
		t.Errorf("after the replay %d requests", req)
	}
}

func TestNoRanges(t *testing.T) {
	files := layerCorpus()
	l := estargzOf(t, tarOf(t, files))
	ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
	ld.blob.noRanges = true
	ld.blob.reset()
	if got := ld.read("last", 0, 200, t); !bytes.Equal(got, files[len(files)-1].body) {
		t.Error("wrong bytes")
	}
	ld.dump(t)
	if ld.blob.streams != ld.blob.requests || ld.blob.streams > 3 {
		t.Errorf("%d requests, %d streams, want at most 3 streams", ld.blob.requests, ld.blob.streams)
	}
}

// TestReaderDamage has the registry give wrong bytes: once they are asked for
// again, for ever they are an error, and they are never kept.
func TestReaderDamage(t *testing.T) {
	files := layerCorpus()
	body := files[1].body
	for _, forEver := range []bool{false, true} {
		l := estargzOf(t, tarOf(t, files))
		ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
		id := ld.find(t, "etc/os-release")
		times := 0
		ld.blob.damage = func(off int64, p []byte) {
			if off == 0 || times == 0 || forEver {
				for i := range p {
					p[i] ^= 0x55
				}
			}
			times++
			if !forEver {
				ld.blob.damage = nil
			}
		}
		b := make([]byte, 4096)
		n, err := ld.reader.ReadAt(context.Background(), id, b, 0)
		if forEver {
			if !isErr(err, ErrDigest) {
				t.Errorf("damaged for ever: %v, want ErrDigest", err)
			}
			// The kernel asks again at once for a part of what has failed: no request.
			asked := ld.blob.requests
			if _, again := ld.reader.ReadAt(context.Background(), id, b[:512], 0); again != err || ld.blob.requests != asked {
				t.Errorf("asked again at once: %v, %d requests; want the same error and %d requests", again, ld.blob.requests, asked)
			}
			time.Sleep(failureTTL)
			ld.blob.mu.Lock()
			ld.blob.damage = nil
			ld.blob.mu.Unlock()
			n, err = ld.reader.ReadAt(context.Background(), id, b, 0)
		}
		if err != nil || !bytes.Equal(b[:n], body) {
			t.Errorf("for ever %v: then %d bytes, %v", forEver, n, err)
		}
	}
}

func TestReaderClose(t *testing.T) {
	l := estargzOf(t, tarOf(t, layerCorpus()))
	ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
	id := ld.find(t, "etc/os-release")
	ld.blob.mu.Lock()
	ld.blob.open = make(chan struct{})
	ld.blob.mu.Unlock()
	done := make(chan error, 1)
	go func() {
		_, err := ld.reader.ReadAt(context.Background(), id, make([]byte, 10), 0)
		done <- err
	}()
	for {
		if req, _ := ld.blob.counts(); req > 1 {
			break
		}
	}
	ld.reader.Close()
	if err := <-done; err == nil {
		t.Error("a read of a closed reader succeeded")
	}
}

func isErr(err, kind error) bool { return errors.Is(err, kind) }

// TestStrict damages the pack on disk: a strict reader notices and fetches again.
func TestStrict(t *testing.T) {
	files := layerCorpus()
	raw := tarOf(t, files)
	for name, l := range map[string]Layer{"estargz": estargzOf(t, raw), "gzip": layerOf(gzipOf(raw), nil)} {
		c := newCache(t, 1<<30)
		ld := load(t, l, c, ReaderOptions{Strict: true})
		ld.read("etc/passwd", 0, 4096, t)
		path := filepath.Join(filepath.Dir(c.CatalogPath()), "packs", l.Desc.Digest.Hex+".pack")
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		ci, err := ld.idx.Content(ld.find(t, "etc/passwd"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("damage"), ci.PackOff+10); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if got := ld.read("etc/passwd", 0, 4096, t); !bytes.Equal(got, files[2].body) {
			t.Errorf("%s: damaged bytes were given", name)
		}
		ld.blob.reset()
		ld.read("etc/passwd", 0, 4096, t)
		if req, _ := ld.blob.counts(); req != 0 {
			t.Errorf("%s: %d requests after it was mended", name, req)
		}
	}
}

// TestUnkept reads from a cache that keeps nothing: everything comes, from memory.
func TestUnkept(t *testing.T) {
	files := layerCorpus()
	l := estargzOf(t, tarOf(t, files))
	ld := load(t, l, newCache(t, 1), ReaderOptions{})
	for range 2 {
		ld.blob.reset()
		if got := ld.read("etc/passwd", 0, 4096, t); !bytes.Equal(got, files[2].body) {
			t.Error("wrong bytes")
		}
		if req, _ := ld.blob.counts(); req != 1 {
			t.Errorf("%d requests, want 1", req)
		}
	}
}

// TestLayersOverHTTP reads layers through a Client.
func TestLayersOverHTTP(t *testing.T) {
	files := layerCorpus()
	layers := allFormats(t, files)
	want := load(t, layers["tar"], newCache(t, 1<<30), ReaderOptions{}).dump(t)
	for name, l := range layers {
		data := l.Blob.(*memBlob).data
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/blobs/") {
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
			}
		}))
		defer srv.Close()
		cl, err := New(Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer cl.Close()
		repo, err := ggcrname.NewRepository(strings.TrimPrefix(srv.URL, "http://") + "/r")
		if err != nil {
			t.Fatal(err)
		}
		l.Blob = cl.Blob(repo, l.Desc)
		ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
		if diff := cmp.Diff(want, ld.dump(t)); diff != "" {
			t.Errorf("-tar +%s\n%s", name, diff)
		}
		ld.reader.Close()
	}
}
