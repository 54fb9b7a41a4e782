package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"strconv"
	"strings"

	"github.com/imgfs/imgfs/unionfs"
)

// zstd:chunked: https://github.com/containers/storage/blob/main/docs/containers-storage-zstd-chunked.md

// The annotations of a zstd:chunked layer. The position is
// "offset:length:length expanded:type"; the checksum is that of the table of
// contents as it is stored.
const (
	zstdPosition = "io.github.containers.zstd-chunked.manifest-position"
	zstdChecksum = "io.github.containers.zstd-chunked.manifest-checksum"
	zstdTypeCRFS = 1
)

// maxZstdTOC bounds a zstd:chunked table as it is stored: it is held in memory
// while it is checked.
const maxZstdTOC = 64 << 20

func indexZstdChunked(ctx context.Context, l Layer, b *unionfs.Builder) error {
	want, err := parseDigest(l.Desc.Annotations[zstdChecksum])
	if err != nil {
		return streamf("annotation of the table of contents: %v", err)
	}
	pos := strings.Split(l.Desc.Annotations[zstdPosition], ":")
	if len(pos) != 4 {
		return streamf("annotation of the table of contents: %.80q", l.Desc.Annotations[zstdPosition])
	}
	var n [4]int64 // offset, length, length expanded, type
	for i := range n {
		if n[i], err = strconv.ParseInt(pos[i], 10, 64); err != nil || n[i] < 0 {
			return streamf("annotation of the table of contents: %.80q", l.Desc.Annotations[zstdPosition])
		}
	}
	size := l.Blob.Size()
	switch {
	case n[3] != zstdTypeCRFS:
		return streamf("table of contents of type %d", n[3])
	case n[1] > maxZstdTOC || n[2] > maxTOC:
		return streamf("table of contents of %d bytes", max(n[1], n[2]))
	case n[0] > size || n[1] > size-n[0]:
		return streamf("table of contents at %d of a blob of %d bytes", n[0], size)
	}
	for range 2 { // wrong bytes may come from one host of several
		ok, err := fetchZstdTOC(ctx, l, b, n[0], n[1], n[2], want)
		if ok || err != nil {
			return err
		}
		suspect(l.Blob)
	}
	return streamf("table of contents does not match its checksum")
}

// fetchZstdTOC reads the table at off of the blob, n bytes that expand to
// expanded. ok is false when it does not match.
func fetchZstdTOC(ctx context.Context, l Layer, b *unionfs.Builder, off, n, expanded int64, want unionfs.Digest) (ok bool, err error) {
	rc, err := l.Blob.Range(ctx, Demand, off, n)
	if err != nil {
		return false, err
	}
	defer rc.Close()
	release, err := holdMemory(ctx, n+min(expanded, maxZstdWindow)) // what the decoder may hold
	if err != nil {
		return false, err
	}
	defer release()
	data := make([]byte, n)
	if _, err := io.ReadFull(rc, data); err != nil {
		return false, err
	}
	rc.Close()
	if sha256.Sum256(data) != want {
		return false, nil
	}
	return true, readZstdTOC(data, expanded, b, off)
}

// readZstdTOC adds what the table in data says of the blob's first end bytes.
func readZstdTOC(data []byte, expanded int64, b *unionfs.Builder, end int64) error {
	zr, err := newZstd(bytes.NewReader(data))
	if err != nil {
		return streamf("table of contents: %v", err)
	}
	defer zr.Close()
	s := &tocSink{b: b, format: FormatZstdChunked, end: end}
	if err := decodeTOC(io.LimitReader(zr, expanded), s.add); err != nil {
		return err
	}
	return s.close()
}
