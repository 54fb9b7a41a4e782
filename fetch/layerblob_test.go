package fetch

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// memBlob is a blob in memory that counts what is asked of it.
type memBlob struct {
	data []byte

	mu       sync.Mutex
	requests int
	bytes    int64
	streams  int
	limit    int64         // reads of bytes from here on wait for open
	open     chan struct{} // nil: nothing waits
	damage   func(off int64, p []byte)
	noRanges bool
}

func (b *memBlob) Size() int64 { return int64(len(b.data)) }

func (b *memBlob) NoRanges() bool { return b.noRanges }

func (b *memBlob) counts() (requests int, bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.requests, b.bytes
}

func (b *memBlob) reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.requests, b.bytes, b.streams = 0, 0, 0
}

func (b *memBlob) Range(ctx context.Context, p Priority, off, n int64) (io.ReadCloser, error) {
	if off < 0 || n < 0 || off+n > b.Size() {
		return nil, fmt.Errorf("range %d+%d of %d", off, n, b.Size())
	}
	tellTurn(ctx, true)
	b.mu.Lock()
	b.requests++
	b.mu.Unlock()
	return &memBody{b: b, ctx: ctx, off: off, end: off + n}, nil
}

func (b *memBlob) Stream(ctx context.Context, p Priority, off int64) (io.ReadCloser, error) {
	b.mu.Lock()
	b.requests++
	b.streams++
	b.mu.Unlock()
	return &memBody{b: b, ctx: ctx, off: off, end: b.Size()}, nil
}

type memBody struct {
	b        *memBlob
	ctx      context.Context
	off, end int64
}

func (r *memBody) Close() error { return nil }

func (r *memBody) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	if r.off == r.end {
		return 0, io.EOF
	}
	r.b.mu.Lock()
	open, limit, damage := r.b.open, r.b.limit, r.b.damage
	r.b.mu.Unlock()
	end := r.end
	if open != nil {
		if r.off >= limit {
			select {
			case <-open:
			case <-r.ctx.Done():
				return 0, r.ctx.Err()
			}
		} else {
			end = min(end, limit)
		}
	}
	n := copy(p, r.b.data[r.off:end])
	if damage != nil {
		damage(r.off, p[:n])
	}
	r.b.mu.Lock()
	r.b.bytes += int64(n)
	r.b.mu.Unlock()
	r.off += int64(n)
	return n, nil
}

// layerFile is an entry of a layer that a test makes.
type layerFile struct {
	tar.Header
	body []byte
}

var layerTime = time.Unix(1700000000, 0).UTC()

func ldir(name string) layerFile {
	return layerFile{Header: tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755, ModTime: layerTime}}
}

func lfile(name string, body []byte) layerFile {
	return layerFile{Header: tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(body)), ModTime: layerTime}, body: body}
}

func llink(typ byte, name, target string) layerFile {
	return layerFile{Header: tar.Header{Name: name, Typeflag: typ, Linkname: target, Mode: 0o777, ModTime: layerTime}}
}

// noise is n bytes that do not compress, the same for the same seed.
func layerNoise(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b
}

// text is n bytes that compress.
func layerText(seed, n int) []byte {
	b := make([]byte, 0, n+32)
	for i := 0; len(b) < n; i++ {
		b = fmt.Appendf(b, "line %d of text %d\n", i, seed)
	}
	return b[:n]
}

