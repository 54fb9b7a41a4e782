package cache

import (
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"sync"
	"sync/atomic"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// How many packs that nothing runs on keep their files open, two descriptors each:
// together an eighth of what the process may have, within these bounds.
const (
	minIdle = 32
	maxIdle = 1024
)

func idleLimit() int {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return minIdle
	}
	return int(min(max(r.Cur/16, minIdle), maxIdle))
}

// Pack is the cached contents of one layer: a sparse file and the map of what of
// it is here. Where a chunk lies is the layer index's word; a pack trusts it that
// chunks do not overlap and that a number always means the same place and bytes
// (see SetLayout). Its methods are safe for concurrent use.
type Pack struct {
	c    *Cache
	key  key
	name string // hexadecimal

	refs    int           // operations that need the files; Cache.mu
	handles int           // that Cache.Pack gave, and that were not closed; Cache.mu
	idle    bool          // in Cache.idle; Cache.mu
	dying   chan struct{} // being removed, closed when done; Cache.mu
	create  bool          // missing files are made; Cache.mu

	fmu    sync.Mutex // opening, loading and closing of the files
	loaded bool       // set under fmu and mapMu
	dead   bool       // removed: files of this name are another pack's; fmu
	file   atomic.Pointer[os.File]
	hot    atomic.Bool // the files were used since release last passed the pack over

	mapMu   sync.Mutex // the map file, and everything that punches or truncates the pack
	mapFile *os.File   // set under fmu
	slots   int64      // slots of the map file in use
	want    *[32]byte  // what SetLayout said last, whether it could be done or not

	gen atomic.Uint64 // grows after bits were cleared and before their bytes go

	mu        sync.Mutex // all below, and writing to bits and segs; never held over I/O, with one exception in ReadAt
	cond      *sync.Cond // a segment left segEvicting, writers drained, a reset ended
	bits      pages[bitPage]
	segs      pages[segPage]
	epoch     uint64 // random, new with every reset: binds slots and shared places to it
	layout    [32]byte
	pinned    bool
	writers   int
	resetting bool
	broken    bool  // the map could not be written: nothing is taken until a reset works
	fresh     bool  // bits were set since the pack was synced
	end       int64 // the pack is at least this long

	dirty  atomic.Bool
	stored atomic.Int64 // bytes of the blocks it occupies; changed under countMu

	countMu sync.Mutex  // makes stored, spare and Cache.spared change together
	spare   atomic.Bool // evicted before others, see SetIdle; changed under countMu

	stage     atomic.Uint32 // a stage constant
	stageGen  atomic.Uint64 // gen at the commit
	unwritten atomic.Int64  // bytes that were staged, for writeBack
}

// newPack makes a pack that has nothing. The caller holds c.mu, or is alone.
func newPack(c *Cache, k key) *Pack {
	p := &Pack{c: c, key: k, name: k.hex()}
	p.spare.Store(c.spare[k])
	p.cond = sync.NewCond(&p.mu)
	return p
}

// Pack opens the pack of the layer with blob digest h, or makes it. All callers
// share one. Each must Close what it got. That keeps the pack from being removed,
// not its files open: each operation opens them if need be. While the disk does
// not let them be opened or made (it is full), the pack has nothing and takes
// nothing: reading goes on without it.
func (c *Cache) Pack(h v1.Hash) (*Pack, error) {
	k, err := keyOf(h)
	if err != nil {
		return nil, fmt.Errorf("cache: opening pack %q: %w", h, err)
	}
	p, err := c.handle(k)
	if err != nil {
		return nil, fmt.Errorf("cache: opening pack %q: %v", h, err)
	}
	return p, nil
}

func (c *Cache) handle(k key) (*Pack, error) {
	c.mu.Lock()
	for {
		p := c.packs[k]
		if p == nil || p.dying == nil {
			break
		}
		c.mu.Unlock()
		<-p.dying
		c.mu.Lock()
	}
	if c.closed {
		c.mu.Unlock()
		return nil, iofs.ErrClosed
	}
	p := c.packs[k]
	if p == nil {
		p = newPack(c, k)
		c.packs[k] = p
	}
	p.create = true
	p.handles++
	c.mu.Unlock()
	if err := c.acquire(p); err != nil {
		c.logf("cache: pack cannot be opened", "pack", p.name, "err", err)
	} else {
		c.release(p)
	}
	return p, nil
}

// Hash is what the pack was opened by, and what [Location.Pack] names it by.
func (p *Pack) Hash() v1.Hash { return p.key.hash() }

// Close gives the pack back.
func (p *Pack) Close() error {
	p.c.mu.Lock()
	p.handles--
	p.c.mu.Unlock()
	return nil
}

