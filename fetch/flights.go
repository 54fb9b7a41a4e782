package fetch

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	iofs "io/fs"
	"slices"
	"sync/atomic"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// flight is a chunk on its way from the registry. It is in Reader.flights until
// it has landed, and who waits keeps its bytes.
type flight struct {
	done   chan struct{}
	replay bool   // it comes by the replay of the whole layer
	j      *job   // that brings it, if it comes along with others; Reader.mu
	wanted bool   // a reader waits, or has waited; Reader.mu
	landed bool   // done is closed; Reader.mu
	data   []byte // both set before done is closed
	err    error
}

// job is one ranged request and the chunks that come out of it.
type job struct {
	prio    Priority
	off, n  int64
	chunks  []jobChunk   // in the order of their places
	guess   bool         // of a Prefetch, at least in part
	started bool         // the request is under way; Reader.mu
	pos     atomic.Int64 // in the blob: chunks before it have landed
}

// far reports whether a chunk that nobody had asked for is not about to come: its
// request waits for its turn, or has much to bring before it and is no read-ahead of
// a reader, who is about to need that too.
func (f *flight) far(c *unionfs.Chunk) bool {
	switch {
	case f.j == nil || f.j.prio == Demand && !f.j.guess:
		return false
	case !f.j.started:
		return true
	}
	return f.j.guess && c.BlobOff-f.j.pos.Load() > maxGap+c.BlobLen
}

// jobChunk is a chunk of a job.
type jobChunk struct {
	n       uint32
	c       unionfs.Chunk
	size    int64
	packOff int64
	f       *flight              // nil when it has landed
	last    *unionfs.ContentInfo // of the content that the chunk is the last of, else nil
}

// register returns the flight of chunk n, and whether it is a new one. The
// caller holds r.mu.
func (r *Reader) register(n uint32) (f *flight, created bool) {
	if f := r.flights[n]; f != nil {
		return f, false
	}
	f = &flight{done: make(chan struct{})}
	r.flights[n] = f
	return f, true
}

// join is register for a reader, who waits for the chunk: a flight that is far
// gives way to one of the reader's own. Nobody waits for that one, and its job, from,
// passes the chunk over. The caller holds r.mu.
func (r *Reader) join(n uint32, c *unionfs.Chunk) (f *flight, created bool, from *job) {
	if f := r.flights[n]; f != nil && !f.wanted && f.far(c) {
		from = f.j
		r.landLocked(n, f, nil, errTurn)
	}
	f, created = r.register(n)
	f.wanted = true
	return f, created, from
}

// rest takes what follows the place end out of a job of a Prefetch whose request has
// not begun: it comes with the request of a reader, who was in a hurry for the rest
// of it. The caller holds r.mu.
func (r *Reader) rest(j *job, end int64) (chunks []jobChunk) {
	if j == nil || !j.guess || j.started || r.full.Load() {
		return nil
	}
	for _, c := range j.chunks {
		if c.c.BlobOff < end || c.f == nil || r.flights[c.n] != c.f {
			continue
		}
		if f, created := r.overtake(c.n); created {
			c.f = f
			chunks = append(chunks, c)
		}
	}
	return chunks
}

// trim leaves out of a job what readers have taken over, and reports whether
// there is anything left of it.
func (r *Reader) trim(j *job) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	j.chunks = slices.DeleteFunc(j.chunks, func(c jobChunk) bool { return r.flights[c.n] != c.f })
	if len(j.chunks) == 0 {
		return false
	}
	end := int64(0)
	for i := range j.chunks {
		end = max(end, j.chunks[i].c.BlobOff+j.chunks[i].c.BlobLen)
	}
	j.off = j.chunks[0].c.BlobOff
	j.n = end - j.off
	j.pos.Store(j.off)
	return true
}

