package fetch

import (
	"context"
	"errors"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// ReadAt reads the content of a regular file as soon as the bytes wanted have
// passed, or waits for them. n < len(buf) only at the end of the file.
//
// Errors: that of the pass; ctx's; [ErrNotKept], after the end of the pass, for
// bytes that passed and are not in the cache (any more); an error of io/fs for
// an id that is no regular file.
func (p *Pass) ReadAt(ctx context.Context, id unionfs.ID, buf []byte, off int64) (int, error) {
	for {
		p.mu.Lock()
		if p.err != nil {
			p.mu.Unlock()
			return 0, p.err
		}
		v, err := p.view(id)
		if err != nil {
			p.mu.Unlock()
			return 0, err
		}
		if off < 0 {
			off = 0
		}
		n := int(min(int64(len(buf)), max(v.size-off, 0)))
		if n == 0 {
			p.mu.Unlock()
			return 0, nil
		}
		if v.passed < off+int64(n) {
			if p.ended {
				p.mu.Unlock()
				return 0, ErrNotKept
			}
			wait := p.waitLocked()
			p.mu.Unlock()
			select {
			case <-wait:
			case <-ctx.Done():
				return 0, ctx.Err()
			}
			continue
		}
		if v.away {
			p.mu.Unlock()
			return p.fromCache(ctx, v.info, buf[:n], off)
		}
		ok, err := p.copyLocked(id, v, buf[:n], off)
		p.mu.Unlock()
		switch {
		case ok:
			return n, nil
		case errors.Is(err, cache.ErrNotStaged):
			return p.fromCache(ctx, v.info, buf[:n], off)
		case err != nil:
			return 0, err
		}
	}
}

// view is where the bytes of a file are now.
type view struct {
	info   unionfs.ContentInfo // with a digest when all has passed
	base   int64               // place in the pack
	size   int64
	passed int64
	away   bool // another pack has it
}

// view looks id up. The caller holds p.mu.
func (p *Pass) view(id unionfs.ID) (view, error) {
	if f := p.cur; f != nil && f.id == id {
		return view{base: f.packOff, size: f.size, passed: f.passed}, nil
	}
	ci, err := p.b.Content(id)
	if err != nil {
		return view{}, err
	}
	v := view{info: ci, base: ci.PackOff, size: ci.Size}
	if ci.Digest != (unionfs.Digest{}) {
		v.passed = ci.Size
		v.away = ci.NChunks > 0 && p.store.away.has(ci.FirstChunk)
	}
	return v, nil
}

// copyLocked fills b from what is pending and what is staged. ok is false when
// the file moved meanwhile: look again. The caller holds p.mu, which is given up
// while the pack is read.
func (p *Pass) copyLocked(id unionfs.ID, v view, b []byte, off int64) (ok bool, err error) {
	at := v.base + off
	for len(b) > 0 {
		n, limit := p.store.find(b, at)
		if n == 0 {
			p.mu.Unlock()
			n, err = p.pack.ReadStaged(b[:limit], at)
			p.mu.Lock()
			switch {
			case err != nil:
				return false, err
			case p.ended: // what is staged may be of another pass over the layer
				return false, cache.ErrNotStaged
			}
			// A duplicate may have been found, and its bytes dropped.
			if now, err := p.view(id); err != nil || now.base != v.base || now.away {
				return false, err
			}
		}
		b, at = b[n:], at+int64(n)
	}
	return true, nil
}

// fromCache reads a content that is not staged: the cache has it, or a Reader
// will bring it.
func (p *Pass) fromCache(ctx context.Context, ci unionfs.ContentInfo, b []byte, off int64) (int, error) {
	if ci.Digest != (unionfs.Digest{}) && ci.NChunks > 0 {
		if ok, err := p.c.ReadShared(ci.Digest, b, off); ok && err == nil {
			return len(b), nil
		}
		if ok, err := p.pack.ReadAt(b, ci.PackOff+off, ci.FirstChunk, ci.NChunks); ok && err == nil {
			return len(b), nil
		}
	}
	if err := p.Wait(ctx); err != nil {
		return 0, err
	}
	return 0, ErrNotKept
}

// waitLocked returns a channel that is closed when something has passed. The
// caller holds p.mu.
func (p *Pass) waitLocked() <-chan struct{} {
	if p.pulse == nil {
		p.pulse = make(chan struct{})
	}
	return p.pulse
}

// wake wakes who waits. The caller holds p.mu.
func (p *Pass) wake() {
	if p.pulse != nil {
		close(p.pulse)
		p.pulse = nil
	}
}
