package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of this room, besides those of io/fs.
var (
	// ErrInUse reports that another server has the cache directory, or that a pack still has users.
	ErrInUse = errors.New("in use")
	// ErrVersion reports a cache directory written by a newer imgfs.
	ErrVersion = errors.New("made by a newer version")
	// ErrDigest reports bytes that do not match their digest. Nothing was kept.
	ErrDigest = errors.New("digest mismatch")
	// ErrFull reports that bytes were not kept: the budget or the disk is full
	// and nothing can be evicted, or the pack cannot take them now.
	ErrFull = errors.New("cache is full")
	// ErrNotStaged reports that the bytes of a streaming pass are not (or no longer) kept.
	ErrNotStaged = errors.New("not staged")
)

// Options of [Open]. The zero value is useful.
type Options struct {
	Size       int64                         // budget of the packs in bytes; 0: 20 % of what is free or already the packs'
	Log        func(msg string, args ...any) // told of damage and of failed writes (key, value pairs as in log/slog); may be nil
	FlushEvery time.Duration                 // how often new bits are made durable; 0: 5 s
}

// Usage says how full the cache is, in bytes.
type Usage struct {
	Limit int64 // the budget of the packs
	Used  int64 // what the packs occupy on disk
	Free  int64 // what the file system has left
}

// Cache is one cache directory, owned by one process. Its methods are safe for
// concurrent use.
//
// Lock order: evictMu, then Pack.fmu, then Pack.mapMu, then Pack.mu, then mu, then
// Pack.countMu. Nothing waits for the disk under the last three.
type Cache struct {
	dir   string
	root  *os.Root
	lock  *os.File
	opts  Options
	table *table

	limit   atomic.Int64
	used    atomic.Int64  // bytes of the blocks that packs occupy
	clock   atomic.Uint32 // coarse time of use, see evict.go
	written atomic.Int64  // bytes that were put, drives clock

	evictMu sync.Mutex // one eviction at a time
	wake    chan struct{}

	stop    chan struct{}
	scanned chan struct{} // closed when every pack's map has been loaded
	wg      sync.WaitGroup

	spared atomic.Int64 // the part of used that is in spare packs

	mu     sync.Mutex
	packs  map[key]*Pack
	idle   []*Pack      // open files that nothing runs on, oldest first; at most maxIdle
	spare  map[key]bool // packs that SetIdle was told of, there or not
	closed bool

	maxIdle int

	hook func(op string) error // tests: called before each step that changes the disk; an error is that step's
}

// Open opens the cache in directory dir, makes it when dir is missing or empty,
// and sweeps what a crash left. It takes the directory for this process:
// [ErrInUse] when another has it. A directory of a newer version ([ErrVersion])
// or one that is not empty and no cache (fs.ErrInvalid) is left untouched.
func Open(dir string, o Options) (*Cache, error) {
	if o.FlushEvery <= 0 {
		o.FlushEvery = 5 * time.Second
	}
	if o.Size < 0 {
		return nil, fmt.Errorf("cache: opening %q: negative size %d: %w", dir, o.Size, os.ErrInvalid)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("cache: opening %q: %w", dir, err)
	}
	root, lock, err := claim(dir)
	if err != nil {
		return nil, err
	}
	c := &Cache{
		dir: dir, root: root, lock: lock, opts: o,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), scanned: make(chan struct{}),
		packs: make(map[key]*Pack), spare: make(map[key]bool), maxIdle: idleLimit(),
	}
	c.limit.Store(o.Size)
	if err = c.sweep(); err == nil {
		c.table, err = openTable(c)
	}
	if err != nil {
		lock.Close()
		root.Close()
		return nil, fmt.Errorf("cache: opening %q: %w", dir, err)
	}
	c.wg.Go(func() { c.guard("scan", c.scan) })
	c.wg.Go(c.flusher)
	c.wg.Go(c.evictor)
	return c, nil
}

// Lock is the file by whose lock the directory is this process' own.
func (c *Cache) Lock() *os.File { return c.lock }

// Close makes everything durable and gives the directory up. Packs must not be
// used afterwards.
func (c *Cache) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	close(c.stop)
	c.wg.Wait()
	err := c.flushAll(true)
	for _, p := range c.allPacks() {
		p.closeFiles()
	}
	c.table.close()
	c.lock.Close() // releases the lock
	c.root.Close()
	return err
}

// CatalogPath is the host path of the catalogue.
func (c *Cache) CatalogPath() string { return filepath.Join(c.dir, "catalog.db") }

// TempDir is the host path of a directory for scratch files, on the file system
// of the cache. It is emptied when the cache is opened.
func (c *Cache) TempDir() string { return filepath.Join(c.dir, tempDir) }

// Usage tells how full the cache is. Right after Open it waits until the packs
// have been counted.
func (c *Cache) Usage() Usage {
	c.waitScan()
	return Usage{Limit: c.limit.Load(), Used: c.used.Load(), Free: c.free()}
}

// Sync makes everything that is visible durable.
func (c *Cache) Sync() error { return c.flushAll(true) }

// free is the space that the file system has left for us.
func (c *Cache) free() int64 {
	var st unix.Statfs_t
	if err := unix.Statfs(c.dir, &st); err != nil {
		return 0
	}
	return int64(st.Bavail) * st.Bsize
}

func (c *Cache) logf(msg string, args ...any) {
	if c.opts.Log != nil {
		c.opts.Log(msg, args...)
	}
}

func (c *Cache) allPacks() []*Pack {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]*Pack, 0, len(c.packs))
	for _, p := range c.packs {
		all = append(all, p)
	}
	return all
}

// waitScan waits until used is known. The scan needs no lock that a caller may hold.
func (c *Cache) waitScan() { <-c.scanned }

// scan loads every pack's map, which counts its blocks, and settles the budget.
func (c *Cache) scan() {
	defer close(c.scanned)
	for _, p := range c.allPacks() {
		select {
		case <-c.stop:
			return
		default:
		}
		if err := c.acquire(p); err != nil {
			c.logf("cache: pack left out", "pack", p.name, "err", err)
			continue
		}
		c.release(p)
	}
	if c.opts.Size == 0 {
		// Arithmetic: what others leave us is free plus what is ours already, so
		// that a restart does not shrink the budget.
		c.limit.Store((c.free() + c.used.Load()) / 5)
	}
}

// guard runs fn, a round of one of our goroutines. A panic costs that round only.
func (c *Cache) guard(name string, fn func()) {
	defer func() {
		if r := recover(); r != nil {
			c.logf("cache: panic", "in", name, "panic", r, "stack", string(debug.Stack()))
		}
	}()
	fn()
}

// step is called before each operation that changes the disk.
func (c *Cache) step(op string) error {
	if c.hook != nil {
		return c.hook(op)
	}
	return nil
}

// withFD calls fn with f's descriptor, again when a signal interrupted it.
func withFD(f *os.File, fn func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	err = conn.Control(func(fd uintptr) {
		for {
			if ferr = fn(int(fd)); ferr != syscall.EINTR {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	return ferr
}

func (c *Cache) datasync(f *os.File, op string) error {
	if err := c.step(op); err != nil {
		return err
	}
	return withFD(f, unix.Fdatasync)
}

// isFull reports whether err means that the disk has no room for us.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG) || errors.Is(err, ErrFull)
}
