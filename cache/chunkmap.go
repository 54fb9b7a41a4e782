package cache

import (
	"math/bits"
	"sync/atomic"
)

const (
	blockSize  = 4096    // space is counted in file system blocks of this size
	segSize    = 1 << 20 // space is evicted in segments of this size
	segBlocks  = segSize / blockSize
	blockWords = segBlocks / 64

	// The ceilings keep a hostile layer's numbers from costing memory: a chunk
	// number up to maxChunks costs 34,379 pointers, an offset up to maxPack 104,858.
	maxChunks = 1 << 27
	maxPack   = 1 << 40
)

// bitPage is a page of the map's bits: live is what readers see, disk is what the
// map file says (guarded by Pack.mapMu; a subset of live but for bits being cleared).
type bitPage struct {
	live  [bitWords]atomic.Uint64
	disk  [bitWords]uint64
	slot  int64 // place in the map file, 0 for none; Pack.mapMu
	dirty bool  // live has bits that disk has not; Pack.mu
}

// segment is 1 MiB of pack space. All but used are guarded by Pack.mu.
type segment struct {
	used    atomic.Uint32      // Cache.clock at the last use
	blocks  [blockWords]uint64 // which blocks occupy the disk
	lo, hi  uint32             // every visible chunk with bytes here is in [lo, hi); others may be too
	end     uint32             // end of the visible bytes in the segment
	writers uint16             // Puts and Stages that are writing into it
	state   segState
}

type segState uint8

const (
	segPlain    segState = iota
	segStaged            // holds bytes of a pass; not evictable
	segEvicting          // being punched out; writers wait
)

// segPage is a page of the map's segments.
type segPage struct {
	segs    [segsPerPage]segment
	touched atomic.Bool // a time of use changed
	dirty   bool        // anything else did; Pack.mu
	slot    int64       // Pack.mapMu
}

// pages is a growing array of pages that is read without a lock. Writers hold Pack.mu.
type pages[P any] struct {
	p atomic.Pointer[[]atomic.Pointer[P]]
}

func (a *pages[P]) at(i int) *P {
	all := a.p.Load()
	if all == nil || i >= len(*all) {
		return nil
	}
	return (*all)[i].Load()
}

func (a *pages[P]) len() int {
	if all := a.p.Load(); all != nil {
		return len(*all)
	}
	return 0
}

// need returns page i, made when it is missing.
func (a *pages[P]) need(i int) *P {
	if pg := a.at(i); pg != nil {
		return pg
	}
	if n := a.len(); i >= n {
		grown := make([]atomic.Pointer[P], max(i+1, n+n/2))
		for j := range n {
			grown[j].Store((*a.p.Load())[j].Load())
		}
		a.p.Store(&grown)
	}
	pg := new(P)
	(*a.p.Load())[i].Store(pg)
	return pg
}

// present reports whether chunks [first, first+n) are visible.
func (p *Pack) present(first, n uint32) bool {
	end := uint64(first) + uint64(n)
	for at := uint64(first); at < end; {
		pg := p.bits.at(int(at / chunksPerPage))
		if pg == nil {
			return false
		}
		in := at % chunksPerPage
		k := min(64-in%64, end-at, chunksPerPage-in)
		mask := (^uint64(0) >> (64 - k)) << (in % 64)
		if pg.live[in/64].Load()&mask != mask {
			return false
		}
		at += k
	}
	return true
}

// countBits is how many of chunks [first, first+n) are visible.
func (p *Pack) countBits(first, n uint32) (here uint32) {
	end := uint64(first) + uint64(n)
	for at := uint64(first); at < end; {
		in := at % chunksPerPage
		pg := p.bits.at(int(at / chunksPerPage))
		if pg == nil {
			at += chunksPerPage - in
			continue
		}
		k := min(64-in%64, end-at, chunksPerPage-in)
		mask := (^uint64(0) >> (64 - k)) << (in % 64)
		here += uint32(bits.OnesCount64(pg.live[in/64].Load() & mask))
		at += k
	}
	return here
}

// setBits makes chunks [first, first+n) visible. The caller holds p.mu.
func (p *Pack) setBits(first, n uint32) {
	for at := first; at < first+n; at++ {
		pg := p.bits.need(int(at / chunksPerPage))
		in := at % chunksPerPage
		pg.live[in/64].Or(1 << (in % 64))
		pg.dirty = true
	}
	p.fresh = true
	p.dirty.Store(true)
}

// clearBits hides chunks [lo, hi) and calls each with the number of every page
// whose bits on disk must be cleared too. The caller holds p.mapMu and p.mu.
func (p *Pack) clearBits(lo, hi uint32, each func(page int)) {
	for at := uint64(lo); at < uint64(hi); {
		i := int(at / chunksPerPage)
		in := at % chunksPerPage
		pg := p.bits.at(i)
		if pg == nil {
			at += chunksPerPage - in
			continue
		}
		k := min(64-in%64, uint64(hi)-at, chunksPerPage-in)
		mask := (^uint64(0) >> (64 - k)) << (in % 64)
		pg.live[in/64].And(^mask)
		if pg.disk[in/64]&mask != 0 {
			pg.disk[in/64] &^= mask
			each(i)
		}
		at += k
	}
}

// seg returns segment i, or nil when nothing was ever there.
func (p *Pack) seg(i int64) *segment {
	pg := p.segs.at(int(i / segsPerPage))
	if pg == nil {
		return nil
	}
	return &pg.segs[i%segsPerPage]
}

// needSeg returns segment i and marks its page dirty. The caller holds p.mu.
func (p *Pack) needSeg(i int64) *segment {
	pg := p.segs.need(int(i / segsPerPage))
	pg.dirty = true
	p.dirty.Store(true)
	return &pg.segs[i%segsPerPage]
}

// segRange is the segments that bytes [off, off+n) touch, n > 0.
func segRange(off, n int64) (first, last int64) {
	return off / segSize, (off + n - 1) / segSize
}

// blockRange is the blocks of segment i that bytes [off, off+n) touch.
func blockRange(i, off, n int64) (from, to int) {
	lo := max(off-i*segSize, 0)
	hi := min(off+n-i*segSize, segSize)
	return int(lo / blockSize), int((hi + blockSize - 1) / blockSize)
}

// countMissing is how many of the blocks [from, to) do not occupy the disk.
func (s *segment) countMissing(from, to int) int64 {
	var n int
	for b := from; b < to; {
		k := min(64-b%64, to-b)
		mask := (^uint64(0) >> (64 - k)) << (b % 64)
		n += bits.OnesCount64(mask &^ s.blocks[b/64])
		b += k
	}
	return int64(n)
}

func (s *segment) setBlocks(from, to int) {
	for b := from; b < to; b++ {
		s.blocks[b/64] |= 1 << (b % 64)
	}
}

func (s *segment) clearBlocks(from, to int) {
	for b := from; b < to; b++ {
		s.blocks[b/64] &^= 1 << (b % 64)
	}
}

// bytes is what the segment occupies on disk.
func (s *segment) bytes() int64 {
	var n int
	for _, w := range s.blocks {
		n += bits.OnesCount64(w)
	}
	return int64(n) * blockSize
}

// widen makes chunk [lo, hi) one of those that have bytes here, up to end.
func (s *segment) widen(lo, hi, end uint32) {
	if s.lo >= s.hi {
		s.lo, s.hi = lo, hi
	} else {
		s.lo, s.hi = min(s.lo, lo), max(s.hi, hi)
	}
	s.end = max(s.end, end)
}
