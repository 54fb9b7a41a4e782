package fetch

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	iofs "io/fs"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// eStargzLayer is a layer whose table says doc, behind payload.
func eStargzLayer(payload, doc []byte) Layer {
	var buf bytes.Buffer
	buf.Write(payload)
	zw := gzip.NewWriter(&buf)
	tw := tar.NewWriter(zw)
	tw.WriteHeader(&tar.Header{Name: estargz.TOCTarName, Typeflag: tar.TypeReg, Size: int64(len(doc))})
	tw.Write(doc)
	tw.Close()
	zw.Close()
	fw := gzipFooter(int64(len(payload)), false)
	buf.Write(fw)
	return layerOf(buf.Bytes(), map[string]string{tocDigest: shaOf(doc).String()})
}

// gzipFooter is an empty gzip member that names the place of the table.
func gzipFooter(off int64, legacy bool) []byte {
	var buf bytes.Buffer
	zw, _ := gzip.NewWriterLevel(&buf, gzip.NoCompression)
	sub := fmt.Sprintf("%016xSTARGZ", off)
	zw.Extra = []byte(sub)
	if !legacy {
		zw.Extra = append([]byte{'S', 'G', byte(len(sub)), 0}, sub...)
	}
	zw.Close()
	return buf.Bytes()
}

func tocEnt(kv ...any) map[string]any {
	m := map[string]any{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i].(string)] = kv[i+1]
	}
	return m
}

func tocDoc(tb testing.TB, entries ...map[string]any) []byte {
	doc, err := json.Marshal(map[string]any{"version": 1, "entries": entries})
	if err != nil {
		tb.Fatal(err)
	}
	return doc
}

var someDigest = shaOf([]byte("x")).String()

// reg is a regular file of one chunk.
func tocReg(name string, size, off int64, kv ...any) map[string]any {
	m := tocEnt("name", name, "type", "reg", "size", size, "offset", off, "endOffset", off+10, "digest", someDigest)
	for k, v := range tocEnt(kv...) {
		m[k] = v
	}
	return m
}

func chunkAt(chunkOff, size, off int64) map[string]any {
	return tocEnt("type", "chunk", "chunkOffset", chunkOff, "chunkSize", size, "offset", off, "chunkDigest", someDigest)
}

