package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/unionfs"
)

// Format says how a layer's blob is compressed and how its chunks are reached.
// The numbers are on disk, in unionfs.Meta: never renumber.
type Format uint8

// The layer formats. What BlobOff, BlobLen and Inner of a chunk mean in each is
// in docs/layers.md.
const (
	FormatEstargz     Format = 1 // gzip members of a chunk each, a table of contents at the end
	FormatZstdChunked Format = 2 // zstd frames of a chunk each, a table of contents in a skippable frame
	FormatGzip        Format = 3 // a gzip file: no access but from its beginning
	FormatZstd        Format = 4 // zstd frames: no access but from the beginning
	FormatTar         Format = 5 // not compressed
)

// String returns the format's name.
func (f Format) String() string {
	switch f {
	case FormatEstargz:
		return "estargz"
	case FormatZstdChunked:
		return "zstd:chunked"
	case FormatGzip:
		return "gzip"
	case FormatZstd:
		return "zstd"
	case FormatTar:
		return "tar"
	}
	return fmt.Sprintf("format %d", uint8(f))
}

// Lazy reports whether a layer of the format is read by ranges from the first
// moment on, without a streaming pass.
func (f Format) Lazy() bool { return f == FormatEstargz || f == FormatZstdChunked }

// ranged reports whether a chunk is reached without reading what is before it.
func (f Format) ranged() bool { return f.Lazy() || f == FormatTar }

// blobReader is what a layer needs of its blob. *Blob is one; tests have another.
type blobReader interface {
	// Size is the blob's length in bytes, as its descriptor has it.
	Size() int64
	// Range returns exactly n bytes from off on, or an error from a Read.
	Range(ctx context.Context, p Priority, off, n int64) (io.ReadCloser, error)
	// Stream returns the blob from off to its end.
	Stream(ctx context.Context, p Priority, off int64) (io.ReadCloser, error)
}

// suspect tells a blob that can choose between hosts that its bytes were wrong.
func suspect(b blobReader) {
	if s, ok := b.(interface{ Suspect() }); ok {
		s.Suspect()
	}
}

// Layer is a layer's blob, and what the image says of it.
type Layer struct {
	Blob   blobReader
	Desc   v1.Descriptor
	DiffID v1.Hash // of the uncompressed layer, from the config; zero when it is not known
}

// Limits for what a blob may ask of us.
const (
	maxTOC        = 512 << 20 // bytes of a table of contents, expanded
	maxTOCEntry   = 2 << 20   // bytes of JSON of one of its entries: 64 KiB xattrs in base64, several of them
	maxChunk      = 64 << 20  // bytes of a chunk, expanded: it is held in memory
	maxFrame      = 72 << 20  // bytes of a chunk's frame as stored: maxChunk that does not compress, and headers
	maxInner      = 256 << 20 // bytes of a frame before a chunk: they are expanded for nothing
	maxFileChunks = 1 << 18   // chunks of a file, and chunks whose frame's end is not known yet: 20 MiB of memory
	maxZstdWindow = 128 << 20 // bytes of a zstd window: what zstd -22 --ultra asks for

	maxExpanded   = 1 << 40   // bytes of a layer, expanded
	maxRatio      = 2048      // expanded over stored; deflate cannot pass 1032
	expandsFreely = 256 << 20 // bytes to which any blob may expand, whatever its size
)

// errStream says that a table of contents is not usable: the layer is streamed.
// It never leaves the package.
type errStream struct{ why string }

func (e errStream) Error() string { return e.why }

func streamf(format string, args ...any) error { return errStream{fmt.Sprintf(format, args...)} }

// Index reads the table of contents of a layer that has one, and adds its
// entries and contents to b: one ranged request, two when an eStargz table is
// larger than the guess. When the layer has none that can be trusted, Format is 0;
// then the layer must be streamed (StartPass).
//
// When Format is 0 or err is not nil, b may have entries already: it must be closed,
// and a new one made. So nobody should see b before Index has returned.
//
// The table is the truth about such a layer: it is checked against the digest in
// the manifest's annotations, and each chunk against the table. The diffID is not
// checked, because that needs the whole layer.
//
// Errors are those of the blob's requests, and *unionfs.EntryError for an entry
// that no layer may have.
func Index(ctx context.Context, l Layer, b *unionfs.Builder) (t TOC, err error) {
	switch {
	case l.Desc.Annotations[zstdPosition] != "":
		t.Format, err = FormatZstdChunked, indexZstdChunked(ctx, l, b)
	case l.Desc.Annotations[tocDigest] != "":
		t.Format = FormatEstargz
		err = indexEstargz(ctx, l, b, &t)
	default:
		return TOC{Why: "no table of contents announced"}, nil
	}
	if s := (errStream{}); errors.As(err, &s) {
		return TOC{Why: s.why}, nil
	}
	if err != nil {
		return TOC{}, fmt.Errorf("fetch: reading the table of contents of layer %s: %w", l.Desc.Digest, err)
	}
	return t, nil
}

// TOC is what Index found out about a layer.
type TOC struct {
	Format      Format // 0: there is no table of contents that can be used
	Why         string // then, in a few words
	Tail        int64  // bytes of the blob's end that have the table, where that is to be found out
	Prioritized int64  // bytes at the beginning of the blob that whoever made it expects to be read first; 0 if it does not say
}

// sourceReader remembers the error of the reader under a decoder, so that a
// failed request is told from a malformed stream.
type sourceReader struct {
	r   io.Reader
	err error // first error that is not io.EOF
}

func (s *sourceReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF && s.err == nil {
		s.err = err
	}
	return n, err
}
