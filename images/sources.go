package images

import (
	"context"
	"fmt"
	"io"
	iofs "io/fs"
	"slices"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/fetch"
)

// sources reads a blob from the first of several repositories that lets it.
type sources struct {
	c    *fetch.Client
	desc v1.Descriptor

	mu    sync.Mutex
	repos []string      // the latest first
	blobs []*fetch.Blob // of repos
}

func newSources(c *fetch.Client, rec layerRecord) *sources {
	s := &sources{c: c, desc: rec.Desc}
	for _, r := range slices.Backward(rec.Repos) {
		s.add(r)
	}
	return s
}

// add puts a repository that has just been seen to have the blob before the
// others.
func (s *sources) add(repository string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.repos) > 0 && s.repos[0] == repository {
		return
	}
	repo, err := name.NewRepository(repository)
	if err != nil {
		return
	}
	blob := s.c.Blob(repo, s.desc)
	if i := slices.Index(s.repos, repository); i >= 0 {
		blob = s.blobs[i]
		s.repos, s.blobs = slices.Delete(s.repos, i, i+1), slices.Delete(s.blobs, i, i+1)
	}
	n := min(len(s.repos), maxRepos-1)
	s.repos = append([]string{repository}, s.repos[:n]...)
	s.blobs = append([]*fetch.Blob{blob}, s.blobs[:n]...)
}

// all returns the blobs to try, in order.
func (s *sources) all() []*fetch.Blob {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.blobs)
}

// Size is the size of the blob in bytes.
func (s *sources) Size() int64 { return s.desc.Size }

// Range returns n bytes from off.
func (s *sources) Range(ctx context.Context, p fetch.Priority, off, n int64) (io.ReadCloser, error) {
	return s.first(ctx, func(b *fetch.Blob) (io.ReadCloser, error) { return b.Range(ctx, p, off, n) })
}

// Stream returns the blob from off.
func (s *sources) Stream(ctx context.Context, p fetch.Priority, off int64) (io.ReadCloser, error) {
	return s.first(ctx, func(b *fetch.Blob) (io.ReadCloser, error) { return b.Stream(ctx, p, off) })
}

// NoRanges reports whether a repository answered a ranged request with the whole
// blob.
func (s *sources) NoRanges() bool {
	return slices.ContainsFunc(s.all(), (*fetch.Blob).NoRanges)
}

// HeldTail is how many bytes of the blob's end are held in memory.
func (s *sources) HeldTail() (n int64) {
	for _, b := range s.all() {
		n = max(n, b.HeldTail())
	}
	return n
}

// Suspect tells that the bytes were not those of the digest.
func (s *sources) Suspect() {
	for _, b := range s.all() {
		b.Suspect()
	}
}

// first tries the repositories in turn. When none has the blob for us, the error
// is that of the first, which was asked most recently and is the likeliest to.
func (s *sources) first(ctx context.Context, open func(*fetch.Blob) (io.ReadCloser, error)) (io.ReadCloser, error) {
	var failed error
	for _, b := range s.all() {
		r, err := open(b)
		if err == nil {
			return r, nil
		}
		if failed == nil {
			failed = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	if failed == nil {
		failed = fmt.Errorf("images: no repository known for the layer: %w", iofs.ErrNotExist)
	}
	return nil, failed
}
