package fetch

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// ErrNotKept reports bytes that have passed and that the cache did not keep.
// They come from a Reader when the pass has ended.
var ErrNotKept = errors.New("bytes have passed and were not kept")

// Pass is one streaming pass over a layer without a table of contents: one
// request, decompressed once. On the way it computes the digests of the blob, of
// the uncompressed layer and of every content, tells the Builder what is in the
// layer, and stages the contents in the pack. What has passed can be read while
// the rest arrives; until the pass has ended and matched, that is the registry's
// word.
//
//	source ── blocks ──► inflate ── blocks ──► files ── batches ──► stage
//	 blob digest                  └─ blocks ─► diffID
//
// Each arrow is a bounded queue, so that a stage that is ahead waits.
type Pass struct {
	l    Layer
	b    *unionfs.Builder
	pack *cache.Pack
	c    *cache.Cache

	stop   context.CancelFunc
	done   chan struct{}
	format atomic.Uint32
	passed atomic.Int64 // bytes of the blob

	store batches

	mu    sync.Mutex // guards what follows, and what of store says so
	err   error      // of the pass; set before done is closed
	kept  error      // why contents were not kept
	ended bool
	cur   *bigFile
	pulse chan struct{} // closed when something has passed; nil when nobody waits
}

// bigFile is the file whose bytes are passing.
type bigFile struct {
	id      unionfs.ID
	packOff int64
	size    int64
	passed  int64
}

// StartPass streams l into b and pack, in goroutines that end with the pass:
// Close waits for them. When the pass has matched, b is complete and the pack has
// the contents; when it has not, b has failed and the pack has nothing of it.
// The pass does not close b or pack.
func StartPass(l Layer, b *unionfs.Builder, pack *cache.Pack, c *cache.Cache) *Pass {
	ctx, stop := context.WithCancel(context.Background())
	p := &Pass{l: l, b: b, pack: pack, c: c, stop: stop, done: make(chan struct{})}
	p.store.init()
	go func() {
		defer close(p.done)
		defer stop()
		p.run(ctx)
	}()
	return p
}

// Done is closed when the pass has ended, well or not.
func (p *Pass) Done() <-chan struct{} { return p.done }

// Err is why the pass failed: nil while it runs and when it matched. It is an
// *Error (ErrDigest: not the blob or the layer that the image names; ErrNotImage:
// not a layer), *unionfs.EntryError for an entry that no layer may have, or the
// failure of the request.
func (p *Pass) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Kept tells why contents were not kept, nil if all were: the cache was full, or
// its disk failed. The pass itself is well then.
func (p *Pass) Kept() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.kept
}

// Wait waits for the end of the pass and returns Err, or ctx's error.
func (p *Pass) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends the pass, which fails unless it had ended, and waits for it.
func (p *Pass) Close() error {
	p.stop()
	<-p.done
	return nil
}

// Format is the layer's format, 0 until the first bytes have come.
func (p *Pass) Format() Format { return Format(p.format.Load()) }

// Progress tells how many bytes of the blob have passed, and how many it has.
func (p *Pass) Progress() (done, total int64) { return p.passed.Load(), p.l.Blob.Size() }

// run is the pass.
func (p *Pass) run(ctx context.Context) {
	err := recovered(func() error { return p.stream(ctx) })
	if err == nil {
		err = recovered(p.commit)
	}
	if err != nil {
		recovered(p.pack.Rollback) // its failure leaves bytes that nobody can see
		recovered(func() error { p.b.Fail(err); return nil })
	}
	p.mu.Lock()
	p.err, p.cur, p.ended = err, nil, true
	p.wake()
	p.mu.Unlock()
}

