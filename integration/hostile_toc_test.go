package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// zeros is an endless stream of zeros.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// writeBombTar writes an archive of one file of n zeros.
func writeBombTar(w io.Writer, n int64) error {
	tw := tar.NewWriter(w)
	e := file("zeros", "", size(n))
	if err := tw.WriteHeader(&e.head); err != nil {
		return err
	}
	if _, err := io.CopyN(tw, zeros{}, n); err != nil {
		return err
	}
	return tw.Close()
}

func writeBomb(w io.Writer, n int64) error {
	zw := gzip.NewWriter(w)
	if err := writeBombTar(zw, n); err != nil {
		return err
	}
	return zw.Close()
}

func bombDiff(n int64) (v1.Hash, error) {
	h := sha256.New()
	err := writeBombTar(h, n)
	return v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", h.Sum(nil))}, err
}

// lyingLayer is an eStargz layer whose table of contents has been edited. The
// annotation, the footer and the diffID match, so that only the table lies.
func lyingLayer(t testing.TB, edit func(toc map[string]any, entries []map[string]any)) blob {
	t.Helper()
	archive := tarball(t, file("x", "x"), file("y", strings.Repeat("0123456789", 2000)), symlink("l", "x"), hardlink("h", "x"))
	built, err := estargz.Build(io.NewSectionReader(bytes.NewReader(archive), 0, int64(len(archive))), estargz.WithChunkSize(8000))
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(built)
	if err != nil {
		t.Fatal(err)
	}
	at, footer, err := estargz.OpenFooter(io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data))))
	if err != nil {
		t.Fatal(err)
	}
	zr, err := gzip.NewReader(bytes.NewReader(data[at : int64(len(data))-footer]))
	if err != nil {
		t.Fatal(err)
	}
	tr := tar.NewReader(zr)
	if _, err := tr.Next(); err != nil {
		t.Fatal(err)
	}
	var toc map[string]any
	if err := json.NewDecoder(tr).Decode(&toc); err != nil {
		t.Fatal(err)
	}
	var entries []map[string]any
	for _, e := range toc["entries"].([]any) {
		entries = append(entries, e.(map[string]any))
	}
	edit(toc, entries)
	text, err := json.Marshal(toc)
	if err != nil {
		t.Fatal(err)
	}
	out := append(data[:at:at], gzipped(tarball(t, file(estargz.TOCTarName, string(text))))...)
	out = append(out, data[int64(len(data))-footer:]...)
	zr, err = gzip.NewReader(bytes.NewReader(out))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(zr)
	if err != nil {
		t.Fatal(err)
	}
	b := bytesBlob(mediaGzip, out, plain)
	b.Annotations = map[string]string{estargz.TOCJSONDigestAnnotation: fmt.Sprintf("sha256:%x", sha256.Sum256(text))}
	return b
}

// badTables are images whose table of contents lies about honest content: what is
// shown, if anything, is the content.
func badTables(t testing.TB) []badImage {
	find := func(entries []map[string]any, name string) map[string]any {
		for _, e := range entries {
			if e["name"] == name {
				return e
			}
		}
		t.Fatalf("no %q in the table", name)
		return nil
	}
	x := map[string]string{"x": "x"}
	set := func(name, entry, key string, value any) badImage {
		return badImage{name: "toc-" + name, want: either, shown: x,
			layers: []blob{lyingLayer(t, func(_ map[string]any, entries []map[string]any) { find(entries, entry)[key] = value })}}
	}
	list := []badImage{
		set("honest", "x", "comment", "unknown fields are no lie"),
		set("negative-size", "y", "size", -1),
		set("huge-size", "y", "size", int64(1)<<62),
		set("64-gib", "y", "size", int64(64)<<30),
		set("negative-offset", "y", "offset", -100),
		set("far-offset", "y", "offset", int64(1)<<60),
		set("same-offset", "y", "offset", 0),
		set("negative-chunk", "y", "chunkSize", -5),
		set("tiny-chunk", "y", "chunkSize", 1),
		set("huge-chunk", "y", "chunkSize", int64(1)<<62),
		set("chunk-offset", "y", "chunkOffset", int64(1)<<61),
		set("no-digest", "y", "chunkDigest", ""),
		set("bad-digest", "y", "chunkDigest", "sha256:zz"),
		set("dotdot", "y", "name", "../../../"+escape),
		set("nul", "y", "name", "a\x00b"),
		set("long-name", "y", "name", strings.Repeat("n", 70_000)),
		set("bad-type", "y", "type", "wormhole"),
		set("self-link", "h", "linkName", "h"),
		set("link-nowhere", "h", "linkName", "no/such/file"),
		set("bad-time", "y", "modtime", "yesterday"),
		set("wrong-kind", "y", "size", "many"),
		set("huge-mode", "y", "mode", int64(1)<<60),
	}
	list[0].want = works
	wrong := lyingLayer(t, func(map[string]any, []map[string]any) {})
	wrong.Annotations = map[string]string{estargz.TOCJSONDigestAnnotation: "sha256:" + strings.Repeat("1", 64)}
	lies := lyingLayer(t, func(_ map[string]any, entries []map[string]any) {
		find(entries, "x")["chunkDigest"] = "sha256:" + strings.Repeat("2", 64)
		find(entries, "x")["digest"] = "sha256:" + strings.Repeat("2", 64)
	})
	cycle := lyingLayer(t, func(_ map[string]any, entries []map[string]any) {
		e := find(entries, "x")
		clear(e)
		e["name"], e["type"], e["linkName"] = "x", "hardlink", "h"
	})
	return append(list,
		badImage{name: "toc-wrong-annotation", want: either, shown: x, layers: []blob{wrong}},
		badImage{name: "toc-wrong-content", want: either, shown: x, layers: []blob{lies}},
		badImage{name: "toc-link-cycle", want: either, shown: x, layers: []blob{cycle}},
		badImage{name: "toc-version", want: either, shown: x, layers: []blob{lyingLayer(t, func(toc map[string]any, _ []map[string]any) { toc["version"] = 99 })}},
		badImage{name: "toc-no-entries", want: either, shown: x, layers: []blob{lyingLayer(t, func(toc map[string]any, _ []map[string]any) { toc["entries"] = "none" })}},
	)
}

// estargzLayer is an honest eStargz layer.
func estargzLayer(t testing.TB, entries ...entry) blob {
	t.Helper()
	archive := tarball(t, entries...)
	built, err := estargz.Build(io.NewSectionReader(bytes.NewReader(archive), 0, int64(len(archive))))
	if err != nil {
		t.Fatal(err)
	}
	defer built.Close()
	data, err := io.ReadAll(built)
	if err != nil {
		t.Fatal(err)
	}
	b := bytesBlob(mediaGzip, data, nil)
	if b.Diff, err = v1.NewHash(built.DiffID().String()); err != nil {
		t.Fatal(err)
	}
	b.Annotations = map[string]string{estargz.TOCJSONDigestAnnotation: built.TOCDigest().String()}
	return b
}