// TestLyingTOC gives tables that no honest writer makes. Each must make the layer
// one that is streamed (why), or be refused (err); no entry may be believed.
func TestLyingTOC(t *testing.T) {
	const big = int64(1) << 62
	lots := make([]map[string]any, 0, 5000)
	lots = append(lots, tocReg("a", 64<<30, 10, "chunkSize", 1, "chunkDigest", someDigest))
	for i := range int64(4999) {
		lots = append(lots, chunkAt(i+1, 1, 10))
	}
	for _, tc := range []struct {
		name    string
		entries []map[string]any
		err     error
	}{
		{"negative size", []map[string]any{tocReg("a", -1, 10)}, iofs.ErrInvalid},
		{"negative offset", []map[string]any{tocReg("a", 5, -10)}, nil},
		{"offset outside", []map[string]any{tocReg("a", 5, 1<<20)}, nil},
		{"offset overflows", []map[string]any{tocReg("a", 5, 1<<63-1)}, nil},
		{"size of 64 GiB in one chunk", []map[string]any{tocReg("a", 64<<30, 10)}, nil},
		{"size of 64 GiB in chunks of a byte", lots, nil},
		{"huge size", []map[string]any{tocReg("a", big+1, 10)}, iofs.ErrInvalid},
		{"chunk too large", []map[string]any{tocReg("a", maxChunk+1, 10)}, nil},
		{"chunk size negative", []map[string]any{tocReg("a", 5, 10, "chunkSize", -5)}, nil},
		{"chunk larger than the file", []map[string]any{tocReg("a", 5, 10, "chunkSize", 6, "chunkDigest", someDigest)}, nil},
		{"chunks overlap", []map[string]any{tocReg("a", 10, 10, "chunkSize", 5, "chunkDigest", someDigest), chunkAt(3, 7, 20)}, nil},
		{"chunks with a gap", []map[string]any{tocReg("a", 10, 10, "chunkSize", 4, "chunkDigest", someDigest), chunkAt(5, 5, 20)}, nil},
		{"chunks missing", []map[string]any{tocReg("a", 10, 10, "chunkSize", 4, "chunkDigest", someDigest), tocReg("b", 5, 40)}, nil},
		{"chunks too many", []map[string]any{tocReg("a", 5, 10), chunkAt(5, 5, 20)}, nil},
		{"chunk without a file", []map[string]any{chunkAt(0, 5, 10)}, nil},
		{"chunk of a directory", []map[string]any{tocEnt("name", "d", "type", "dir"), chunkAt(0, 5, 10)}, nil},
		{"frames overlap", []map[string]any{tocReg("a", 5, 30), tocReg("b", 5, 20)}, nil},
		{"same frame twice", []map[string]any{tocReg("a", 5, 10), tocReg("b", 5, 10)}, nil},
		{"inner offset negative", []map[string]any{tocReg("a", 5, 10, "innerOffset", -1)}, nil},
		{"inner offset far", []map[string]any{tocReg("a", 5, 10, "innerOffset", big)}, nil},
		{"no digest", []map[string]any{tocReg("a", 5, 10, "digest", "")}, nil},
		{"another digest", []map[string]any{tocReg("a", 5, 10, "digest", "md5:00")}, nil},
		{"unknown type", []map[string]any{tocEnt("name", "a", "type", "what")}, nil},
		{"time", []map[string]any{tocEnt("name", "a", "type", "dir", "modtime", "yesterday")}, nil},
		{"not UTF-8", []map[string]any{tocEnt("name", "a\uFFFD", "type", "dir")}, nil},
		{"name with ..", []map[string]any{tocEnt("name", "../../etc/passwd", "type", "dir")}, iofs.ErrInvalid},
		{"name with NUL", []map[string]any{tocEnt("name", "a\x00b", "type", "dir")}, iofs.ErrInvalid},
		{"long component", []map[string]any{tocEnt("name", strings.Repeat("a", 4096), "type", "dir")}, iofs.ErrInvalid},
		{"link to itself", []map[string]any{tocEnt("name", "a", "type", "hardlink", "linkName", "a")}, iofs.ErrInvalid},
		{"root is a file", []map[string]any{tocReg("/", 5, 10)}, iofs.ErrInvalid},
		{"entry of 3 MB", []map[string]any{tocEnt("name", strings.Repeat("a/", 3<<19), "type", "dir")}, nil},
	} {
		doc := tocDoc(t, tc.entries...)
		for format, l := range map[string]Layer{
			"estargz": eStargzLayer(make([]byte, 1000), doc), "zstdchunked": zstdChunkedLayer(make([]byte, 1000), doc),
		} {
			t.Run(tc.name+"/"+format, func(t *testing.T) {
				toc, err := Index(context.Background(), l, mustBuilder(t))
				switch {
				case tc.err != nil && !errors.Is(err, tc.err):
					t.Errorf("Index = %+v, %v, want error %v", toc, err, tc.err)
				case tc.err == nil && (toc.Format != 0 || toc.Why == "" || err != nil):
					t.Errorf("Index = %+v, %v, want a reason to stream", toc, err)
				}
			})
		}
	}
}

