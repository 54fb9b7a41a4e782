package cache

import (
	"container/heap"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The clock is coarse: it grows with every 256 KiB put and with every flush, so
// that uses within a few seconds are equal and a read stores a time at most once
// in that while. 2^32 of them are a petabyte.
const clockBytes = 256 << 10

func (c *Cache) tick(n int64) {
	w := c.written.Add(n)
	if w/clockBytes != (w-n)/clockBytes {
		c.clock.Add(1)
	}
}

// raiseClock sets the clock past t, a time that a map remembers.
func (c *Cache) raiseClock(t uint32) {
	for {
		now := c.clock.Load()
		if now > t || t == ^uint32(0) || c.clock.CompareAndSwap(now, t+1) {
			return
		}
	}
}

// reserve takes n bytes of the budget when it has them.
func (c *Cache) reserve(n int64) bool {
	if n == 0 {
		return true
	}
	limit := c.limit.Load()
	used := c.used.Add(n)
	if used > limit {
		c.used.Add(-n)
		return false
	}
	if used > limit-margin(limit)/2 {
		select {
		case c.wake <- struct{}{}:
		default:
		}
	}
	return true
}

// margin is the room that the evictor keeps free: a sixteenth of the budget, at most 1 GiB.
func margin(limit int64) int64 { return min(limit/16, 1<<30) }

// makeRoom evicts until n bytes fit into the budget.
func (c *Cache) makeRoom(n int64) bool {
	c.waitScan()
	c.evictMu.Lock()
	defer c.evictMu.Unlock()
	for {
		limit := c.limit.Load()
		over := c.used.Load() + n - limit
		if over <= 0 {
			return true
		}
		if n > limit || c.evict(max(over, margin(limit))) == 0 {
			return false
		}
	}
}

// freeDisk evicts because the disk is full although the budget is not.
func (c *Cache) freeDisk(n int64) bool {
	c.waitScan()
	c.evictMu.Lock()
	defer c.evictMu.Unlock()
	return c.evict(max(2*n, min(margin(c.limit.Load()), 64<<20))) > 0
}

// evictor keeps some room free, beside the readers.
func (c *Cache) evictor() {
	c.waitScan()
	for {
		select {
		case <-c.stop: // the scan may have stopped before it knew the budget
			return
		default:
		}
		limit := c.limit.Load()
		if over := c.used.Load() - (limit - margin(limit)/2); over > 0 {
			c.guard("evictor", func() {
				c.evictMu.Lock()
				defer c.evictMu.Unlock()
				c.evict(over + margin(limit)/2)
			})
		}
		select {
		case <-c.stop:
			return
		case <-c.wake:
		}
	}
}

// victim is a segment to be evicted, unless it was used after used.
type victim struct {
	p     *Pack
	seg   int64
	used  uint32
	bytes int64
	spare bool // of a pack that nobody needs
}

// oldest is a heap of victims, the last to be evicted on top: the most recently
// used of the packs that somebody needs, then of the others.
type oldest []victim

func (h oldest) Len() int { return len(h) }
func (h oldest) Less(i, j int) bool {
	if h[i].spare != h[j].spare {
		return h[j].spare
	}
	return h[i].used > h[j].used
}
func (h oldest) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *oldest) Push(v any)   { *h = append(*h, v.(victim)) }
func (h *oldest) Pop() any {
	last := len(*h) - 1
	v := (*h)[last]
	*h = (*h)[:last]
	return v
}

// evict punches out least recently used segments of at least want bytes, as far
// as there are any, and says how much became free. The caller holds evictMu.
func (c *Cache) evict(want int64) (freed int64) {
	var h oldest
	var sum int64
	for _, p := range c.allPacks() {
		p.mu.Lock()
		p.eachEvictable(func(v victim) {
			heap.Push(&h, v)
			sum += v.bytes
			for sum-h[0].bytes >= want {
				sum -= heap.Pop(&h).(victim).bytes
			}
		})
		p.mu.Unlock()
	}
	byPack := make(map[*Pack][]victim)
	for _, v := range h {
		byPack[v.p] = append(byPack[v.p], v)
	}
	for p, vs := range byPack {
		if err := c.acquire(p); err != nil {
			continue
		}
		n, err := p.evictSegs(vs)
		c.release(p)
		freed += n
		if err != nil {
			c.logf("cache: segments not evicted", "pack", p.name, "err", err)
		}
	}
	return freed
}