// RemovePack removes the pack of a layer that nothing refers to any more.
// [ErrInUse] while somebody has it open.
func (c *Cache) RemovePack(h v1.Hash) error {
	k, err := keyOf(h)
	if err != nil {
		return fmt.Errorf("cache: removing pack %q: %w", h, err)
	}
	c.waitScan() // which would count it again
	c.mu.Lock()
	p := c.packs[k]
	if p == nil || p.dying != nil {
		c.mu.Unlock()
		return nil
	}
	if p.handles > 0 {
		c.mu.Unlock()
		return fmt.Errorf("cache: removing pack %q: %w", h, ErrInUse)
	}
	p.dying = make(chan struct{})
	p.create = false
	c.mu.Unlock()
	err = p.remove()
	c.mu.Lock()
	delete(c.packs, k)
	close(p.dying)
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("cache: removing pack %q: %v", h, err)
	}
	return nil
}

// remove unlinks the files, the map first: a pack without a map is swept.
func (p *Pack) remove() error {
	p.fmu.Lock()
	p.dead = true
	p.closeLocked() // waits for nobody: who still has the files works on nameless ones
	p.fmu.Unlock()
	p.mapMu.Lock()
	defer p.mapMu.Unlock()
	p.mu.Lock()
	p.forget()
	p.broken = true
	p.mu.Unlock()
	var errs []error
	for _, name := range []string{mapPath(p.name), packPath(p.name)} {
		if err := p.c.root.Remove(name); err != nil && !errors.Is(err, iofs.ErrNotExist) {
			errs = append(errs, err)
		}
		errs = append(errs, syncDir(p.c.root, packDir))
	}
	return errors.Join(errs...)
}

// Packs lists the layers that have a pack, in no order, with the bytes each
// occupies on disk.
func (c *Cache) Packs() map[v1.Hash]int64 {
	c.waitScan()
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make(map[v1.Hash]int64, len(c.packs))
	for k, p := range c.packs {
		all[k.hash()] = p.stored.Load()
	}
	return all
}

// acquire opens p's files, loads its map the first time, and keeps them open until release.
func (c *Cache) acquire(p *Pack) error {
	c.mu.Lock()
	p.refs++
	create := p.create
	c.mu.Unlock()
	p.fmu.Lock()
	err := p.open(create)
	p.fmu.Unlock()
	if err != nil {
		c.release(p)
	}
	return err
}

func (c *Cache) release(p *Pack) {
	var victim *Pack
	c.mu.Lock()
	p.refs--
	if p.refs == 0 && !p.idle {
		p.idle = true
		c.idle = append(c.idle, p)
		if len(c.idle) > c.maxIdle {
			// Readers hold no reference: what was used since the last time stays.
			for range c.maxIdle {
				if !c.idle[0].hot.Swap(false) {
					break
				}
				c.idle = append(c.idle, c.idle[0])[1:]
			}
			victim, c.idle = c.idle[0], c.idle[1:]
			victim.idle = false
		}
	}
	c.mu.Unlock()
	if victim == nil {
		return
	}
	victim.fmu.Lock()
	defer victim.fmu.Unlock()
	c.mu.Lock()
	busy := victim.refs > 0
	c.mu.Unlock()
	if !busy { // who comes now waits for fmu and opens them again
		victim.closeLocked()
	}
}

// use is acquire for who goes on without the files, if there is no way to have
// them, and finds them missing. What it returns is to be called in the end.
func (c *Cache) use(p *Pack) (done func()) {
	if c.acquire(p) != nil {
		return func() {}
	}
	return func() { c.release(p) }
}

// open makes p's files ready. The caller holds p.fmu.
func (p *Pack) open(create bool) error {
	if p.file.Load() != nil {
		p.hot.Store(true)
		return nil
	}
	if p.dead {
		return iofs.ErrClosed
	}
	flag := os.O_RDWR
	if create {
		flag |= os.O_CREATE
	}
	f, err := p.c.root.OpenFile(packPath(p.name), flag, 0o600)
	if err != nil {
		return err
	}
	m, err := p.c.root.OpenFile(mapPath(p.name), flag, 0o600)
	if err != nil {
		f.Close()
		return err
	}
	p.mapMu.Lock()
	defer p.mapMu.Unlock()
	p.mapFile = m
	if !p.loaded {
		if err := p.load(f); err != nil {
			f.Close()
			m.Close()
			p.mapFile = nil
			return err
		}
		p.loaded = true
	}
	p.file.Store(f)
	return nil
}

func (p *Pack) closeFiles() {
	p.fmu.Lock()
	defer p.fmu.Unlock()
	p.closeLocked()
}

func (p *Pack) closeLocked() {
	f := p.file.Swap(nil)
	if f == nil {
		return
	}
	p.mapMu.Lock()
	defer p.mapMu.Unlock()
	f.Close()
	p.mapFile.Close()
	p.mapFile = nil
}

// Has reports whether the n chunks from first are here. They may be evicted the
// moment after.
func (p *Pack) Has(first, n uint32) bool { return p.present(first, n) }

// Count is how many of the n chunks from first are here. They may be evicted the
// moment after.
func (p *Pack) Count(first, n uint32) uint32 { return p.countBits(first, n) }

// Stored is what the pack occupies on disk, in bytes.
func (p *Pack) Stored() int64 { return p.stored.Load() }

