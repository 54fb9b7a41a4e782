package cache

import (
	"errors"
	iofs "io/fs"
	"os"
)

// flushAll makes the new bits of all packs durable; with times, the times of use too.
func (c *Cache) flushAll(times bool) error {
	var errs []error
	for _, p := range c.allPacks() {
		if !p.dirty.Load() && !(times && p.touched()) {
			continue
		}
		if err := c.acquire(p); err != nil {
			errs = append(errs, err)
			continue
		}
		if err := p.flush(times); err != nil {
			errs = append(errs, err)
		}
		c.release(p)
	}
	return errors.Join(errs...)
}

func (p *Pack) touched() bool {
	for j := range p.segs.len() {
		if pg := p.segs.at(j); pg != nil && pg.touched.Load() {
			return true
		}
	}
	return false
}

// bitSnap and segSnap are pages as they were when the pack was about to be synced.
type bitSnap struct {
	pg   *bitPage
	i    int
	live [bitWords]uint64
}

type segSnap struct {
	pg *segPage
	i  int
	s  slot
}

// flush makes the bits that are set now durable, in the only safe order:
//
//	bytes of the pack | sync | pages of segments | sync | pages of bits | sync (if all)
//
// A bit on disk needs its bytes; and its segment on disk must know of the chunk,
// or a later eviction would punch the bytes and leave the bit.
func (p *Pack) flush(all bool) error {
	p.mapMu.Lock()
	defer p.mapMu.Unlock()
	f := p.file.Load()
	if f == nil || p.mapFile == nil {
		return os.ErrClosed
	}
	p.mu.Lock()
	broken := p.broken
	p.mu.Unlock()
	if broken {
		return p.resetLocked()
	}
	bits, segs, fresh := p.snapshot(all)
	if fresh {
		if err := p.c.datasync(f, "pack-sync"); err != nil {
			// The kernel has forgotten which pages it could not write. So must we.
			p.c.logf("cache: pack not synced; forgotten", "pack", p.name, "err", err)
			return errors.Join(err, p.resetLocked())
		}
	}
	err := p.writePages(bits, segs, all)
	if err != nil {
		p.mu.Lock()
		for _, b := range bits {
			b.pg.dirty = true
		}
		for _, s := range segs {
			s.pg.dirty = true
		}
		p.dirty.Store(true)
		p.mu.Unlock()
	}
	return err
}

// snapshot copies the dirty pages and marks them clean. The caller holds mapMu.
func (p *Pack) snapshot(times bool) (bits []*bitSnap, segs []*segSnap, fresh bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dirty.Store(false)
	fresh, p.fresh = p.fresh, false
	for i := range p.bits.len() {
		pg := p.bits.at(i)
		if pg == nil || !pg.dirty {
			continue
		}
		pg.dirty = false
		b := &bitSnap{pg: pg, i: i}
		for w := range b.live {
			b.live[w] = pg.live[w].Load()
		}
		bits = append(bits, b)
	}
	for i := range p.segs.len() {
		pg := p.segs.at(i)
		if pg == nil || !pg.dirty && !(times && pg.touched.Load()) {
			continue
		}
		pg.dirty = false
		pg.touched.Store(false)
		s := &segSnap{pg: pg, i: i}
		pg.encode(&s.s)
		s.s.seal(kindSegments, uint32(i), p.epoch)
		segs = append(segs, s)
	}
	return bits, segs, fresh
}

func (p *Pack) writePages(bits []*bitSnap, segs []*segSnap, all bool) error {
	for _, s := range segs {
		if err := p.writeSlot(&s.s, &s.pg.slot); err != nil {
			return err
		}
	}
	if len(bits) == 0 {
		return nil
	}
	if err := p.c.datasync(p.mapFile, "segs-sync"); err != nil {
		return err
	}
	for _, b := range bits {
		b.pg.disk = b.live
		if err := p.writeBits(b.pg, b.i); err != nil {
			return err
		}
	}
	if all {
		return p.c.datasync(p.mapFile, "bits-sync")
	}
	return nil
}

// writeBits writes what disk says of a page.
func (p *Pack) writeBits(pg *bitPage, i int) error {
	var s slot
	for w, v := range pg.disk {
		le.PutUint64(s[slotHead+8*w:], v)
	}
	s.seal(kindBits, uint32(i), p.epoch)
	return p.writeSlot(&s, &pg.slot)
}

func (p *Pack) writeSlot(s *slot, at *int64) error {
	if p.mapFile == nil {
		return iofs.ErrClosed
	}
	if *at == 0 {
		*at = p.slots * slotSize
		p.slots++
	}
	if err := p.c.step("write-map"); err != nil {
		return err
	}
	_, err := p.mapFile.WriteAt(s[:], *at)
	return err
}
