package fetch

import (
	"cmp"
	"context"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/imgfs/imgfs/unionfs"
)

// maxPrefetches is how many requests of one Prefetch are under way: enough to
// keep a link busy, and few enough that what is needed first comes first.
const maxPrefetches = 4

// Prefetch fetches what of list is not here, in that order, but for neighbours,
// which come together. readers are those of the layers, by the digests of their
// blobs; what they have no layer or no place for is passed over. Nobody waits for
// it: a reader whose chunk is not about to come asks for it himself. It returns
// when all has come, failed, or ctx ended; what fails is fetched when it is read,
// so it is no error.
func Prefetch(ctx context.Context, list []Read, readers map[v1.Hash]*Reader) {
	var g errgroup.Group
	g.SetLimit(maxPrefetches)
	sizes := map[v1.Hash]int64{}
	for layer, r := range readers {
		sizes[layer] = r.l.Blob.Size()
	}
	for _, s := range Stretches(list, sizes) {
		if ctx.Err() != nil {
			break
		}
		r := readers[s.Layer]
		for _, j := range r.planAhead(s.Reads) {
			g.Go(func() error {
				defer r.wg.Done()
				both, cancel := context.WithCancel(r.ctx)
				defer cancel()
				defer context.AfterFunc(ctx, cancel)()
				r.run(both, j)
				return nil
			})
		}
	}
	g.Wait()
}

// maxStretchGap is how many bytes lie between two reads that one request brings.
// Nobody waits for it, so it is larger than what a request costs: registries count
// requests, and so do their limits.
const maxStretchGap = 512 << 10

// PeekAt is ReadAt for what no reader waits for: it comes with the priority Soon, and
// no Trace notes it. What has to be fetched is taken from budget, in bytes expanded.
// n < len(p) also where it could not be had, or was too much.
func (r *Reader) PeekAt(ctx context.Context, id unionfs.ID, p []byte, off int64, budget *int64) (n int, err error) {
	ci, err := r.idx.Content(id)
	if err != nil || off < 0 || off >= ci.Size || len(p) == 0 {
		return 0, err
	}
	p = p[:min(int64(len(p)), ci.Size-off)]
	first, err := r.chunkAt(&ci, off)
	if err != nil {
		return 0, err
	}
	last, err := r.chunkAt(&ci, off+int64(len(p))-1)
	if err != nil || last-first >= maxAheadChunks {
		return 0, err
	}
	for attempt := range 2 {
		if ok, err := r.pack.ReadAt(p, ci.PackOff+off, first, last-first+1); ok && err == nil {
			return len(p), nil
		}
		if ok, err := r.c.ReadShared(ci.Digest, p, off); ok && err == nil {
			return len(p), nil
		}
		if attempt > 0 {
			break
		}
		var list []Read
		for n := first; n <= last; n++ {
			if c, size, err := r.idx.Chunk(n); err == nil && c.BlobLen > 0 {
				list = append(list, Read{r.l.Desc.Digest, c.BlobOff, c.BlobLen})
				*budget -= size
			}
		}
		if *budget < 0 {
			return 0, nil
		}
		Prefetch(ctx, list, map[v1.Hash]*Reader{r.l.Desc.Digest: r})
		r.landed(ctx, first, last)
	}
	return 0, ctx.Err()
}

// landed waits until no chunk of first to last is on its way.
func (r *Reader) landed(ctx context.Context, first, last uint32) {
	for n := first; n <= last; n++ {
		r.mu.Lock()
		f := r.flights[n]
		r.mu.Unlock()
		if f == nil {
			continue
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return
		case <-r.ctx.Done():
			return
		}
	}
}

// Stretch is a run of neighbouring reads of one layer, which one request brings.
type Stretch struct {
	Read         // all of it, and what lies between
	Reads []Read // in the order of their places
	first int    // place in the list of what is read first
}

// Stretches joins reads that lie together, and orders them by first use. sizes are
// those of the layers' blobs: what is of no such layer, or not within it, is left out.
func Stretches(list []Read, sizes map[v1.Hash]int64) []Stretch {
	type ranked struct {
		Read
		rank int
	}
	all := make([]ranked, 0, len(list))
	for i, r := range list {
		if size := sizes[r.Layer]; r.Off < 0 || r.Len <= 0 || r.Off >= size || r.Len > size-r.Off {
			continue
		}
		for ; r.Len > 0; r.Off, r.Len = r.Off+maxRange, r.Len-maxRange {
			all = append(all, ranked{Read{r.Layer, r.Off, min(r.Len, maxRange)}, i})
		}
	}
	slices.SortFunc(all, func(a, b ranked) int {
		return cmp.Or(cmp.Compare(a.Layer.Hex, b.Layer.Hex), cmp.Compare(a.Off, b.Off))
	})
	var out []Stretch
	for _, r := range all {
		end := r.Off + r.Len
		if k := len(out) - 1; k >= 0 && out[k].Layer == r.Layer && r.Off-(out[k].Off+out[k].Len) <= maxStretchGap && end-out[k].Off <= maxRange {
			s := &out[k]
			s.Reads, s.Len, s.first = append(s.Reads, r.Read), max(s.Len, end-s.Off), min(s.first, r.rank)
			continue
		}
		out = append(out, Stretch{Read: r.Read, Reads: []Read{r.Read}, first: r.rank})
	}
	slices.SortStableFunc(out, func(a, b Stretch) int { return cmp.Compare(a.first, b.first) })
	return out
}

