package cache

import (
	"errors"
	"fmt"
	"io"
	iofs "io/fs"

	"golang.org/x/sys/unix"
)

// A pack is staging from the first Stage to Commit or Rollback. Bytes of a pass
// are counted and cannot be evicted, and no bit says that they are here.
const (
	stageNone  = iota
	stageOn    // Stage is taken, Put is not
	stageGone  // given up: the disk or the budget was full
	stageReady // committed; ReadStaged goes on while nothing has been evicted
)

// Stage keeps bytes of a streaming pass that are not verified yet. What the pack
// had at that place is dropped first: unverified bytes never touch visible ones.
// [ErrFull] gives staging up for this pack: what was staged goes, Staged is
// false, and every further Stage says ErrFull until Commit or Rollback.
func (p *Pack) Stage(off int64, data []byte) error {
	if !validRange(off, int64(len(data))) {
		if off >= 0 && len(data) == 0 {
			return nil
		}
		return fmt.Errorf("cache: staging %q at %d+%d: %w", p.name, off, len(data), iofs.ErrInvalid)
	}
	p.mu.Lock()
	if st := p.stage.Load(); st == stageNone || st == stageReady {
		p.stage.Store(stageOn)
	}
	p.mu.Unlock()
	if err := p.write(off, data, true, nil); err != nil {
		p.unstage(stageGone)
		return fmt.Errorf("cache: staging %q: %w", p.name, notKept(err))
	}
	p.writeBack(off, int64(len(data)))
	return nil
}

// writeBackStep is how much of a pass is left to the kernel before it is asked to
// begin writing it to the disk.
const writeBackStep = 4 << 20

// writeBack has the kernel begin to write what was staged, and waits only for room
// in the device's queue: Commit, which waits for all of it, would else have the
// whole layer to write at the end of the pass.
func (p *Pack) writeBack(off, n int64) {
	end := p.unwritten.Add(n)
	if end/writeBackStep == (end-n)/writeBackStep {
		return
	}
	f := p.file.Load()
	if f == nil {
		return
	}
	// Contents come in the order of their places, but for those in several layers.
	from := max(off+n-2*writeBackStep, 0)
	_ = withFD(f, func(fd int) error { // a hint; and a file that was closed beside us is none
		return unix.SyncFileRange(fd, from, off+n-from, unix.SYNC_FILE_RANGE_WRITE)
	})
}

// Staged reports whether the bytes of the running pass are being kept.
func (p *Pack) Staged() bool { return p.stage.Load() == stageOn }

// ReadStaged reads bytes that Stage has taken, as many as b holds; it is the
// caller's to know that they were. [ErrNotStaged] when they are not kept. It
// goes on after a Commit, until something of the pack is evicted.
func (p *Pack) ReadStaged(b []byte, off int64) (int, error) {
	if off < 0 || off > maxPack {
		return 0, fmt.Errorf("cache: reading staged bytes of %q at %d: %w", p.name, off, iofs.ErrInvalid)
	}
	if !p.stagedStill() {
		return 0, ErrNotStaged
	}
	n, err := 0, iofs.ErrClosed
	if f := p.file.Load(); f != nil {
		n, err = f.ReadAt(b, off)
	}
	if errors.Is(err, iofs.ErrClosed) { // beside us, see ReadAt
		if p.c.acquire(p) != nil {
			return 0, ErrNotStaged
		}
		defer p.c.release(p)
		f := p.file.Load()
		if f == nil { // removed
			return 0, ErrNotStaged
		}
		n, err = f.ReadAt(b, off)
	}
	if !p.stagedStill() {
		return 0, ErrNotStaged
	}
	if err == io.EOF {
		return n, ErrNotStaged
	}
	return n, err
}

func (p *Pack) stagedStill() bool {
	switch p.stage.Load() {
	case stageOn:
		return true
	case stageReady:
		return p.gen.Load() == p.stageGen.Load()
	}
	return false
}

// DropStaged gives back n staged bytes at off: a duplicate of what is kept
// elsewhere. Blocks that it shares with other bytes stay.
func (p *Pack) DropStaged(off, n int64) {
	if !validRange(off, n) {
		return
	}
	from := (off + blockSize - 1) / blockSize * blockSize
	to := (off + n) / blockSize * blockSize
	if to <= from {
		return
	}
	if p.c.acquire(p) != nil {
		return
	}
	defer p.c.release(p)
	p.mapMu.Lock()
	defer p.mapMu.Unlock()
	f := p.file.Load()
	if f == nil || p.stage.Load() != stageOn || punch(f, from, to-from) != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var freed int64
	first, last := segRange(from, to-from)
	for i := first; i <= last; i++ {
		s := p.seg(i)
		if s == nil || s.state != segStaged {
			continue
		}
		b0, b1 := blockRange(i, from, to-from)
		freed += (int64(b1-b0) - s.countMissing(b0, b1)) * blockSize
		s.clearBlocks(b0, b1)
	}
	p.account(-freed)
}

