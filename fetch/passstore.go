package fetch

import (
	"context"
	"sort"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// Contents on their way to the pack lie in batches, so that neighbours are
// written together.
const (
	batchSize  = plainChunk
	numBatches = 3
)

// batches is the last queue of a pass. Its batches are filled by the goroutine
// that reads the archive and emptied by the one that writes the pack; what is in
// them is read from them. All that readers see is under Pass.mu.
type batches struct {
	free  chan *batch
	queue chan *batch
	cur   *batch // being filled; may be nil

	pending []*batch     // with bytes that are not in the pack yet, in order; Pass.mu
	holes   []segment    // of the pack: zeros that were not staged, in order; Pass.mu
	away    bitSet       // first chunks of contents that another pack has; Pass.mu
	hole    bitSet       // chunks that are zeros; Pass.mu
	files   []unionfs.ID // a file of each content that the pack has, in order of the contents; Pass.mu
	chunks  uint32       // Pass.mu
}

// bitSet is a set of chunk numbers.
type bitSet []uint64

func (s *bitSet) add(n uint32) {
	for int(n) >= 64*len(*s) {
		*s = append(*s, 0)
	}
	(*s)[n/64] |= 1 << (n % 64)
}

func (s bitSet) has(n uint32) bool { return int(n) < 64*len(s) && s[n/64]&(1<<(n%64)) != 0 }

type batch struct {
	buf  []byte
	n    int       // bytes in use
	segs []segment // in order of off
	// A batch without a buffer is an order to forget what was staged at off.
	off, size int64
}

// segment is a run of bytes that adjoin in the pack.
type segment struct {
	off   int64 // in the pack
	start int   // in the batch
	n     int64
}

func (s *batches) init() {
	s.free = make(chan *batch, numBatches)
	s.queue = make(chan *batch, numBatches)
	for range numBatches {
		s.free <- &batch{}
	}
}

// room returns n bytes, at most batchSize, that put will give a place.
func (s *batches) room(ctx context.Context, p *Pass, n int64) ([]byte, error) {
	if s.cur != nil && int64(s.cur.n)+n > batchSize {
		if err := s.flush(ctx); err != nil {
			return nil, err
		}
	}
	if s.cur == nil {
		select {
		case s.cur = <-s.free:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if s.cur.buf == nil {
			s.cur.buf = make([]byte, batchSize)
		}
		p.mu.Lock()
		s.pending = append(s.pending, s.cur)
		p.mu.Unlock()
	}
	return s.cur.buf[s.cur.n : s.cur.n+int(n)], nil
}

// put gives the next n bytes of the room their place in the pack. The caller
// holds Pass.mu.
func (s *batches) put(off, n int64) {
	b := s.cur
	if k := len(b.segs) - 1; k >= 0 && b.segs[k].off+b.segs[k].n == off {
		b.segs[k].n += n
	} else {
		b.segs = append(b.segs, segment{off, b.n, n})
	}
	b.n += int(n)
}

// unput takes back the last n bytes that were put, which are neighbours. The
// caller holds Pass.mu.
func (s *batches) unput(n int64) {
	b := s.cur
	b.n -= int(n)
	for left := n; left > 0; {
		k := len(b.segs) - 1
		m := min(left, b.segs[k].n)
		left -= m
		if b.segs[k].n -= m; b.segs[k].n == 0 {
			b.segs = b.segs[:k]
		}
	}
}

// flush hands the current batch over.
func (s *batches) flush(ctx context.Context) error {
	if s.cur == nil {
		return nil
	}
	b := s.cur
	s.cur = nil
	return s.order(ctx, b)
}

// drop orders that n staged bytes at off are forgotten, after what was put before.
func (s *batches) drop(ctx context.Context, off, n int64) error {
	if err := s.flush(ctx); err != nil {
		return err
	}
	return s.order(ctx, &batch{off: off, size: n})
}

func (s *batches) order(ctx context.Context, b *batch) error {
	select {
	case s.queue <- b:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// stage writes batches to the pack until the queue is closed. When the cache is
// full, the pass goes on without keeping.
func (p *Pass) stage() error {
	laid := false
	for b := range p.store.queue {
		if b.buf == nil {
			p.pack.DropStaged(b.off, b.size)
			continue
		}
		var err error
		if !laid {
			err, laid = p.pack.SetLayout(layout(p.Format())), true
		}
		for _, seg := range b.segs {
			if err != nil || p.Kept() != nil {
				break
			}
			err = p.pack.Stage(seg.off, b.buf[seg.start:seg.start+int(seg.n)])
		}
		p.mu.Lock()
		if err != nil {
			p.kept = err
		}
		for i, q := range p.store.pending {
			if q == b {
				p.store.pending = append(p.store.pending[:i], p.store.pending[i+1:]...)
				break
			}
		}
		b.segs, b.n = b.segs[:0], 0
		p.mu.Unlock()
		p.store.free <- b
	}
	return nil
}

// addHole notes n zeros at off of the pack that were not staged. The caller holds
// Pass.mu.
func (s *batches) addHole(off, n int64) {
	if k := len(s.holes) - 1; k >= 0 && s.holes[k].off+s.holes[k].n == off {
		s.holes[k].n += n
		return
	}
	s.holes = append(s.holes, segment{off: off, n: n})
}

// at finds the run that covers off, or else the next one: ok is false.
func at(segs []segment, off int64) (seg segment, ok, next bool) {
	i := sort.Search(len(segs), func(i int) bool { return segs[i].off+segs[i].n > off })
	if i == len(segs) {
		return segment{}, false, false
	}
	return segs[i], segs[i].off <= off, true
}

// find copies to b what is pending at off of the pack. When nothing is, limit is
// how many bytes from there on are not. The caller holds Pass.mu.
func (s *batches) find(b []byte, off int64) (n int, limit int64) {
	limit = int64(len(b))
	if seg, ok, next := at(s.holes, off); ok {
		n = int(min(limit, seg.off+seg.n-off))
		clear(b[:n])
		return n, limit
	} else if next {
		limit = min(limit, seg.off-off)
	}
	for _, q := range s.pending {
		seg, ok, next := at(q.segs, off)
		if ok {
			return copy(b[:limit], q.buf[seg.start+int(off-seg.off):seg.start+int(seg.n)]), limit
		} else if next {
			limit = min(limit, seg.off-off)
		}
	}
	return 0, limit
}

// note keeps what commit and share need of a content. The caller holds Pass.mu.
func (s *batches) note(id unionfs.ID, ci unionfs.ContentInfo, elsewhere bool) {
	s.chunks = max(s.chunks, ci.FirstChunk+ci.NChunks)
	if elsewhere {
		s.away.add(ci.FirstChunk)
		return
	}
	s.files = append(s.files, id)
}

// commit makes the chunks that were staged ordinary ones.
func (s *batches) commit(b *unionfs.Builder, pack *cache.Pack) error {
	var ci unionfs.ContentInfo // that of the last chunk asked for
	next := 0                  // file of the content after it
	return pack.Commit(func(n uint32) (off, size int64, here bool) {
		for ; next < len(s.files) && n >= ci.FirstChunk+ci.NChunks; next++ {
			var err error
			if ci, err = b.Content(s.files[next]); err != nil {
				return 0, 0, false
			}
		}
		if n < ci.FirstChunk || n >= ci.FirstChunk+ci.NChunks || s.hole.has(n) {
			return 0, 0, false
		}
		in := int64(n-ci.FirstChunk) * plainChunk
		return ci.PackOff + in, min(plainChunk, ci.Size-in), true
	}, s.chunks)
}

// shareBatch bounds what share gives the cache at a time.
const shareBatch = 4096

// share tells the cache where each content of the layer is, the digests of which
// the pass has computed itself. It is a hint, so an error costs nothing but space.
func (s *batches) share(b *unionfs.Builder, c *cache.Cache, pack v1.Hash) {
	batch := make([]cache.Shared, 0, min(len(s.files), shareBatch))
	for i, id := range s.files {
		ci, err := b.Content(id)
		if err != nil {
			return
		}
		batch = append(batch, cache.Shared{Digest: ci.Digest, Location: cache.Location{
			Pack: pack, Off: ci.PackOff, Size: ci.Size, FirstChunk: ci.FirstChunk, NChunks: ci.NChunks,
		}})
		if len(batch) == shareBatch || i == len(s.files)-1 {
			if c.ShareMany(batch) != nil {
				return
			}
			batch = batch[:0]
		}
	}
}