// overtake is register for what comes along with what a reader waits for: a chunk
// whose request has not begun comes with this one. The caller holds r.mu.
func (r *Reader) overtake(n uint32) (f *flight, created bool) {
	if f := r.flights[n]; f != nil && !f.wanted && f.j != nil && f.j.prio != Demand && !f.j.started {
		r.landLocked(n, f, nil, errTurn)
	}
	return r.register(n)
}

// start notes whether the job's request is under way, or waits for its turn, and
// reports whether there is anything left to ask for.
func (r *Reader) start(j *job, has bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if j.started && !has && j.prio != Demand { // it broke, and stands in line again
		for i := range j.chunks {
			if c := &j.chunks[i]; c.f != nil && c.f.wanted && r.flights[c.n] == c.f {
				r.landLocked(c.n, c.f, nil, errTurn)
			}
		}
	}
	j.started = has
	return slices.ContainsFunc(j.chunks, func(c jobChunk) bool { return c.f != nil && r.flights[c.n] == c.f })
}

// errTurn: a request that nobody waited for has lost its turn. Who has joined it
// meanwhile makes one of his own.
var errTurn = errors.New("the request waits for its turn again")

// taken reports whether a reader has taken the chunk over.
func (r *Reader) taken(c *jobChunk) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.flights[c.n] != c.f
}

// land ends the flight of chunk n.
func (r *Reader) land(n uint32, f *flight, data []byte, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.landLocked(n, f, data, err)
}

// landLocked is land. The caller holds r.mu.
func (r *Reader) landLocked(n uint32, f *flight, data []byte, err error) {
	if r.flights[n] == f {
		delete(r.flights, n)
	}
	if f.landed {
		return
	}
	f.landed, f.data, f.err = true, data, err
	close(f.done)
}

// begin runs fn in a goroutine that Close waits for. The caller holds r.mu and
// has seen that r is not closed.
func (r *Reader) begin(fn func()) {
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		fn()
	}()
}

// want gives each of need a flight and begins those that are new, with what
// should come along.
func (r *Reader) want(id unionfs.ID, ci *unionfs.ContentInfo, need []wanted) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return fmt.Errorf("fetch: reading layer %s: %w", r.l.Desc.Digest, iofs.ErrClosed)
	}
	fresh := make([]jobChunk, 0, len(need))
	var from *job
	for i := range need {
		w := &need[i]
		var j *job
		if w.f, w.own, j = r.join(w.n, &w.c); w.own {
			if j != nil {
				from = j
			}
			c := jobChunk{n: w.n, c: w.c, size: w.size, packOff: w.packOff, f: w.f}
			if w.n == ci.FirstChunk+ci.NChunks-1 {
				whole := *ci
				c.last = &whole
			}
			fresh = append(fresh, c)
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	if !r.ranged() {
		r.startReplay(fresh)
		return nil
	}
	for _, j := range r.plan(id, ci, fresh, from) {
		r.begin(func() { r.run(r.ctx, j) })
	}
	return nil
}

// again begins a new flight for one chunk, alone.
func (r *Reader) again(w *wanted) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return fmt.Errorf("fetch: reading layer %s: %w", r.l.Desc.Digest, iofs.ErrClosed)
	}
	if w.f, w.own, _ = r.join(w.n, &w.c); !w.own {
		return nil
	}
	c := jobChunk{n: w.n, c: w.c, size: w.size, packOff: w.packOff, f: w.f}
	if !r.ranged() {
		r.startReplay([]jobChunk{c})
		return nil
	}
	j := &job{prio: Demand, off: c.c.BlobOff, n: c.c.BlobLen, chunks: []jobChunk{c}}
	r.begin(func() { r.run(r.ctx, j) })
	return nil
}

// ranged reports whether chunks are asked for by ranges.
func (r *Reader) ranged() bool {
	if !r.format.ranged() {
		return false
	}
	b, ok := r.l.Blob.(interface{ NoRanges() bool })
	return !ok || !b.NoRanges()
}