// Commit makes the staged bytes ordinary, verified ones: the pass matched.
// chunks tells for every number below n where the chunk is and whether it is
// here (false: dropped, or a hole). They are visible and durable when Commit
// returns; with an error, or after staging was given up, nothing is.
func (p *Pack) Commit(chunks func(n uint32) (off, size int64, here bool), n uint32) error {
	if n > maxChunks {
		p.unstage(stageNone)
		return fmt.Errorf("cache: committing %q: %d chunks: %w", p.name, n, iofs.ErrInvalid)
	}
	p.mu.Lock()
	if p.stage.Load() != stageOn {
		p.stage.Store(stageNone)
		p.mu.Unlock()
		return nil
	}
	p.mu.Unlock()
	if err := p.c.acquire(p); err != nil {
		return errors.Join(fmt.Errorf("cache: committing %q: %w", p.name, notKept(err)), p.Rollback())
	}
	defer p.c.release(p)
	// In batches: p.mu is not held for long, and chunks runs without it.
	const batch = 512
	var offs, sizes [batch]int64
	for at := uint32(0); at < n; {
		k := min(batch, n-at)
		for i := range k {
			off, size, here := chunks(at + i)
			if !here || !validRange(off, size) {
				size = 0
			}
			offs[i], sizes[i] = off, size
		}
		p.mu.Lock()
		for i := range k {
			if sizes[i] > 0 && p.whollyStaged(offs[i], sizes[i]) {
				p.setBits(at+i, 1)
				p.widen(offs[i], sizes[i], at+i)
			}
		}
		p.mu.Unlock()
		at += k
	}
	// The segments stay pinned until their bits are durable.
	err := p.flush(true)
	p.mu.Lock()
	if err == nil && p.stage.Load() == stageOn {
		p.stageGen.Store(p.gen.Load())
		p.endStage(stageReady)
	}
	p.mu.Unlock()
	if err != nil {
		return errors.Join(fmt.Errorf("cache: committing %q: %w", p.name, notKept(err)), p.Rollback())
	}
	return nil
}

func (p *Pack) whollyStaged(off, size int64) bool {
	first, last := segRange(off, size)
	for i := first; i <= last; i++ {
		s := p.seg(i)
		if s == nil || s.state != segStaged {
			return false
		}
	}
	return p.missing(off, size) == 0
}

// Rollback drops everything that was staged: the pass failed.
func (p *Pack) Rollback() error {
	if err := p.unstage(stageNone); err != nil {
		return fmt.Errorf("cache: dropping what was staged of %q: %v", p.name, err)
	}
	return nil
}

// endStage ends staging with state to. The caller holds p.mu.
func (p *Pack) endStage(to uint32) {
	if p.stage.Load() == stageOn {
		p.eachSeg(func(_ int64, s *segment) {
			if s.state == segStaged {
				s.state = segPlain
			}
		})
	}
	p.stage.Store(to)
}

// unstage punches out what is staged and ends staging with state to.
func (p *Pack) unstage(to uint32) error {
	p.mu.Lock()
	was := p.stage.Load()
	if was != stageOn {
		if to == stageNone {
			p.stage.Store(stageNone)
		}
		p.mu.Unlock()
		return nil
	}
	var all []victim
	p.eachSeg(func(i int64, s *segment) {
		if s.state == segStaged {
			all = append(all, victim{p: p, seg: i, used: ^uint32(0)})
		}
	})
	p.endStage(to)
	p.mu.Unlock()
	defer p.c.use(p)()
	_, err := p.evictSegs(all)
	return err
}

// visibleSegs are the segments of [first, last] that have bytes which are not of this pass.
func (p *Pack) visibleSegs(first, last int64) (old []victim) {
	for i := first; i <= last; i++ {
		if s := p.seg(i); s != nil && s.state == segPlain && s.lo < s.hi {
			old = append(old, victim{p: p, seg: i, used: ^uint32(0)})
		}
	}
	return old
}