// corpus has every kind of entry that all formats can carry.
func layerCorpus() []layerFile {
	dev := layerFile{Header: tar.Header{Name: "dev/null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3, ModTime: layerTime}}
	fifo := layerFile{Header: tar.Header{Name: "dev/fifo", Typeflag: tar.TypeFifo, Mode: 0o600, ModTime: layerTime}}
	attr := lfile("bin/ping", layerText(4, 3000))
	attr.Mode, attr.Uid, attr.Gid = 0o4755, 10, 20
	attr.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20"}
	big := layerNoise(5, 9<<20+123)
	all := []layerFile{
		ldir("etc/"), lfile("etc/os-release", layerText(1, 400)), lfile("etc/passwd", layerText(2, 1200)), lfile("etc/empty", nil),
		ldir("bin/"), attr, llink(tar.TypeSymlink, "bin/sh", "ping"), llink(tar.TypeLink, "bin/pong", "bin/ping"),
		ldir("dev/"), dev, fifo,
		lfile("lib/implicit/big", big), lfile("lib/same", layerText(1, 400)), lfile("lib/zeros", make([]byte, 5<<20)),
		lfile("lib/text", layerText(7, 6<<20)), lfile("etc/.wh.gone", nil), lfile("lib/.wh..wh..opq", nil),
	}
	for i := range 60 {
		all = append(all, lfile(fmt.Sprintf("share/doc/%03d", i), layerText(100+i, 500+i*37)))
	}
	return append(all, lfile("last", layerNoise(9, 100)))
}

func tarOf(tb testing.TB, files []layerFile) []byte {
	tb.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range files {
		if err := tw.WriteHeader(&f.Header); err != nil {
			tb.Fatal(err)
		}
		if _, err := tw.Write(f.body); err != nil {
			tb.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

func gzipOf(data []byte) []byte {
	var buf bytes.Buffer
	w, _ := gzip.NewWriterLevel(&buf, 1)
	w.Write(data)
	w.Close()
	return buf.Bytes()
}

func zstdOf(data []byte) []byte {
	w, _ := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	defer w.Close()
	return w.EncodeAll(data, nil)
}

// skippable is a zstd frame that decoders pass over.
func skippable(data []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 0x184D2A50)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func shaOf(data []byte) v1.Hash {
	sum := sha256.Sum256(data)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
}

// layerOf is a layer with the given stored bytes.
func layerOf(blob []byte, ann map[string]string) Layer {
	return Layer{
		Blob: &memBlob{data: blob},
		Desc: v1.Descriptor{Digest: shaOf(blob), Size: int64(len(blob)), Annotations: ann},
	}
}

// estargzOf builds an eStargz layer.
func estargzOf(tb testing.TB, raw []byte, opts ...estargz.Option) Layer {
	tb.Helper()
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(raw), 0, int64(len(raw))),
		append([]estargz.Option{estargz.WithCompressionLevel(1)}, opts...)...)
	if err != nil {
		tb.Fatal(err)
	}
	defer b.Close()
	data, err := io.ReadAll(b)
	if err != nil {
		tb.Fatal(err)
	}
	l := layerOf(data, map[string]string{tocDigest: b.TOCDigest().String()})
	if err := l.DiffID.UnmarshalText([]byte(b.DiffID().String())); err != nil {
		tb.Fatal(err)
	}
	return l
}

// zstdEntry is an entry of a zstd:chunked table, as tests write it.
type zstdEntry map[string]any

// zstdChunkedOf builds a zstd:chunked layer with chunks of the given size; edit
// may change the table.
func zstdChunkedOf(tb testing.TB, files []layerFile, chunk int, edit func([]zstdEntry) []zstdEntry) Layer {
	tb.Helper()
	var blob, raw, all bytes.Buffer
	var toc []zstdEntry
	cut := func() int64 {
		if raw.Len() > 0 {
			all.Write(raw.Bytes())
			blob.Write(zstdOf(raw.Bytes()))
			raw.Reset()
		}
		return int64(blob.Len())
	}
	names := map[byte]string{tar.TypeDir: "dir", tar.TypeReg: "reg", tar.TypeSymlink: "symlink", tar.TypeLink: "hardlink", tar.TypeChar: "char", tar.TypeFifo: "fifo"}
	tw := tar.NewWriter(&raw)
	for i := range files {
		f := &files[i]
		if err := tw.WriteHeader(&f.Header); err != nil {
			tb.Fatal(err)
		}
		e := zstdEntry{"type": names[f.Typeflag], "name": f.Name, "mode": f.Mode, "size": f.Size, "uid": f.Uid, "gid": f.Gid,
			"modtime": f.ModTime.Format(time.RFC3339Nano), "linkName": f.Linkname, "devMajor": f.Devmajor, "devMinor": f.Devminor}
		for k, v := range f.PAXRecords {
			e["xattrs"] = map[string]string{strings.TrimPrefix(k, paxXattr): base64.StdEncoding.EncodeToString([]byte(v))}
		}
		toc = append(toc, e)
		if f.Typeflag != tar.TypeReg {
			continue
		}
		e["digest"] = shaOf(f.body).String()
		if len(f.body) == 0 {
			continue
		}
		off := cut()
		for at := 0; at < len(f.body); at += chunk {
			piece := f.body[at:min(at+chunk, len(f.body))]
			tw.Write(piece)
			c := e
			if at > 0 {
				c = zstdEntry{"type": "chunk", "name": f.Name, "chunkOffset": at}
				toc = append(toc, c)
			}
			c["offset"] = off
			if len(f.body) > chunk {
				c["chunkSize"], c["chunkDigest"] = len(piece), shaOf(piece).String()
				if allZero(piece) {
					c["chunkType"] = "zeros"
				}
			}
			off = cut()
		}
		e["endOffset"] = off
	}
	tw.Close()
	cut()
	if edit != nil {
		toc = edit(toc)
	}
	doc, err := json.Marshal(map[string]any{"version": 1, "entries": toc})
	if err != nil {
		tb.Fatal(err)
	}
	l := zstdChunkedLayer(blob.Bytes(), doc)
	l.DiffID = shaOf(all.Bytes())
	return l
}

// zstdChunkedLayer appends a table to frames.
func zstdChunkedLayer(frames, doc []byte) Layer {
	table := zstdOf(doc)
	pos := len(frames) + 8
	blob := append(append([]byte(nil), frames...), skippable(table)...)
	blob = append(blob, skippable([]byte("footer"))...)
	return layerOf(blob, map[string]string{
		zstdPosition: fmt.Sprintf("%d:%d:%d:1", pos, len(table), len(doc)),
		zstdChecksum: shaOf(table).String(),
	})
}