func (p *Pack) eachEvictable(fn func(victim)) {
	if p.pinned || p.resetting {
		return
	}
	spare := p.spare.Load()
	p.eachSeg(func(i int64, s *segment) {
		if s.state != segPlain || s.writers > 0 {
			return
		}
		if n := s.bytes(); n > 0 {
			fn(victim{p: p, seg: i, used: s.used.Load(), bytes: n, spare: spare})
		}
	})
}

// evictSegs punches segments of p out: hides every chunk that has bytes in them,
// makes that durable, and only then lets the bytes go. The caller has p's files.
func (p *Pack) evictSegs(vs []victim) (freed int64, err error) {
	p.mapMu.Lock()
	defer p.mapMu.Unlock()
	f := p.file.Load()
	if f == nil {
		return 0, os.ErrClosed
	}
	touched := make(map[int]bool)
	p.mu.Lock()
	chosen := vs[:0:0]
	for _, v := range vs {
		s := p.seg(v.seg)
		if s == nil || s.state != segPlain || s.writers > 0 || s.used.Load() > v.used {
			continue
		}
		s.state = segEvicting
		p.clearBits(s.lo, s.hi, func(i int) { touched[i] = true })
		chosen = append(chosen, v)
	}
	p.gen.Add(1) // readers that saw a bit begin again
	p.mu.Unlock()

	gone := make([]bool, len(chosen))
	settled := false
	defer func() {
		if !settled { // a panic: who waits for the segments must not wait for ever
			p.evicted(chosen, gone)
		}
	}()
	err = p.clearOnDisk(touched)
	for i, v := range chosen {
		if err != nil {
			break
		}
		if err = p.c.step("punch"); err == nil {
			err = punch(f, v.seg*segSize, segSize)
		}
		gone[i] = err == nil
	}

	freed, settled = p.evicted(chosen, gone), true
	if errors.Is(err, unix.EOPNOTSUPP) { // no holes here: the whole pack or nothing
		had := p.stored.Load()
		if err = p.resetLocked(); err == nil {
			freed += had
		}
	}
	return freed, err
}

// evicted ends the eviction of segments, as far as their bytes are gone, and says
// how much became free.
func (p *Pack) evicted(chosen []victim, gone []bool) (freed int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, v := range chosen {
		s := p.needSeg(v.seg)
		s.state = segPlain
		if gone[i] {
			freed += s.bytes()
			s.blocks, s.lo, s.hi, s.end = [blockWords]uint64{}, 0, 0, 0
		}
	}
	p.account(-freed)
	p.cond.Broadcast()
	return freed
}

// clearOnDisk writes the pages that lost bits, as far as the file has them, and
// waits for the disk. When it cannot, the pack takes nothing more until a reset
// works. The caller holds mapMu.
func (p *Pack) clearOnDisk(touched map[int]bool) (err error) {
	if len(touched) == 0 {
		return nil
	}
	for i := range touched {
		if pg := p.bits.at(i); err == nil && pg != nil {
			err = p.writeBits(pg, i)
		}
	}
	if err == nil {
		err = p.c.datasync(p.mapFile, "clear-sync")
	}
	if err != nil {
		p.mu.Lock()
		p.broken = true
		p.dirty.Store(true)
		p.mu.Unlock()
	}
	return err
}

func punch(f *os.File, off, n int64) error {
	return withFD(f, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

// flusher makes new bits durable, and now and then the times of use.
func (c *Cache) flusher() {
	t := time.NewTicker(c.opts.FlushEvery)
	defer t.Stop()
	for n := 1; ; n++ {
		select {
		case <-c.stop:
			return
		case <-t.C:
		}
		c.clock.Add(1)
		c.guard("flusher", func() {
			if err := c.flushAll(n%12 == 0); err != nil {
				c.logf("cache: not flushed", "err", err)
			}
		})
	}
}