// run lands all flights of a job.
func (r *Reader) run(ctx context.Context, j *job) {
	err := recovered(func() error { return r.fetch(ctx, j) })
	for i := range j.chunks {
		if c := &j.chunks[i]; c.f != nil {
			if err == nil {
				err = fmt.Errorf("chunk %d left out", c.n)
			}
			r.land(c.n, c.f, nil, r.fail(err))
		}
	}
}

func (r *Reader) fetch(ctx context.Context, j *job) error {
	if j.prio != Demand {
		select {
		case r.ahead <- struct{}{}:
			defer func() { <-r.ahead }()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if !r.trim(j) {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rc, err := r.l.Blob.Range(onTurn(ctx, func(has bool) {
		if !r.start(j, has) {
			cancel() // readers have taken all of it over
		}
	}), j.prio, j.off, j.n)
	if err != nil {
		return err
	}
	defer rc.Close()
	fr := newFrames(r.format, rc, j.off)
	defer fr.close()
	for i := range j.chunks {
		c := &j.chunks[i]
		j.pos.Store(c.c.BlobOff)
		if r.taken(c) {
			c.f = nil
			continue
		}
		if err := r.take(ctx, fr, c); err != nil {
			return err
		}
	}
	rc.Close() // the request is over, what follows reads the disk
	for i := range j.chunks {
		if ci := j.chunks[i].last; ci != nil {
			r.share(ci)
		}
	}
	return nil
}

// take reads the chunk c, lands its flight, and keeps it. An error is that of
// the request: nothing will follow.
func (r *Reader) take(ctx context.Context, fr *frames, c *jobChunk) error {
	if c.size > maxChunk {
		return fmt.Errorf("chunk of %d bytes: %w", c.size, unionfs.ErrDamaged)
	}
	release, err := holdMemory(ctx, c.size)
	if err != nil {
		return err
	}
	defer release()
	buf := make([]byte, c.size)
	err = fr.read(&c.c, buf)
	if err != nil && fr.broken() != nil {
		return fr.broken()
	}
	if err == nil {
		err = r.keep(c, buf)
	}
	if c.f == nil {
		return nil
	}
	f := c.f
	c.f = nil
	if err != nil {
		r.land(c.n, f, nil, r.fail(fmt.Errorf("%w: chunk at %d of the blob: %v", ErrDigest, c.c.BlobOff, err)))
		return nil
	}
	r.land(c.n, f, buf, nil)
	return nil
}

var errMismatch = errors.New("not the bytes of the layer index")

// keep checks a chunk and puts it into the pack. The error is errMismatch: a
// cache that does not take it is none.
func (r *Reader) keep(c *jobChunk, buf []byte) error {
	err := r.pack.Put(c.n, c.packOff, buf, c.c.Digest)
	r.full.Store(err != nil && !errors.Is(err, cache.ErrDigest))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, cache.ErrDigest), sha256.Sum256(buf) != c.c.Digest:
		return errMismatch
	}
	return nil
}

// maxVerify bounds the contents that are read again to be shared, in bytes.
const maxVerify = 256 << 20

// share tells the cache that the pack has a content, if it has all of it. A
// content in several chunks is read and hashed first: only the table of contents
// says what its digest is.
func (r *Reader) share(ci *unionfs.ContentInfo) {
	if ci.NChunks == 0 || !r.pack.Has(ci.FirstChunk, ci.NChunks) {
		return
	}
	if _, ok := r.c.Find(ci.Digest); ok {
		return
	}
	l := cache.Location{Pack: r.pack.Hash(), Off: ci.PackOff, Size: ci.Size, FirstChunk: ci.FirstChunk, NChunks: ci.NChunks}
	if r.format.Lazy() {
		c, _, err := r.idx.Chunk(ci.FirstChunk)
		if err != nil || ci.Size > maxVerify {
			return
		}
		if ci.NChunks > 1 || c.Digest != ci.Digest {
			if ok, err := r.pack.VerifyContent(ci.Digest, l); !ok || err != nil {
				return
			}
		}
	}
	r.c.Share(ci.Digest, l) // a hint
}
