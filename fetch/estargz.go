package fetch

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"path"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"

	"github.com/imgfs/imgfs/unionfs"
)

// eStargz: https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md

// tocDigest is the annotation with the digest of the table of contents. Without
// it an eStargz layer cannot be verified lazily.
const tocDigest = estargz.TOCJSONDigestAnnotation

// The first request asks for tocGuess of the blob's tail: a table takes some 80
// bytes per file as stored, so a 64th is enough for files of 5 KB on average. It
// is not larger because what is not needed of it costs more than the second
// request that fetches what is missing.
const (
	tocGuess    = 64 // the blob's size divided by this
	minTOCGuess = 32 << 10
	maxTOCGuess = 256 << 10
)

func indexEstargz(ctx context.Context, l Layer, b *unionfs.Builder) error {
	want, err := parseDigest(l.Desc.Annotations[tocDigest])
	if err != nil {
		return streamf("annotation of the table of contents: %v", err)
	}
	size := l.Blob.Size()
	if size < estargz.FooterSize {
		return streamf("no eStargz footer")
	}
	guess := min(max(size/tocGuess, minTOCGuess), maxTOCGuess, size)
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
	have := size - guess // where tail begins
	if off >= have {
		return readEstargzTOC(bytes.NewReader(tail[off-have:end-have]), want, b, off)
	}
	rc, err := l.Blob.Range(ctx, Demand, off, have-off)
	if err != nil {
		return err
	}
	defer rc.Close()
	src := &sourceReader{r: rc}
	err = readEstargzTOC(io.MultiReader(src, bytes.NewReader(tail[:end-have])), want, b, off)
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
// member, says of the blob's first end bytes.
func readEstargzTOC(r io.Reader, want unionfs.Digest, b *unionfs.Builder, end int64) error {
	zr, err := gzip.NewReader(r)
	if err != nil {
		return streamf("table of contents: %v", err)
	}
	tr := tar.NewReader(io.LimitReader(zr, maxTOC+1<<20))
	h, err := tr.Next()
	if err != nil {
		return streamf("table of contents: %v", err)
	}
	if h.Name != estargz.TOCTarName {
		return streamf("table of contents: a file %q in its place", h.Name)
	}
	sum := sha256.New()
	s := &tocSink{b: b, format: FormatEstargz, end: end}
	src := io.TeeReader(tr, sum)
	if err := decodeTOC(src, s.add); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, io.LimitReader(src, maxTOC)); err != nil {
		return streamf("table of contents: %v", err)
	}
	if got := unionfs.Digest(sum.Sum(nil)); got != want {
		return streamf("table of contents is %s, the manifest says %s", hex.EncodeToString(got[:]), hex.EncodeToString(want[:]))
	}
	return s.close()
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
