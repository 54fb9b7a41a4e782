package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// A map file is slots of 512 bytes, a disk's sector, so that one is never torn:
//
//	0      4     6     8       12      16      24                512
//	| crc  | kind| ver | index | zero  | epoch | payload          |
//
// Slot 0 is the header; pages of bits and of segments take slots as they are
// needed. docs/cache.md draws the payloads.
const (
	slotSize    = 512
	slotHead    = 24
	slotPayload = slotSize - slotHead

	bitWords      = slotPayload / 8 // 61
	chunksPerPage = bitWords * 64   // 3904
	segRecord     = blockWords*8 + 4*4
	segsPerPage   = slotPayload / segRecord // 488/48 = 10

	mapVersion = 1
	mapMagic   = "imgfsmap"

	kindHeader   = 1
	kindSegments = 2
	kindBits     = 3

	flagPinned = 1

	maxSlots = 1 + maxChunks/chunksPerPage + 1 + maxPack/segSize/segsPerPage + 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var le = binary.LittleEndian

var errDamaged = errors.New("damaged map")

type slot [slotSize]byte

func (s *slot) seal(kind uint16, index uint32, epoch uint64) {
	le.PutUint16(s[4:], kind)
	le.PutUint16(s[6:], mapVersion)
	le.PutUint32(s[8:], index)
	le.PutUint64(s[16:], epoch)
	le.PutUint32(s[0:], crc32.Checksum(s[4:], castagnoli))
}

func (s *slot) ok() bool {
	return le.Uint32(s[0:]) == crc32.Checksum(s[4:], castagnoli) && le.Uint16(s[6:]) == mapVersion
}
func (s *slot) kind() uint16  { return le.Uint16(s[4:]) }
func (s *slot) index() uint32 { return le.Uint32(s[8:]) }
func (s *slot) epoch() uint64 { return le.Uint64(s[16:]) }

// header is the payload of slot 0: magic 8, key 32, layout 32, flags 4.
func (p *Pack) header(epoch uint64, layout [32]byte, pinned bool) *slot {
	var s slot
	b := s[slotHead:]
	copy(b, mapMagic)
	copy(b[8:], p.key[:])
	copy(b[40:], layout[:])
	if pinned {
		le.PutUint32(b[72:], flagPinned)
	}
	s.seal(kindHeader, 0, epoch)
	return &s
}

// encodeSegs fills s with a page of segments: blocks 32, lo 4, hi 4, end 4, used 4 each.
func (pg *segPage) encode(s *slot) {
	for i := range pg.segs {
		g := &pg.segs[i]
		b := s[slotHead+i*segRecord:]
		for w, v := range g.blocks {
			le.PutUint64(b[8*w:], v)
		}
		le.PutUint32(b[32:], g.lo)
		le.PutUint32(b[36:], g.hi)
		le.PutUint32(b[40:], g.end)
		le.PutUint32(b[44:], g.used.Load())
	}
}

func (pg *segPage) decode(s *slot) error {
	for i := range pg.segs {
		g := &pg.segs[i]
		b := s[slotHead+i*segRecord:]
		for w := range g.blocks {
			g.blocks[w] = le.Uint64(b[8*w:])
		}
		g.lo, g.hi, g.end = le.Uint32(b[32:]), le.Uint32(b[36:]), le.Uint32(b[40:])
		g.used.Store(le.Uint32(b[44:]))
		if g.lo > g.hi || g.hi > maxChunks || g.end > segSize {
			return errDamaged
		}
	}
	return nil
}

// load reads the map and compares it with the pack file f. A damaged map is
// emptied. The caller holds fmu and mapMu; nobody else knows the pack yet.
func (p *Pack) load(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	err = p.decodeMap(io.NewSectionReader(p.mapFile, 0, maxSlots*slotSize))
	switch {
	case err == nil && p.end > st.Size():
		err = fmt.Errorf("pack has %d of %d bytes", st.Size(), p.end)
	case err == nil && p.layout != p.wanted():
		err = errors.New("of another layout")
	}
	if err != nil {
		if !errors.Is(err, io.EOF) { // new
			p.c.logf("cache: map dropped", "pack", p.name, "err", err)
		}
		p.forget()
		return p.wipe(f, p.wanted())
	}
	return p.settle(f)
}

// decodeMap fills bits and segs from r. io.EOF: r is empty.
func (p *Pack) decodeMap(r io.Reader) error {
	var s slot
	if _, err := io.ReadFull(r, s[:]); err != nil {
		if err == io.ErrUnexpectedEOF {
			err = errDamaged
		}
		return err
	}
	b := s[slotHead:]
	if !s.ok() || s.kind() != kindHeader || string(b[:8]) != mapMagic || key(b[8:40]) != p.key {
		return errDamaged
	}
	p.mu.Lock() // who looks for a shared content asks every pack
	p.epoch = s.epoch()
	p.layout = [32]byte(b[40:72])
	p.pinned = le.Uint32(b[72:])&flagPinned != 0
	p.mu.Unlock()
	p.slots = 1
	for {
		if _, err := io.ReadFull(r, s[:]); err != nil {
			if err == io.EOF || err == io.ErrUnexpectedEOF { // the rest of a slot was never written
				return nil
			}
			return err
		}
		at := p.slots * slotSize
		p.slots++
		if s == (slot{}) || s.ok() && s.epoch() != p.epoch {
			continue // never written, or of before a reset
		}
		if !s.ok() {
			return errDamaged // it may have been a page of segments: what bits promise cannot be known
		}
		if err := p.decodeSlot(&s, at); err != nil {
			return err
		}
	}
}

func (p *Pack) decodeSlot(s *slot, at int64) error {
	i := s.index()
	switch s.kind() {
	case kindSegments:
		if i >= maxPack/segSize/segsPerPage+1 || p.segs.at(int(i)) != nil {
			return errDamaged
		}
		pg := p.segs.need(int(i))
		pg.slot = at
		if err := pg.decode(s); err != nil {
			return err
		}
		for j := range pg.segs {
			if g := &pg.segs[j]; g.end > 0 {
				p.end = max(p.end, (int64(i)*segsPerPage+int64(j))*segSize+int64(g.end))
			}
		}
	case kindBits:
		if i >= maxChunks/chunksPerPage+1 || p.bits.at(int(i)) != nil {
			return errDamaged
		}
		pg := p.bits.need(int(i))
		pg.slot = at
		for w := range pg.disk {
			pg.disk[w] = le.Uint64(s[slotHead+8*w:])
			pg.live[w].Store(pg.disk[w])
		}
	default:
		return errDamaged
	}
	return nil
}

// settle counts the blocks. When the pack occupies clearly more or less than its
// map knows (a crash), the map learns where, and what no chunk is in is punched out.
func (p *Pack) settle(f *os.File) error {
	var known int64
	var newest uint32
	p.eachSeg(func(_ int64, s *segment) {
		known += s.bytes()
		newest = max(newest, s.used.Load())
	})
	p.c.raiseClock(newest)
	var st unix.Stat_t
	if err := withFD(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return err
	}
	// The slack is for the file system's own blocks (extent trees).
	if diff := st.Blocks*512 - known; max(diff, -diff) > known/256+4*blockSize {
		if err := p.learnBlocks(f, st.Size); err != nil {
			return err
		}
	}
	known = 0
	p.eachSeg(func(_ int64, s *segment) { known += s.bytes() })
	p.account(known)
	return nil
}

// learnBlocks asks the file system where the pack has data.
func (p *Pack) learnBlocks(f *os.File, size int64) error {
	p.eachSeg(func(_ int64, s *segment) { s.blocks = [blockWords]uint64{} })
	size = min(size, maxPack)
	for at := int64(0); at < size; {
		var from, to int64
		err := withFD(f, func(fd int) (err error) {
			if from, err = unix.Seek(fd, at, unix.SEEK_DATA); err != nil {
				return err
			}
			to, err = unix.Seek(fd, from, unix.SEEK_HOLE)
			return err
		})
		if errors.Is(err, unix.ENXIO) {
			return nil // only a hole is left
		}
		if err != nil {
			return err
		}
		to = min(to, maxPack)
		if to <= from {
			return nil
		}
		first, last := segRange(from, to-from)
		for i := first; i <= last; i++ {
			s := p.needSeg(i)
			if s.lo == s.hi { // nothing visible: bytes of a crash
				start := max(i*segSize, from/blockSize*blockSize)
				if punch(f, start, min((i+1)*segSize, to)-start) == nil {
					continue
				}
			}
			b0, b1 := blockRange(i, from, to-from)
			s.setBlocks(b0, b1)
		}
		at = to
	}
	return nil
}

func (p *Pack) eachSeg(fn func(i int64, s *segment)) {
	for j := range p.segs.len() {
		if pg := p.segs.at(j); pg != nil {
			for i := range pg.segs {
				fn(int64(j)*segsPerPage+int64(i), &pg.segs[i])
			}
		}
	}
}

// account notes that the pack occupies n bytes more.
func (p *Pack) account(n int64) {
	p.count(n)
	p.c.used.Add(n)
}

// count is account for bytes of which Cache.used knows already.
func (p *Pack) count(n int64) {
	p.countMu.Lock()
	defer p.countMu.Unlock()
	p.stored.Add(n)
	if p.spare.Load() {
		p.c.spared.Add(n)
	}
}

// wanted is the layout that the users of the pack have. The caller holds mapMu.
func (p *Pack) wanted() [32]byte {
	if p.want != nil {
		return *p.want
	}
	return p.layout
}

// forget empties what memory knows. The caller holds p.mu, or is alone.
func (p *Pack) forget() {
	p.bits.p.Store(nil)
	p.segs.p.Store(nil)
	p.gen.Add(1)
	p.fresh, p.end = false, 0
	p.account(-p.stored.Load())
}

// wipe makes both files empty under a new epoch: first the map, durably, then
// the pack. The caller holds mapMu and has called forget.
func (p *Pack) wipe(f *os.File, layout [32]byte) error {
	epoch := rand.Uint64() | 1
	p.mu.Lock()
	pinned := p.pinned
	p.mu.Unlock()
	if err := p.c.step("wipe-map"); err != nil {
		return err
	}
	if _, err := p.mapFile.WriteAt(p.header(epoch, layout, pinned)[:], 0); err != nil {
		return err
	}
	if err := p.c.datasync(p.mapFile, "wipe-sync"); err != nil {
		return err
	}
	if err := p.mapFile.Truncate(slotSize); err != nil {
		return err
	}
	p.slots = 1
	if err := p.c.step("wipe-pack"); err != nil {
		return err
	}
	if err := f.Truncate(0); err != nil {
		return err
	}
	p.mu.Lock()
	p.epoch, p.layout = epoch, layout
	p.mu.Unlock()
	return nil
}

// reset forgets the whole pack.
func (p *Pack) reset() {
	defer p.c.use(p)()
	p.mapMu.Lock()
	defer p.mapMu.Unlock()
	if err := p.resetLocked(); err != nil {
		p.c.logf("cache: pack not emptied", "pack", p.name, "err", err)
	}
}

// resetLocked forgets the whole pack, in memory at once, and gives it the layout
// that is wanted. Writers are waited for: what they write late must not fall on
// what comes after. The caller holds mapMu, and has the files: else the pack takes
// nothing until the flusher has emptied them.
func (p *Pack) resetLocked() error {
	if !p.loaded { // load will see what is wanted
		return os.ErrClosed
	}
	p.mu.Lock()
	p.resetting = true
	for p.writers > 0 {
		p.cond.Wait()
	}
	p.forget()
	p.endStage(stageNone)
	p.mu.Unlock()
	err := os.ErrClosed
	if f := p.file.Load(); f != nil && p.mapFile != nil {
		err = p.wipe(f, p.wanted())
	}
	p.mu.Lock()
	p.broken = err != nil
	p.resetting = false
	if err != nil {
		p.dirty.Store(true) // the flusher tries again
	}
	p.cond.Broadcast()
	p.mu.Unlock()
	return err
}

// Pin says whether a pack may be evicted; a pinned one never is. It survives a restart.
func (c *Cache) Pin(h v1.Hash, pinned bool) error {
	p, err := c.Pack(h)
	if err != nil {
		return err
	}
	defer p.Close()
	defer c.use(p)()
	p.mapMu.Lock()
	defer p.mapMu.Unlock()
	if p.mapFile == nil {
		return fmt.Errorf("cache: pinning pack %q: its files cannot be opened", h)
	}
	p.mu.Lock()
	p.pinned = pinned
	head := p.header(p.epoch, p.layout, pinned)
	p.mu.Unlock()
	if _, err = p.mapFile.WriteAt(head[:], 0); err == nil {
		err = c.datasync(p.mapFile, "pin-sync")
	}
	if err != nil {
		return fmt.Errorf("cache: pinning pack %q: %v", h, err)
	}
	return nil
}
