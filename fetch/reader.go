package fetch

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	iofs "io/fs"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// ReaderOptions configure a Reader.
type ReaderOptions struct {
	Strict bool // check every chunk against its digest on every read, not only when it comes
}

// Reader reads the contents of a layer whose index is known: from the layer's
// pack, from the pack of another layer that has the same content, or from the
// registry. What comes from the registry is checked against the index before
// anyone sees it, and kept in the pack.
//
// A chunk is fetched once, however many wait for it (flights.go). What else a
// request brings is decided in readahead.go. A layer that cannot be read by
// ranges is streamed again (replay.go).
type Reader struct {
	l      Layer
	idx    *unionfs.Index
	pack   *cache.Pack
	c      *cache.Cache
	strict bool
	format Format
	stats  unionfs.Stats

	ctx   context.Context // of the flights: they outlive the reads that began them, and end with Close
	stop  context.CancelFunc
	wg    sync.WaitGroup // flights; added to under mu, while not closed
	ahead chan struct{}  // held by the ranges that nobody has asked for
	full  atomic.Bool    // the last chunk was not kept: do not fetch what nobody waits for

	traces atomic.Pointer[[]*Trace] // that note what is read; nil when there are none

	mu      sync.Mutex // guards what follows
	closed  bool
	flights map[uint32]*flight
	failed  [maxFailures]failure // the latest
	nfailed int
	runs    [maxRuns]seqRun
	clock   uint64
	replay  *replay // the one that is going on
}

// NewReader returns a Reader of the layer that idx is the index of. The caller
// keeps idx and pack open until Close has returned.
func NewReader(l Layer, idx *unionfs.Index, pack *cache.Pack, c *cache.Cache, o ReaderOptions) *Reader {
	ctx, stop := context.WithCancel(context.Background())
	r := &Reader{
		l: l, idx: idx, pack: pack, c: c, strict: o.Strict, format: Format(idx.Meta().Format), stats: idx.Stats(),
		ctx: ctx, stop: stop, ahead: make(chan struct{}, maxAheadRanges), flights: make(map[uint32]*flight),
	}
	pack.SetLayout(layout(r.format)) // a failure leaves an empty pack, or one that takes nothing
	return r
}

// layout names the way in which chunks are numbered and placed in a pack. It
// changes whenever this package cuts the same layer into other chunks.
func layout(f Format) [32]byte {
	l := [32]byte{byte(f)}
	if !f.Lazy() {
		l[1] = plainChunk >> 20
	}
	return l
}

// Close ends what is being fetched and waits for it. Reads that wait fail with
// io/fs.ErrClosed.
func (r *Reader) Close() error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.stop()
	r.wg.Wait()
	return nil
}

