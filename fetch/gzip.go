package fetch

import (
	"bufio"

	"github.com/klauspost/compress/gzip"
)

// gzip, RFC 1952. A blob may have several members, and nothing after the last.

func isGzip(head []byte) bool {
	return len(head) >= 2 && head[0] == 0x1f && head[1] == 0x8b
}

// newGzip returns a reader over all members in r, and takes no byte beyond them.
func newGzip(r *bufio.Reader) (*gzip.Reader, error) { return gzip.NewReader(r) }