// stream runs the goroutines of the pass and judges what came.
func (p *Pass) stream(ctx context.Context) error {
	if p.l.Desc.Digest.Algorithm != "sha256" {
		return p.fail(fmt.Errorf("digest is no sha256: %w", ErrNotImage))
	}
	g, ctx := errgroup.WithContext(ctx)
	var (
		stored = make(chan *block, maxBlocks)
		toHash = make(chan *block, maxBlocks)
		toTar  = make(chan *block, maxBlocks)
		blob   = &digester{}
		diff   = &digester{}
		bad    = make([]error, 2) // what is malformed: a digest that does not match is the better reason
	)
	start := func(fn func() error) { g.Go(func() error { return recovered(fn) }) }
	start(func() error { defer close(stored); return p.source(ctx, blob, stored) })
	start(func() (err error) {
		defer close(toTar)
		defer close(toHash)
		in := &blockReader{ctx: ctx, c: stored}
		bad[0], err = malformed(p.inflate(ctx, in, toHash, toTar))
		return drain(in, err)
	})
	start(func() error { return diff.hash(ctx, toHash) })
	start(func() (err error) {
		defer close(p.store.queue)
		in := &blockReader{ctx: ctx, c: toTar}
		bad[1], err = malformed(p.files(ctx, in))
		return drain(in, err)
	})
	start(func() error { return p.stage() })
	if err := g.Wait(); err != nil {
		return p.fail(err)
	}
	switch {
	case blob.n != p.l.Blob.Size():
		return p.fail(fmt.Errorf("%w: %d bytes came of %d", ErrDigest, blob.n, p.l.Blob.Size()))
	case blob.hex() != p.l.Desc.Digest.Hex:
		return p.fail(fmt.Errorf("%w: the bytes that came are sha256:%s", ErrDigest, blob.hex()))
	}
	for _, err := range bad {
		if err != nil {
			return p.fail(fmt.Errorf("%w: %v", ErrNotImage, err))
		}
	}
	if want := p.l.DiffID; want.Hex != "" && (want.Algorithm != "sha256" || want.Hex != diff.hex()) {
		return p.fail(fmt.Errorf("%w: uncompressed, the layer is sha256:%s, the config says %s", ErrDigest, diff.hex(), want))
	}
	return nil
}

// fail says which layer err is about. A host that gave wrong bytes is asked last
// from now on.
func (p *Pass) fail(err error) error {
	if errors.Is(err, ErrDigest) {
		suspect(p.l.Blob)
	}
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	return &Error{Op: "read layer", Ref: p.l.Desc.Digest.String(), Err: err}
}

// commit makes what has passed visible to everyone.
func (p *Pass) commit() error {
	p.b.Complete()
	if err := p.Kept(); err != nil {
		p.pack.Rollback()
		return nil
	}
	if err := p.store.commit(p.b, p.pack); err != nil {
		p.pack.Rollback()
		p.mu.Lock()
		p.kept = err
		p.mu.Unlock()
		return nil
	}
	p.store.share(p.b, p.c, p.pack.Hash())
	return nil
}

// locked runs fn under p.mu, which a panic of fn must not leave locked: run and
// all readers would wait for ever.
func (p *Pass) locked(fn func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fn()
}

// errMalformed marks what is wrong in the bytes themselves.
type errMalformed struct{ err error }

func (e errMalformed) Error() string { return e.err.Error() }

// malformed splits err: what the bytes are to blame for waits for the verdict on
// the blob's digest, everything else ends the pass.
func malformed(err error) (bad, fatal error) {
	if m := (errMalformed{}); errors.As(err, &m) {
		return m.err, nil
	}
	return nil, err
}

// drain reads in to its end, so that whoever sends can finish.
func drain(in *blockReader, err error) error {
	if err != nil {
		return err
	}
	buf := make([]byte, 4096)
	for {
		if _, err := in.Read(buf); err != nil {
			return in.ctx.Err()
		}
	}
}

// recovered turns a panic of fn into an error: hostile bytes may find a bug in a
// decoder, and it must cost one layer only.
func recovered(fn func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
		}
	}()
	return fn()
}