// ReadAt fills b with the bytes at off of the pack. ok is true only when all n
// chunks from first, which must be those that hold these bytes, are here and
// verified: then b is full. Otherwise b's bytes mean nothing. The error is for
// misuse only: what the disk cannot give any more is a miss, and is forgotten.
//
// Readers take no lock. An eviction clears bits, grows gen, then punches; a
// reader looks at gen, bits, bytes, gen. So an unchanged gen means that the
// bytes were there when they were read:
//
//	reader    gen ── bits ── pread ── gen
//	eviction        clear bits ── gen+1 ── sync map ── punch
//
// The files are closed beside readers when others need the descriptors; then the
// reader opens them again.
func (p *Pack) ReadAt(b []byte, off int64, first, n uint32) (ok bool, err error) {
	if off < 0 || off > maxPack || n == 0 {
		return false, fmt.Errorf("cache: reading pack %q at %d, %d chunks: %w", p.name, off, n, iofs.ErrInvalid)
	}
	if f := p.file.Load(); f != nil {
		if ok, err = p.readFrom(f, b, off, first, n); !errors.Is(err, iofs.ErrClosed) {
			return ok, err
		}
	}
	if !p.present(first, n) || p.c.acquire(p) != nil {
		return false, nil // the disk does not let us open it
	}
	defer p.c.release(p)
	f := p.file.Load()
	if f == nil { // removed
		return false, nil
	}
	if ok, err = p.readFrom(f, b, off, first, n); errors.Is(err, iofs.ErrClosed) {
		return false, nil
	}
	return ok, err
}

// readFrom is ReadAt from f. The error is fs.ErrClosed when f was closed meanwhile.
func (p *Pack) readFrom(f *os.File, b []byte, off int64, first, n uint32) (ok bool, err error) {
	for range 8 {
		gen := p.gen.Load()
		if !p.present(first, n) {
			return false, nil
		}
		_, err = f.ReadAt(b, off)
		if p.gen.Load() == gen {
			return p.wasRead(b, off, first, n, err)
		}
	}
	// Evictions nearby keep overtaking us: hold them off. They are the only ones
	// that wait for this read, and a Put.
	p.mu.Lock()
	if !p.present(first, n) {
		p.mu.Unlock()
		return false, nil
	}
	_, err = f.ReadAt(b, off)
	p.mu.Unlock()
	return p.wasRead(b, off, first, n, err)
}

func (p *Pack) wasRead(b []byte, off int64, first, n uint32, err error) (bool, error) {
	switch {
	case err == nil:
		p.touch(off, int64(len(b)))
		return true, nil
	case errors.Is(err, iofs.ErrClosed):
		return false, err
	case err == io.EOF:
		// Somebody made the pack shorter. What else of it is gone cannot be known.
		p.c.logf("cache: pack is shorter than its map says; forgotten", "pack", p.name)
		p.reset()
	default:
		p.c.logf("cache: unreadable chunks forgotten", "pack", p.name, "off", off, "err", err)
		if err := p.Drop(first, n); err != nil {
			p.reset()
		}
	}
	return false, nil
}

// touch notes the use of the segments that hold [off, off+n).
func (p *Pack) touch(off, n int64) {
	if n == 0 {
		return
	}
	if !p.hot.Load() {
		p.hot.Store(true)
	}
	now := p.c.clock.Load()
	first, last := segRange(off, n)
	for i := first; i <= last; i++ {
		pg := p.segs.at(int(i / segsPerPage))
		if pg == nil {
			continue
		}
		if s := &pg.segs[i%segsPerPage]; s.used.Load() != now {
			s.used.Store(now)
			if !pg.touched.Load() {
				pg.touched.Store(true)
			}
		}
	}
}

// Drop forgets the n chunks from first, durably: their bytes were found not to match their digest.
func (p *Pack) Drop(first, n uint32) error {
	if uint64(first)+uint64(n) > maxChunks {
		return fmt.Errorf("cache: dropping chunk %d: %w", first, iofs.ErrInvalid)
	}
	defer p.c.use(p)()
	p.mapMu.Lock()
	defer p.mapMu.Unlock()
	touched := make(map[int]bool)
	p.mu.Lock()
	p.clearBits(first, first+n, func(i int) { touched[i] = true })
	p.gen.Add(1)
	p.mu.Unlock()
	if err := p.clearOnDisk(touched); err != nil {
		return fmt.Errorf("cache: dropping chunks of %q: %v", p.name, err)
	}
	return nil
}

// Layout is the layout of what the pack has.
func (p *Pack) Layout() [32]byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.layout
}

// SetLayout tells which layout the chunk numbers and offsets that follow are of.
// What the pack has of another layout (the layer was compiled differently then)
// is dropped. Call it before anything else; a caller that never does has the
// zero layout. When it fails the pack has nothing and takes nothing, until a
// flush or a later opening of its files could do it.
func (p *Pack) SetLayout(layout [32]byte) error {
	defer p.c.use(p)()
	p.mapMu.Lock()
	defer p.mapMu.Unlock()
	p.mu.Lock()
	same := p.layout == layout
	p.want = &layout
	p.mu.Unlock()
	if same {
		return nil
	}
	if err := p.resetLocked(); err != nil {
		return fmt.Errorf("cache: laying out pack %q: %v", p.name, err)
	}
	return nil
}
