package cache

import (
	"crypto/sha256"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// SetIdle says whether a pack is of no use to anybody at present. What an idle
// pack has is evicted before anything of the others, whatever its age. The pack
// need not be there: it is idle from its beginning then. A restart forgets it.
func (c *Cache) SetIdle(h v1.Hash, idle bool) {
	k, err := keyOf(h)
	if err != nil {
		return // no pack has that name
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if idle {
		c.spare[k] = true
	} else {
		delete(c.spare, k)
	}
	p := c.packs[k]
	if p == nil {
		return
	}
	p.countMu.Lock()
	defer p.countMu.Unlock()
	if p.spare.Swap(idle) == idle {
		return
	}
	if idle {
		c.spared.Add(p.stored.Load())
	} else {
		c.spared.Add(-p.stored.Load())
	}
}

// IdleUsed is what the idle packs occupy on disk, in bytes. Right after Open it
// waits until the packs have been counted.
func (c *Cache) IdleUsed() int64 {
	c.waitScan()
	return c.spared.Load()
}

// StoredOf is what the pack h occupies on disk, in bytes; 0 when there is none.
// Right after Open it waits until the packs have been counted.
func (c *Cache) StoredOf(h v1.Hash) int64 {
	k, err := keyOf(h)
	if err != nil {
		return 0
	}
	c.waitScan()
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.packs[k]; p != nil {
		return p.stored.Load()
	}
	return 0
}

// PackNames lists the layers that have a pack, in no order. Unlike Packs it does
// not wait until they have been counted.
func (c *Cache) PackNames() []v1.Hash {
	c.mu.Lock()
	defer c.mu.Unlock()
	names := make([]v1.Hash, 0, len(c.packs))
	for k := range c.packs {
		names = append(names, k.hash())
	}
	return names
}

// ClearPack forgets everything that the pack h has, and returns how many bytes
// became free. Its readers miss from then on. One that nobody has open is
// removed.
func (c *Cache) ClearPack(h v1.Hash) (freed int64, err error) {
	had := c.StoredOf(h)
	if err = c.RemovePack(h); err == nil {
		return had, nil
	}
	if !errors.Is(err, ErrInUse) {
		return 0, err
	}
	p, err := c.Pack(h)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	return p.clear()
}

// clear forgets everything that the pack has, and returns what it occupied.
func (p *Pack) clear() (freed int64, err error) {
	defer p.c.use(p)()
	p.mapMu.Lock()
	defer p.mapMu.Unlock()
	had := p.stored.Load()
	if err := p.resetLocked(); err != nil {
		return 0, fmt.Errorf("cache: clearing pack %q: %v", p.name, err)
	}
	return had, nil
}

// Each calls fn for every installed file of kind k that is there when it is
// called, in no order, until fn returns an error, which it returns.
func (c *Cache) Each(k Kind, fn func(v1.Hash) error) error {
	dir, ext := k.place()
	names, err := c.readNames(dir)
	if err != nil {
		return fmt.Errorf("cache: listing %q: %v", dir, err)
	}
	for _, name := range names {
		base, ok := strings.CutSuffix(name, ext)
		if !ok {
			continue
		}
		if id, ok := parseKey(base); ok {
			if err := fn(id.hash()); err != nil {
				return err
			}
		}
	}
	return nil
}

// VerifyBlob reads a blob and compares it with its digest. [ErrDigest] when it
// does not match, fs.ErrNotExist when it is not here. It keeps and removes
// nothing.
func (c *Cache) VerifyBlob(h v1.Hash) error {
	id, err := keyOf(h)
	if err != nil {
		return fmt.Errorf("cache: checking blob %q: %w", h, err)
	}
	f, err := c.root.Open(Blob.path(id))
	if err == nil {
		defer f.Close()
		err = checkFile(f, id)
	}
	if err != nil {
		return fmt.Errorf("cache: checking blob %q: %w", h, err)
	}
	return nil
}

// VerifyChunk reads a chunk, size bytes at off, and compares it with its digest.
// here is false when it is not in the pack, or was evicted meanwhile. The error
// is [ErrDigest], or that of the disk; the chunk stays (see Drop). That it was
// read does not count as a use. buf is what it may read at a time.
func (p *Pack) VerifyChunk(buf []byte, chunk uint32, off, size int64, digest [32]byte) (here bool, err error) {
	if len(buf) == 0 || chunk >= maxChunks || !validRange(off, size) {
		return false, fmt.Errorf("cache: checking chunk %d of %q at %d+%d: %w", chunk, p.name, off, size, iofs.ErrInvalid)
	}
	if !p.present(chunk, 1) || p.c.acquire(p) != nil {
		return false, nil
	}
	defer p.c.release(p)
	f := p.file.Load()
	if f == nil { // removed
		return false, nil
	}
	sum := sha256.New()
	for at := int64(0); at < size; {
		b := buf[:min(int64(len(buf)), size-at)]
		if here, err := p.peek(f, b, off+at, chunk); !here || err != nil {
			return here, err
		}
		sum.Write(b)
		at += int64(len(b))
	}
	if [32]byte(sum.Sum(nil)) != digest {
		// A chunk that was evicted and came again is the same chunk: it was wrong.
		return true, fmt.Errorf("cache: chunk %d of pack %q: %w", chunk, p.name, ErrDigest)
	}
	return true, nil
}

// peek is ReadAt for one chunk, but notes nothing.
func (p *Pack) peek(f *os.File, b []byte, off int64, chunk uint32) (here bool, err error) {
	for range 8 {
		gen := p.gen.Load()
		if !p.present(chunk, 1) {
			return false, nil
		}
		_, err := f.ReadAt(b, off)
		if p.gen.Load() != gen {
			continue
		}
		if err != nil && !errors.Is(err, iofs.ErrClosed) {
			return true, fmt.Errorf("cache: reading chunk %d of pack %q: %v", chunk, p.name, err)
		}
		return err == nil, nil
	}
	return false, nil // evictions nearby keep overtaking us
}
