package cache

import (
	"crypto/sha256"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
)

var errShort = errors.New("pack is shorter than what was written to it")

// Put keeps a chunk: data, which goes to off, is checked against digest
// ([ErrDigest]), written, and then visible. It becomes durable with the next
// flush. A chunk that is here already is not written again. [ErrFull] means that
// it was not kept; the caller still has the bytes. data is not kept.
func (p *Pack) Put(chunk uint32, off int64, data []byte, digest [32]byte) error {
	if chunk >= maxChunks || !validRange(off, int64(len(data))) {
		return fmt.Errorf("cache: keeping chunk %d of %q at %d+%d: %w", chunk, p.name, off, len(data), iofs.ErrInvalid)
	}
	if sha256.Sum256(data) != digest {
		return fmt.Errorf("cache: keeping chunk %d of %q: %w", chunk, p.name, ErrDigest)
	}
	if p.present(chunk, 1) {
		return nil
	}
	err := p.write(off, data, false, func() {
		p.setBits(chunk, 1)
		p.widen(off, int64(len(data)), chunk)
	})
	if err != nil {
		return fmt.Errorf("cache: keeping chunk %d of %q: %w", chunk, p.name, notKept(err))
	}
	return nil
}

func validRange(off, n int64) bool {
	return off >= 0 && n > 0 && off <= maxPack && n <= maxPack-off
}

// notKept makes err an ErrFull: whatever the reason, the disk did not take the bytes.
func notKept(err error) error {
	if errors.Is(err, ErrFull) {
		return err
	}
	return fmt.Errorf("%w: %v", ErrFull, err)
}

// write writes data at off, with room made for it. done runs under p.mu when the
// bytes are in the file.
func (p *Pack) write(off int64, data []byte, staged bool, done func()) error {
	if err := p.c.acquire(p); err != nil {
		return notKept(err)
	}
	defer p.c.release(p)
	f := p.file.Load()
	if f == nil { // removed
		return ErrFull
	}
	n := int64(len(data))
	var err error
	for try := range 2 {
		var end int64
		if end, err = p.begin(off, n, staged); err != nil {
			return err
		}
		err = p.writeTo(f, data, off, end)
		p.finish(off, n, func() {
			if err == nil && done != nil {
				done()
			}
		})
		if err == nil {
			p.c.tick(n)
			return nil
		}
		if errors.Is(err, errShort) {
			p.c.logf("cache: pack was made shorter; forgotten", "pack", p.name)
			p.reset()
			return err
		}
		// A full disk: what is oldest makes room once.
		if try > 0 || !isFull(err) || !p.c.freeDisk(n) {
			break
		}
	}
	return err
}

func (p *Pack) writeTo(f *os.File, data []byte, off, end int64) error {
	// A file that somebody made shorter must not grow again over a hole: the
	// chunks that were there would read as zeros.
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() < end {
		return errShort
	}
	if err := p.c.step("write"); err != nil {
		return err
	}
	_, err = f.WriteAt(data, off)
	return err
}

// begin reserves the blocks under [off, off+n) and keeps their segments from
// being evicted until finish. end is how long the pack must be.
func (p *Pack) begin(off, n int64, staged bool) (end int64, err error) {
	first, last := segRange(off, n)
	for range 4 {
		p.mu.Lock()
		for p.resetting || p.busy(first, last, staged) {
			p.cond.Wait()
		}
		if p.broken || (p.stage.Load() == stageOn) != staged {
			p.mu.Unlock()
			return 0, ErrFull
		}
		if staged {
			if old := p.visibleSegs(first, last); old != nil {
				p.mu.Unlock()
				if _, err := p.evictSegs(old); err != nil {
					return 0, err
				}
				continue
			}
		}
		need := p.missing(off, n)
		if p.c.reserve(need) {
			p.count(need)
			p.claimSegs(off, n, staged)
			end = p.end
			p.mu.Unlock()
			return end, nil
		}
		p.mu.Unlock()
		if !p.c.makeRoom(need) {
			return 0, ErrFull
		}
	}
	return 0, ErrFull
}

// claimSegs marks the blocks of [off, off+n) as occupied and its segments as being written.
func (p *Pack) claimSegs(off, n int64, staged bool) {
	first, last := segRange(off, n)
	now := p.c.clock.Load()
	for i := first; i <= last; i++ {
		s := p.needSeg(i)
		s.setBlocks(blockRange(i, off, n))
		s.writers++
		s.used.Store(now)
		if staged {
			s.state = segStaged
		}
	}
	p.writers++
}

func (p *Pack) finish(off, n int64, done func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	done()
	first, last := segRange(off, n)
	for i := first; i <= last; i++ {
		p.seg(i).writers--
	}
	p.writers--
	p.cond.Broadcast()
}

// busy reports whether a writer of segments [first, last] must wait: for an
// eviction, and a pass for the Puts that began before it.
func (p *Pack) busy(first, last int64, staged bool) bool {
	for i := first; i <= last; i++ {
		s := p.seg(i)
		if s == nil {
			continue
		}
		if s.state == segEvicting || staged && s.state == segPlain && s.writers > 0 {
			return true
		}
	}
	return false
}

// missing is how many bytes [off, off+n) would occupy more than now.
func (p *Pack) missing(off, n int64) (need int64) {
	first, last := segRange(off, n)
	for i := first; i <= last; i++ {
		from, to := blockRange(i, off, n)
		if s := p.seg(i); s != nil {
			need += s.countMissing(from, to) * blockSize
		} else {
			need += int64(to-from) * blockSize
		}
	}
	return need
}

// widen tells the segments under [off, off+n) that chunk has bytes there, all written.
func (p *Pack) widen(off, n int64, chunk uint32) {
	first, last := segRange(off, n)
	for i := first; i <= last; i++ {
		s := p.needSeg(i)
		s.widen(chunk, chunk+1, uint32(min(off+n-i*segSize, segSize)))
	}
	p.end = max(p.end, off+n)
}