// ReadAt fills p with the bytes at off of a regular file's content. n < len(p)
// only at the end of the file. It is safe for concurrent use and keeps no part
// of p.
//
// Errors: unionfs.ErrDamaged; an *Error (ErrDigest when the registry's bytes are
// not those of the index, twice); ctx's; io/fs.ErrClosed. A cache that is full or
// whose disk fails is no error: the bytes come from the registry then.
func (r *Reader) ReadAt(ctx context.Context, id unionfs.ID, p []byte, off int64) (int, error) {
	ci, err := r.idx.Content(id)
	if err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("fetch: reading at %d: %w", off, iofs.ErrInvalid)
	}
	p = p[:min(int64(len(p)), max(ci.Size-off, 0))]
	if len(p) == 0 {
		return 0, nil
	}
	first, err := r.chunkAt(&ci, off)
	if err != nil {
		return 0, err
	}
	last, err := r.chunkAt(&ci, off+int64(len(p))-1)
	if err != nil {
		return 0, err
	}
	if traces := r.traces.Load(); traces != nil {
		r.note(*traces, first, last)
	}
	if !r.strict {
		if ok, err := r.pack.ReadAt(p, ci.PackOff+off, first, last-first+1); ok && err == nil {
			return len(p), nil
		}
		if ok, err := r.c.ReadShared(ci.Digest, p, off); ok && err == nil {
			return len(p), nil
		}
	}
	if err := r.assemble(ctx, id, &ci, &readPart{p: p, off: off, first: first, last: last}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// chunkAt returns the number of the chunk that has the byte at off.
func (r *Reader) chunkAt(ci *unionfs.ContentInfo, off int64) (uint32, error) {
	lo, hi := uint32(0), ci.NChunks // the chunk is in [lo, hi)
	for hi-lo > 1 {
		mid := lo + (hi-lo)/2
		c, _, err := r.idx.Chunk(ci.FirstChunk + mid)
		if err != nil {
			return 0, err
		}
		if c.Off <= off {
			lo = mid
		} else {
			hi = mid
		}
	}
	if hi == 0 {
		return 0, fmt.Errorf("fetch: a content without chunks: %w", unionfs.ErrDamaged)
	}
	return ci.FirstChunk + lo, nil
}

// readPart is what one read wants.
type readPart struct {
	p           []byte
	off         int64
	first, last uint32 // chunks
}

// cut returns the part of p that the chunk c, of size bytes, has, and where in
// the chunk it begins.
func (w *readPart) cut(c *unionfs.Chunk, size int64) (b []byte, at int64) {
	from := max(c.Off, w.off)
	to := min(c.Off+size, w.off+int64(len(w.p)))
	if from >= to {
		return nil, 0
	}
	return w.p[from-w.off : to-w.off], from - c.Off
}

// assemble fills p chunk by chunk: what is on this disk, what has no place, and
// what has to be fetched.
func (r *Reader) assemble(ctx context.Context, id unionfs.ID, ci *unionfs.ContentInfo, w *readPart) error {
	var need []wanted
	for n := w.first; n <= w.last; n++ {
		c, size, err := r.idx.Chunk(n)
		if err != nil {
			return err
		}
		b, at := w.cut(&c, size)
		if c.BlobLen == 0 {
			clear(b)
			continue
		}
		if r.local(ci, n, &c, size, b, at) {
			continue
		}
		need = append(need, wanted{n: n, c: c, size: size, packOff: ci.PackOff + c.Off, b: b, at: at})
		if len(need) == maxWanted {
			if err := r.bring(ctx, id, ci, need); err != nil {
				return err
			}
			need = need[:0]
		}
	}
	return r.bring(ctx, id, ci, need)
}

// maxWanted bounds the flights that one read waits for: a table of contents may
// cut a file into chunks of a byte.
const maxWanted = 1024

// bring waits for chunks of one content.
func (r *Reader) bring(ctx context.Context, id unionfs.ID, ci *unionfs.ContentInfo, need []wanted) error {
	if len(need) == 0 {
		return nil
	}
	if err := r.justFailed(need); err != nil {
		return err
	}
	if err := r.want(id, ci, need); err != nil {
		return err
	}
	for i := range need {
		data, err := r.await(ctx, &need[i])
		if err != nil {
			r.fails(need[i].n, err)
			return err
		}
		copy(need[i].b, data[need[i].at:])
	}
	return nil
}

// failure is a chunk that could not be had.
type failure struct {
	n   uint32
	err error
	at  time.Time
}

// failureTTL is how long a chunk that could not be had is not asked for again. When
// a read of many pages fails, the kernel asks for the first of them alone at once:
// that the registry has failed is known, and may have taken the whole timeout.
const failureTTL = 20 * time.Millisecond

// maxFailures bounds the failures that are remembered.
const maxFailures = 16

// fails remembers a failure for failureTTL.
func (r *Reader) fails(n uint32, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed[r.nfailed%maxFailures] = failure{n, err, time.Now()}
	r.nfailed++
}

// justFailed returns the failure of a chunk of need, if it is a moment old.
func (r *Reader) justFailed(need []wanted) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.failed {
		f := &r.failed[i]
		if f.err != nil && time.Since(f.at) < failureTTL && slices.ContainsFunc(need, func(w wanted) bool { return w.n == f.n }) {
			return f.err
		}
	}
	return nil
}

// wanted is a chunk that a read waits for.
type wanted struct {
	n       uint32
	c       unionfs.Chunk
	size    int64
	packOff int64
	b       []byte // where its bytes go
	at      int64  // from where in the chunk
	f       *flight
	own     bool // f was begun for this read
}

// local fills b from chunk n as this disk has it.
func (r *Reader) local(ci *unionfs.ContentInfo, n uint32, c *unionfs.Chunk, size int64, b []byte, at int64) bool {
	if !r.strict {
		ok, err := r.pack.ReadAt(b, ci.PackOff+c.Off+at, n, 1)
		return ok && err == nil
	}
	if size > maxChunk {
		return false
	}
	buf := make([]byte, size)
	if ok, err := r.pack.ReadAt(buf, ci.PackOff+c.Off, n, 1); ok && err == nil {
		if sha256.Sum256(buf) == c.Digest {
			copy(b, buf[at:])
			return true
		}
		r.pack.Drop(n, 1) // damaged: fetched anew below
	}
	if ok, err := r.c.ReadShared(ci.Digest, buf, c.Off); ok && err == nil && sha256.Sum256(buf) == c.Digest {
		copy(b, buf[at:])
		return true
	}
	return false
}

// await waits for a chunk. What others fetched and was in vain is fetched again
// for this read, and so is, once, what did not match.
func (r *Reader) await(ctx context.Context, w *wanted) ([]byte, error) {
	for attempt := 0; ; attempt++ {
		select {
		case <-w.f.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		err := w.f.err
		if err == nil {
			return w.f.data, nil
		}
		wrong := errors.Is(err, ErrDigest)
		if attempt > 0 || r.ctx.Err() != nil || w.own && !wrong {
			return nil, err
		}
		if wrong {
			suspect(r.l.Blob)
		}
		if err := r.again(w); err != nil {
			return nil, err
		}
	}
}

// fail says which layer err is about.
func (r *Reader) fail(err error) error {
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	if r.ctx.Err() != nil {
		err = iofs.ErrClosed
	}
	return &Error{Op: "read layer", Ref: r.l.Desc.Digest.String(), Err: err}
}
