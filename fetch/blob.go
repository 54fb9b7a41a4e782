package fetch

import (
	"context"
	"io"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Blob is a content-addressed object in a repository.
type Blob struct {
	c    *Client
	repo name.Repository
	desc v1.Descriptor
}

// Blob returns the blob; it makes no request.
func (c *Client) Blob(repo name.Repository, desc v1.Descriptor) *Blob {
	return &Blob{c: c, repo: repo, desc: desc}
}

// Size is the size of the blob in bytes, as the descriptor has it.
func (b *Blob) Size() int64 { return b.desc.Size }

// Descriptor is the blob's descriptor.
func (b *Blob) Descriptor() v1.Descriptor { return b.desc }

// Range returns exactly n bytes from off.
func (b *Blob) Range(ctx context.Context, p Priority, off, n int64) (io.ReadCloser, error) {
	panic("not yet")
}

// Stream returns the blob from off to its end.
func (b *Blob) Stream(ctx context.Context, p Priority, off int64) (io.ReadCloser, error) {
	panic("not yet")
}

// NoRanges reports whether the registry answered a ranged request with the whole blob.
func (b *Blob) NoRanges() bool { return false }