// TestBrokenTOC gives what is no table at all.
func TestBrokenTOC(t *testing.T) {
	good := tocDoc(t, tocReg("a", 5, 10))
	es := func(edit func(*Layer)) Layer {
		l := eStargzLayer(make([]byte, 1000), good)
		edit(&l)
		return l
	}
	zc := func(edit func(map[string]string)) Layer {
		l := zstdChunkedLayer(make([]byte, 1000), good)
		edit(l.Desc.Annotations)
		return l
	}
	legacy := eStargzLayer(make([]byte, 1000), good)
	m := legacy.Blob.(*memBlob)
	m.data = append(m.data[:len(m.data)-estargz.FooterSize:len(m.data)-estargz.FooterSize], gzipFooter(1000, true)...)
	for _, tc := range []struct {
		name string
		l    Layer
		ok   bool
	}{
		{"good", es(func(*Layer) {}), true},
		{"good zstd", zc(func(map[string]string) {}), true},
		{"legacy footer", legacy, true},
		{"no annotation", es(func(l *Layer) { l.Desc.Annotations = nil }), false},
		{"annotation of another", es(func(l *Layer) { l.Desc.Annotations[tocDigest] = someDigest }), false},
		{"annotation is none", es(func(l *Layer) { l.Desc.Annotations[tocDigest] = "sha256:zz" }), false},
		{"blob of 10 bytes", es(func(l *Layer) { l.Blob = &memBlob{data: make([]byte, 10)} }), false},
		{"no footer", es(func(l *Layer) { l.Blob = &memBlob{data: make([]byte, 1000)} }), false},
		{"footer outside", es(func(l *Layer) { l.Blob = &memBlob{data: append(make([]byte, 100), gzipFooter(1<<40, false)...)} }), false},
		{"footer negative", es(func(l *Layer) { l.Blob = &memBlob{data: append(make([]byte, 100), gzipFooter(-1, false)...)} }), false},
		{"JSON of a list", eStargzLayer(nil, []byte(`[]`)), false},
		{"JSON without entries", eStargzLayer(nil, []byte(`{"version":1}`)), false},
		{"JSON with entries twice", eStargzLayer(nil, []byte(`{"entries":[],"entries":[]}`)), false},
		{"JSON cut", eStargzLayer(nil, []byte(`{"entries":[{"name":"a"`)), false},
		{"JSON deep", eStargzLayer(nil, []byte(`{"x":`+strings.Repeat("[", 20000))), false},
		{"JSON unknown keys", eStargzLayer(nil, []byte(`{"x":{"y":[1,2]},"entries":[{"name":"a","type":"dir","z":[{}]}]}`)), true},
		{"position short", zc(func(a map[string]string) { a[zstdPosition] = "1:2" }), false},
		{"position negative", zc(func(a map[string]string) { a[zstdPosition] = "-1:2:3:1" }), false},
		{"position outside", zc(func(a map[string]string) { a[zstdPosition] = "9223372036854775807:9:9:1" }), false},
		{"position huge", zc(func(a map[string]string) { a[zstdPosition] = "0:9223372036854775807:9:1" }), false},
		{"type", zc(func(a map[string]string) { a[zstdPosition] = "0:9:9:2" }), false},
		{"checksum", zc(func(a map[string]string) { a[zstdChecksum] = someDigest }), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			toc, err := Index(context.Background(), tc.l, mustBuilder(t))
			if err != nil || (toc.Format != 0) != tc.ok || (toc.Why == "") != tc.ok {
				t.Errorf("Index = %+v, %v, want ok %v", toc, err, tc.ok)
			}
		})
	}
}

// TestTOCBomb: a table that expands a thousand times is read to its ceiling in
// little memory.
func TestTOCBomb(t *testing.T) {
	l := eStargzLayer(nil, append([]byte(`{"entries":[`), bytes.Repeat([]byte(" "), 100<<20)...))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	toc, err := Index(context.Background(), l, mustBuilder(t))
	runtime.ReadMemStats(&after)
	if toc.Why == "" || err != nil {
		t.Errorf("Index = %+v, %v", toc, err)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 32<<20 {
		t.Errorf("%d bytes allocated", n)
	}
}

// TestStreamedFallback: a layer whose table lies is read by a pass, and right.
func TestStreamedFallback(t *testing.T) {
	l := estargzOf(t, tarOf(t, layerCorpus()))
	l.Desc.Annotations[tocDigest] = someDigest
	ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
	if ld.format != FormatGzip || ld.why == "" {
		t.Errorf("format %v, why %q", ld.format, ld.why)
	}
	if got := ld.read("last", 0, 100, t); !bytes.Equal(got, layerNoise(9, 100)) {
		t.Error("wrong bytes")
	}
}

// TestNotUTF8: JSON loses a name that is not UTF-8, the archive does not.
func TestNotUTF8(t *testing.T) {
	files := []layerFile{lfile("caf\xe9", layerText(1, 100)), lfile("b", layerText(2, 100))}
	for i := range files {
		files[i].Format = tar.FormatGNU
	}
	l := estargzOf(t, tarOf(t, files))
	ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
	if ld.format != FormatGzip || ld.why == "" {
		t.Errorf("format %v, why %q, want a pass", ld.format, ld.why)
	}
	if got := ld.read("caf\xe9", 0, 200, t); !bytes.Equal(got, layerText(1, 100)) {
		t.Error("wrong bytes")
	}
}