// planAhead makes the requests for what is missing of reads, which are in the
// order of their places. Each must be run, after which r.wg is told that it is done.
func (r *Reader) planAhead(reads []Read) []*job {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.full.Load() || !r.ranged() {
		return nil
	}
	w := &walk{r: r}
	k, ok := w.contentAt(reads[0].Off)
	for _, s := range reads {
		if !ok {
			break
		}
		w.lo, w.hi = s.Off, s.Off+s.Len
		k, ok = w.within(k)
	}
	jobs := split(w.found, maxStretchGap, maxRange)
	for _, j := range jobs {
		j.guess = true
	}
	r.wg.Add(len(jobs))
	return jobs
}

// step counts a record that is looked at, and reports whether there may be more:
// a table of contents may have millions of chunks, and readers wait for r.mu.
func (w *walk) step() bool {
	w.steps++
	return w.steps <= maxAheadSteps && len(w.found) < maxAheadChunks
}

// maxAheadSteps bounds the records that one stretch costs.
const maxAheadSteps = 1 << 14

// within collects the chunks that have bytes in [lo, hi) of the blob, and are of
// content k or a later one. It returns the content to go on with; ok is false when
// there is enough.
func (w *walk) within(k uint32) (next uint32, ok bool) {
	for ; k < w.r.stats.Contents; k++ {
		ci, err := w.r.idx.ContentByNumber(k)
		if err != nil || !w.step() {
			return k, false
		}
		if ci.NChunks == 0 || w.r.elsewhere(&ci) {
			continue
		}
		// The chunks are in the order of their places, but for holes, which have none.
		lo, hi := uint32(0), ci.NChunks
		for lo < hi {
			mid := lo + (hi-lo)/2
			m, c, placed := w.placed(ci.FirstChunk+mid, ci.FirstChunk+hi)
			if w.steps > maxAheadSteps {
				return k, false
			}
			if !placed || c.BlobOff+c.BlobLen > w.lo {
				hi = mid
			} else {
				lo = m - ci.FirstChunk + 1
			}
		}
		for n := ci.FirstChunk + lo; n < ci.FirstChunk+ci.NChunks; n++ {
			c, size, err := w.r.idx.Chunk(n)
			if err != nil || !w.step() {
				return k, false
			}
			if c.BlobLen == 0 || c.Inner&sparseMark != 0 || c.BlobOff+c.BlobLen <= w.lo {
				continue
			}
			if c.BlobOff >= w.hi {
				return k, true // the next read may have more of it
			}
			if !w.take(&w.found, &ci, n, &c, size) {
				return k, false
			}
		}
	}
	return k, true
}

// placed returns the first of the chunks from n to end that has a place in the blob.
func (w *walk) placed(n, end uint32) (at uint32, c unionfs.Chunk, ok bool) {
	for ; n < end && w.step(); n++ {
		if c, _, err := w.r.idx.Chunk(n); err == nil && c.BlobLen > 0 {
			return n, c, true
		}
	}
	return n, c, false
}

// contentAt is a content from which on to look for what is at off of the blob: the
// last one that begins before it. Contents are in the order of their places;
// some have none. ok is false when that takes too long to find out.
func (w *walk) contentAt(off int64) (k uint32, ok bool) {
	lo, hi := uint32(0), w.r.stats.Contents
	best := uint32(0)
	for lo < hi {
		mid := lo + (hi-lo)/2
		m, before := mid, false
		for ; m < hi; m++ {
			ci, err := w.r.idx.ContentByNumber(m)
			if err != nil || !w.step() {
				return 0, false
			}
			if _, c, ok := w.placed(ci.FirstChunk, ci.FirstChunk+ci.NChunks); ok {
				before = c.BlobOff < off // several files may begin in one frame
				break
			}
		}
		if m < hi && before {
			best, lo = m, m+1
		} else {
			hi = mid
		}
	}
	return best, true
}
