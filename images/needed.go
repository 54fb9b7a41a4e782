package images

import (
	"context"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/fetch"
	"github.com/imgfs/imgfs/unionfs"
)

// When the beginning of a program is read for the first time, somebody is about to
// run it, and will then wait for its libraries one after the other. They are
// fetched together instead.

const (
	maxPrograms = 4096 // that are remembered to have been looked at
	maxFollowed = 4    // images that are looked through for one program
	maxWaves    = 4    // libraries of libraries of …
	maxNeeded   = 512  // files for one program
	maxLooking  = 4    // programs that are looked at at once

	maxProgramBytes = 128 << 20 // expanded, that are fetched for one program
)

// programRead is told that the beginning of a file that may be a program was read.
// It does not block.
func (s *Store) programRead(ino Ino, l *layer, id unionfs.ID) {
	if !s.o.Prefetch || s.ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.programs[ino] {
		return
	}
	var found []*image
	for _, im := range s.images {
		if st := im.state.Load(); st != nil && st.tree != nil && len(found) < maxFollowed && slices.Contains(im.layers, l) {
			found = append(found, im)
		}
	}
	if len(found) == 0 || !s.looking.TryAcquire(1) {
		return // at its next reading, then
	}
	if len(s.programs) >= maxPrograms {
		clear(s.programs)
	}
	s.programs[ino] = true
	s.tasks.Go(func() {
		defer s.looking.Release(1)
		for _, im := range found {
			s.guard("fetching ahead what a program needs", func() {
				s.fetchNeeded(s.ctx, im, located{ref: unionfs.Ref{Layer: slices.Index(im.layers, l), ID: id}})
			})
		}
	})
}

// located is a file of an image, and where it is, if that is known.
type located struct {
	ref  unionfs.Ref
	path string
}

// fetchNeeded fetches what a program of an image needs, and what that needs. It
// returns when all is here; what fails is fetched when it is read.
func (s *Store) fetchNeeded(ctx context.Context, im *image, p located) {
	st := im.state.Load()
	if st == nil || st.tree == nil {
		return
	}
	seen := map[unionfs.Ref]bool{p.ref: true}
	budget := int64(maxProgramBytes)
	wave := []located{p}
	for range maxWaves {
		var next []located
		for _, f := range wave {
			if ctx.Err() == nil {
				next = append(next, im.needs(ctx, st, f, seen, &budget)...)
			}
		}
		if len(next) == 0 || budget < 0 || ctx.Err() != nil {
			return
		}
		im.fetchBeginnings(ctx, next, &budget)
		wave = next
	}
}

// needs finds the files that a program needs, without those that were seen.
func (im *image) needs(ctx context.Context, st *imageState, f located, seen map[unionfs.Ref]bool, budget *int64) (files []located) {
	r := im.reader(f.ref.Layer)
	if r == nil {
		return nil
	}
	p, ok := parseProgram(contentAt{ctx, r, f.ref.ID, budget})
	if !ok {
		return nil
	}
	dir := ""
	if f.path != "" {
		dir = path.Dir(f.path)
	}
	for _, places := range p.candidates(dir) {
		for _, place := range places {
			name := strings.TrimPrefix(path.Clean("/"+place), "/")
			ref, err := st.tree.Resolve(name)
			if err != nil {
				continue
			}
			if !ref.ID.IsDir() && !seen[ref] && len(seen) < maxNeeded {
				seen[ref] = true
				files = append(files, located{ref, "/" + name})
			}
			break
		}
	}
	return files
}

// fetchBeginnings fetches the first chunk of files: what of a large file follows
// may never be read.
func (im *image) fetchBeginnings(ctx context.Context, files []located, budget *int64) {
	readers := map[v1.Hash]*fetch.Reader{}
	var list []fetch.Read
	for _, f := range files {
		r := im.reader(f.ref.Layer)
		if r == nil {
			continue
		}
		first, size, ok := r.Beginning(f.ref.ID)
		if *budget -= size; ok && *budget >= 0 {
			readers[first.Layer] = r
			list = append(list, first)
		}
	}
	fetch.Prefetch(ctx, list, readers)
}

// reader is that of a layer that is fetched by ranges, else nil.
func (im *image) reader(layer int) *fetch.Reader {
	st := im.layers[layer].state.Load()
	if st == nil || st.idx == nil || !fetch.Format(st.idx.Meta().Format).Lazy() {
		return nil
	}
	return st.reader
}

// contentAt reads a file's content.
type contentAt struct {
	ctx context.Context // io.ReaderAt has no other place for it
	r   *fetch.Reader
	id  unionfs.ID

	budget *int64 // of bytes to fetch, expanded
}

func (c contentAt) ReadAt(p []byte, off int64) (int, error) {
	return c.r.PeekAt(c.ctx, c.id, p, off, c.budget)
}
