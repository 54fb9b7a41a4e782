package fetch

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"path"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"

	"github.com/imgfs/imgfs/unionfs"
)

// eStargz: https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md

// tocDigest is the annotation with the digest of the table of contents. Without
// it an eStargz layer cannot be verified lazily.
const tocDigest = estargz.TOCJSONDigestAnnotation

// The first request asks for a part of the blob's tail that is most often the
// whole table: of 16 layers of Debian packages those with many files have tables
// of a 130th to a 190th of their size, those with large files less. What is
// not needed of it costs as much as a second request at 20 ms and 100 Mbit/s when
// it is 250 KB.
const (
	tocGuess    = 128 // the blob's size divided by this
	minTOCGuess = 32 << 10
	maxTOCGuess = 352 << 10
)

// TailGuess returns the bytes of a blob that have its table of contents, as far as
// can be told from its descriptor: n bytes from off. known, if not 0, is how much of
// the blob's end it takes. ok is false for a layer that has no table.
func TailGuess(desc v1.Descriptor, known int64) (off, n int64, ok bool) {
	switch {
	case desc.Annotations[zstdPosition] != "":
		_, err := fmt.Sscanf(desc.Annotations[zstdPosition], "%d:%d:", &off, &n)
		return off, n, err == nil
	case desc.Annotations[tocDigest] == "":
		return 0, 0, false
	case known <= 0 || known > desc.Size:
		known = tailGuess(desc.Size)
	}
	return desc.Size - known, known, true
}

func tailGuess(size int64) int64 { return min(max(size/tocGuess, minTOCGuess), maxTOCGuess, size) }

// indexEstargz adds the table of l to b, and tells t where it and its landmark are.
func indexEstargz(ctx context.Context, l Layer, b *unionfs.Builder, t *TOC) error {
	want, err := parseDigest(l.Desc.Annotations[tocDigest])
	if err != nil {
		return streamf("annotation of the table of contents: %v", err)
	}
	size := l.Blob.Size()
	if size < estargz.FooterSize {
		return streamf("no eStargz footer")
	}
	guess := tailGuess(size)
	if b, ok := l.Blob.(interface{ HeldTail() int64 }); ok {
		if held := b.HeldTail(); held >= estargz.FooterSize {
			guess = held
		}
	}
	tail, err := readRange(ctx, l.Blob, size-guess, guess)
	if err != nil {
		return err
	}
	footer := tail[len(tail)-estargz.FooterSize:]
	off, footerLen, err := estargz.OpenFooter(io.NewSectionReader(bytes.NewReader(footer), 0, estargz.FooterSize))
	if err != nil {
		return streamf("no eStargz footer")
	}
	end := size - footerLen
	if footerLen != estargz.FooterSize { // a legacy footer: OpenFooter returns no length of it
		end = size - legacyFooterSize
	}
	if off < 0 || off >= end {
		return streamf("table of contents at %d of a blob of %d bytes", off, size)
	}
	t.Tail = size - off
	have := size - guess // where tail begins
	if off >= have {
		t.Prioritized, err = readEstargzTOC(bytes.NewReader(tail[off-have:end-have]), want, b, off)
		return err
	}
	rc, err := l.Blob.Range(ctx, Demand, off, have-off)
	if err != nil {
		return err
	}
	defer rc.Close()
	src := &sourceReader{r: rc}
	t.Prioritized, err = readEstargzTOC(io.MultiReader(src, bytes.NewReader(tail[:end-have])), want, b, off)
	if src.err != nil {
		return src.err
	}
	return err
}

// legacyFooterSize is the length of the footer that stargz had before eStargz:
// a gzip header of 10 bytes, 2 of the length of its extra field, 22 of that
// field, 5 of an empty block, 8 of the trailer.
const legacyFooterSize = 10 + 2 + 22 + 5 + 8

// readEstargzTOC adds what the table in r, a tar archive of one file in a gzip
// member, says of the blob's first end bytes. It returns where the landmark of
// prioritized files is, 0 if there is none.
func readEstargzTOC(r io.Reader, want unionfs.Digest, b *unionfs.Builder, end int64) (prioritized int64, err error) {
	zr, err := gzip.NewReader(r)
	if err != nil {
		return 0, streamf("table of contents: %v", err)
	}
	tr := tar.NewReader(io.LimitReader(zr, maxTOC+1<<20))
	h, err := tr.Next()
	if err != nil {
		return 0, streamf("table of contents: %v", err)
	}
	if h.Name != estargz.TOCTarName {
		return 0, streamf("table of contents: a file %q in its place", h.Name)
	}
	sum := sha256.New()
	s := &tocSink{b: b, format: FormatEstargz, end: end}
	src := io.TeeReader(tr, sum)
	if err := decodeTOC(src, s.add); err != nil {
		return 0, err
	}
	if _, err := io.Copy(io.Discard, io.LimitReader(src, maxTOC)); err != nil {
		return 0, streamf("table of contents: %v", err)
	}
	if got := unionfs.Digest(sum.Sum(nil)); got != want {
		return 0, streamf("table of contents is %s, the manifest says %s", hex.EncodeToString(got[:]), hex.EncodeToString(want[:]))
	}
	return s.landmark, s.close()
}

// isTOCName reports whether name is what eStargz adds to a layer: its landmarks
// and the table of contents. They are not shown.
func isTOCName(name string) bool {
	if len(name) > 64 {
		return false
	}
	switch path.Clean("/" + name) {
	case "/" + estargz.PrefetchLandmark, "/" + estargz.NoPrefetchLandmark, "/" + estargz.TOCTarName:
		return true
	}
	return false
}

// readRange reads n bytes, which the caller has bounded.
func readRange(ctx context.Context, b blobReader, off, n int64) ([]byte, error) {
	rc, err := b.Range(ctx, Demand, off, n)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	buf := make([]byte, n)
	if _, err := io.ReadFull(rc, buf); err != nil {
		return nil, err
	}
	return buf, nil
}
