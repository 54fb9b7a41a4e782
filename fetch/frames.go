package fetch

import (
	"archive/tar"
	"bufio"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/imgfs/imgfs/unionfs"
)

// frames reads chunks out of a stretch of a blob, in the order of their places.
// What it returns is not checked against anything.
type frames struct {
	format Format
	src    *sourceReader
	in     *bufio.Reader // src
	pos    int64         // in the blob, of in

	frame  io.LimitedReader // what is left of the current frame as stored
	begin  int64            // of the current frame in the blob, -1 without one
	end    int64            // of the current frame in the blob
	out    countReader      // the current frame decompressed
	sparse int64            // the header that sp has been made from, -1 without one
	sp     *countReader     // a sparse file of the frame

	gz *gzip.Reader
	zd *zstd.Decoder
}

// countReader counts what was read of r.
type countReader struct {
	r   io.Reader
	pos int64
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.pos += int64(n)
	return n, err
}

// skip reads on to pos.
func (c *countReader) skip(pos int64) error {
	if pos < c.pos {
		return fmt.Errorf("chunk at %d of a frame of which %d bytes have passed", pos, c.pos)
	}
	_, err := io.CopyN(io.Discard, c, pos-c.pos)
	return noEOF(err)
}

// newFrames reads chunks from r, which begins at pos of the blob.
func newFrames(f Format, r io.Reader, pos int64) *frames {
	src := &sourceReader{r: r}
	return &frames{format: f, src: src, in: bufio.NewReaderSize(src, blockSize), pos: pos, begin: -1, sparse: -1}
}

// broken is the failure of the reader under the frames: no chunk will come any more.
func (s *frames) broken() error { return s.src.err }

// read fills buf with the chunk c. An error concerns the chunk's frame; unless
// broken says so, chunks of later frames can still be read.
func (s *frames) read(c *unionfs.Chunk, buf []byte) error {
	if c.BlobOff != s.begin {
		if err := s.open(c); err != nil {
			return err
		}
	}
	if c.Inner&sparseMark != 0 {
		return s.readSparse(c, buf)
	}
	if err := s.out.skip(c.Inner); err != nil {
		return err
	}
	_, err := io.ReadFull(&s.out, buf)
	return noEOF(err)
}

// open begins the frame that holds c.
func (s *frames) open(c *unionfs.Chunk) error {
	if s.begin >= 0 { // leave the current one
		_, err := io.Copy(io.Discard, &s.frame)
		s.pos = s.end - s.frame.N
		s.begin = -1
		if err != nil {
			return err
		}
	}
	if c.BlobOff < s.pos {
		return fmt.Errorf("frame at %d after %d", c.BlobOff, s.pos)
	}
	n, err := io.CopyN(io.Discard, s.in, c.BlobOff-s.pos)
	s.pos += n
	if err != nil {
		return noEOF(err)
	}
	s.begin, s.end, s.sparse = c.BlobOff, c.BlobOff+c.BlobLen, -1
	s.frame = io.LimitedReader{R: s.in, N: c.BlobLen}
	s.out = countReader{}
	switch s.format {
	case FormatEstargz, FormatGzip:
		if s.gz == nil {
			s.gz = new(gzip.Reader)
		}
		err = s.gz.Reset(&s.frame)
		s.out.r = s.gz
	case FormatZstdChunked, FormatZstd:
		if s.zd == nil {
			s.zd, err = newZstd(&s.frame)
		} else {
			err = s.zd.Reset(&s.frame)
		}
		s.out.r = s.zd
	default:
		s.out.r = &s.frame
	}
	if err != nil {
		s.out.r = failed{err}
	}
	return err
}

// failed is a frame that cannot be read.
type failed struct{ err error }

func (f failed) Read([]byte) (int, error) { return 0, f.err }

// readSparse reads a chunk of a file that is sparse in the archive.
func (s *frames) readSparse(c *unionfs.Chunk, buf []byte) error {
	at := c.Inner &^ sparseMark
	if s.sparse != at {
		if err := s.out.skip(at); err != nil {
			return err
		}
		tr := tar.NewReader(&s.out)
		if _, err := tr.Next(); err != nil {
			return noEOF(err)
		}
		s.sparse, s.sp = at, &countReader{r: tr}
	}
	if err := s.sp.skip(c.Off); err != nil {
		return err
	}
	_, err := io.ReadFull(s.sp, buf)
	return noEOF(err)
}

// close frees the decoders.
func (s *frames) close() {
	if s.zd != nil {
		s.zd.Close()
	}
}
