package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"slices"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/imgfs/imgfs/fetch"
)

// sources reads a blob from the first of several repositories that has it.
type sources struct {
	blobs []*fetch.Blob
	size  int64
}

func newSources(c *fetch.Client, rec layerRecord) *sources {
	s := &sources{size: rec.Desc.Size}
	for _, r := range rec.Repos {
		repo, err := name.NewRepository(r)
		if err != nil {
			continue
		}
		s.blobs = append(s.blobs, c.Blob(repo, rec.Desc))
	}
	return s
}

// Size is the size of the blob in bytes.
func (s *sources) Size() int64 { return s.size }

// Range returns n bytes from off.
func (s *sources) Range(ctx context.Context, p fetch.Priority, off, n int64) (io.ReadCloser, error) {
	return s.first(func(b *fetch.Blob) (io.ReadCloser, error) { return b.Range(ctx, p, off, n) })
}

// Stream returns the blob from off.
func (s *sources) Stream(ctx context.Context, p fetch.Priority, off int64) (io.ReadCloser, error) {
	return s.first(func(b *fetch.Blob) (io.ReadCloser, error) { return b.Stream(ctx, p, off) })
}

// NoRanges reports whether a repository answered a ranged request with the whole
// blob.
func (s *sources) NoRanges() bool {
	return slices.ContainsFunc(s.blobs, (*fetch.Blob).NoRanges)
}

// Suspect tells that the bytes were not those of the digest.
func (s *sources) Suspect() {
	for _, b := range s.blobs {
		b.Suspect()
	}
}

// first tries the repositories in turn, while they do not have the blob or do
// not let us read it.
func (s *sources) first(open func(*fetch.Blob) (io.ReadCloser, error)) (r io.ReadCloser, err error) {
	err = fmt.Errorf("images: no repository known for the layer: %w", iofs.ErrNotExist)
	for _, b := range s.blobs {
		r, err = open(b)
		if err == nil || (!errors.Is(err, iofs.ErrNotExist) && !errors.Is(err, iofs.ErrPermission)) {
			return r, err
		}
	}
	return nil, err
}
