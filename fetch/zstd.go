package fetch

import (
	"io"

	"github.com/klauspost/compress/zstd"
)

// Zstandard, RFC 8878. A blob may have several frames, and skippable ones
// anywhere between them (3.1.2), nothing else.

func isZstd(head []byte) bool {
	if len(head) < 4 {
		return false
	}
	magic := uint32(head[0]) | uint32(head[1])<<8 | uint32(head[2])<<16 | uint32(head[3])<<24
	return magic == 0xFD2FB528 || magic&^0xF == 0x184D2A50
}

// newZstd returns a decoder that decodes in the caller's goroutine and refuses a
// window above maxZstdWindow.
func newZstd(r io.Reader) (*zstd.Decoder, error) {
	return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(maxZstdWindow), zstd.WithDecoderMaxWindow(maxZstdWindow), zstd.WithDecodeBuffersBelow(0))
}
