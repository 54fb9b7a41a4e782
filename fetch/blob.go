package fetch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Blob is a content-addressed object in a repository. It is safe for concurrent
// use. What it reads is not checked against the digest: that needs all of it.
type Blob struct {
	c        *Client
	repo     name.Repository
	desc     v1.Descriptor
	noRanges atomic.Bool
	moved    location

	mu    sync.Mutex // guards what follows
	good  string     // endpoint that answered last
	avoid string     // endpoint whose bytes were wrong
}

// Blob returns the blob; it makes no request.
func (c *Client) Blob(repo name.Repository, desc v1.Descriptor) *Blob {
	return &Blob{c: c, repo: repo, desc: desc}
}

// Size is the size of the blob in bytes, as the descriptor has it.
func (b *Blob) Size() int64 { return b.desc.Size }

// Descriptor is the blob's descriptor.
func (b *Blob) Descriptor() v1.Descriptor { return b.desc }

// NoRanges reports whether a ranged request was answered with the whole blob.
// Range and a resumed Stream then cost the bytes from the blob's beginning.
func (b *Blob) NoRanges() bool { return b.noRanges.Load() }

// Suspect tells that the bytes were not those of the digest: the place that
// they came from is forgotten, and its host asked last from now on.
func (b *Blob) Suspect() {
	from := b.unhold()
	b.mu.Lock()
	defer b.mu.Unlock()
	if wrong := cmp.Or(b.good, from); wrong != "" {
		b.avoid = wrong
	}
	b.good = ""
	b.moved.mu.Lock()
	defer b.moved.mu.Unlock()
	b.moved.url = nil
}

// Range returns exactly n bytes from off, by one ranged request if all goes
// well. If ctx has no deadline, Options.Timeout is how long opening and reading
// may take. The reader resumes after a broken connection; it returns io.EOF
// after n bytes and never before, and is for one goroutine. Close ends the
// request. Errors, of Range and of Read, are *Error: ErrUnreachable,
// ErrUnavailable, ErrRateLimit, iofs.ErrNotExist, iofs.ErrPermission, ErrDigest
// (the blob is not as long as its descriptor says), iofs.ErrInvalid (the range
// is not within the blob), context.DeadlineExceeded, context.Canceled.
func (b *Blob) Range(ctx context.Context, p Priority, off, n int64) (io.ReadCloser, error) {
	if off < 0 || n < 0 || off > b.desc.Size || n > b.desc.Size-off {
		return nil, b.failed(fail(iofs.ErrInvalid, "bytes %d+%d of %d", off, n, b.desc.Size))
	}
	if h := b.held(off, n); h != nil {
		tellTurn(ctx, true)
		ctx, cancel := b.c.bound(ctx)
		return &heldReader{b: b, h: h, ctx: ctx, cancel: cancel, p: p, off: off, end: off + n}, nil
	}
	return b.request(ctx, p, off, n)
}

// request is Range, by a request.
func (b *Blob) request(ctx context.Context, p Priority, off, n int64) (io.ReadCloser, error) {
	ctx, cancel := b.c.bound(ctx)
	return b.open(&body{b: b, ctx: ctx, cancel: cancel, class: class(p, false), off: off, end: off + n})
}

// Stream returns the blob from off to its end, as Range does, but it may last:
// ctx's deadline bounds it as a whole. Options.Timeout bounds how long it waits
// for the registry, in Stream and in Read, without progress; then the error is
// context.DeadlineExceeded. What it waits for a slot of the pool or because the
// registry asked for a pause does not count.
func (b *Blob) Stream(ctx context.Context, p Priority, off int64) (io.ReadCloser, error) {
	if off < 0 || off > b.desc.Size {
		return nil, b.failed(fail(iofs.ErrInvalid, "bytes from %d of %d", off, b.desc.Size))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	r := &body{b: b, ctx: ctx, cancel: func() { cancel(context.Canceled) }, class: class(p, true), off: off, end: b.desc.Size}
	r.wait = newPatience(b.c.o.Timeout, cancel)
	return b.open(r)
}

func (b *Blob) open(r *body) (io.ReadCloser, error) {
	if r.off == r.end {
		return r, nil
	}
	if err := r.connect(); err != nil {
		r.Close()
		return nil, b.failed(err)
	}
	return r, nil
}

// failed is err as Blob's callers see it.
func (b *Blob) failed(err *Error) error {
	return err.named("read", b.repo.Name()+"@"+b.desc.Digest.String())
}

// call is the request for [first, end), ranged unless that is everything.
func (b *Blob) call(k Priority, first, end int64) *call {
	b.mu.Lock()
	defer b.mu.Unlock()
	cl := &call{
		repo:   b.repo.RepositoryStr(),
		path:   "blobs/" + b.desc.Digest.String(),
		scope:  pullScope(b.repo.RepositoryStr()),
		class:  k,
		first:  first,
		last:   end - 1,
		moved:  &b.moved,
		prefer: b.good,
		avoid:  b.avoid,
	}
	if first == 0 && end == b.desc.Size || b.noRanges.Load() {
		cl.last = -1
	}
	return cl
}

// progress is how many bytes make a broken connection a new one: a host that
// gives a byte each time is not resumed for ever.
const progress = 256 << 10

// body reads [off, end) of a blob, over as many requests as it takes.
type body struct {
	b      *Blob
	ctx    context.Context // of the Range or Stream call: io.Reader has no other place for it
	cancel context.CancelFunc
	class  Priority
	wait   *patience // of a Stream; nil: ctx has a deadline

	off, end int64
	ans      *answer // nil: to be connected
	part     int64   // bytes that ans still owes
	since    int64   // bytes since the last failure
	failures int     // without progress between them
	err      error   // for ever
}

// connect asks for what is missing.
func (r *body) connect() *Error {
	cl := r.b.call(r.class, r.off, r.end)
	cl.wait = r.wait
	r.wait.begin()
	defer r.wait.end(0)
	return r.b.c.run(r.ctx, r.b.repo.Registry, cl, func(ep *endpoint, a *answer) *Error {
		part, err := r.accept(a, cl.last >= 0)
		if err != nil {
			return err
		}
		r.b.mu.Lock()
		r.b.good = ep.key()
		r.b.mu.Unlock()
		r.ans, r.part = a, part
		return nil
	})
}

// accept checks that a has the bytes from r.off, and says how many. It skips
// what comes before them in an answer that is the whole blob.
func (r *body) accept(a *answer, ranged bool) (int64, *Error) {
	size := r.b.desc.Size
	if a.StatusCode == http.StatusPartialContent {
		first, last, total, ok := parseContentRange(a.Header.Get("Content-Range"))
		n := last - first + 1
		if !ranged || !ok || first != r.off || last >= r.end || total >= 0 && total != size ||
			a.ContentLength >= 0 && a.ContentLength != n {
			e := fail(ErrUnavailable, "asked for bytes %d-%d of %d, the registry answered %q",
				r.off, r.end-1, size, clip(a.Header.Get("Content-Range")))
			e.Status, e.next = a.StatusCode, true
			return 0, e
		}
		return n, nil
	}
	if a.ContentLength >= 0 && a.ContentLength != size {
		e := fail(ErrDigest, "the blob has %d bytes, not %d", a.ContentLength, size)
		e.Status, e.next = a.StatusCode, true
		return 0, e
	}
	if ranged {
		r.b.noRanges.Store(true)
	}
	if _, err := io.CopyN(io.Discard, watched{a, r.wait}, r.off); err != nil {
		return 0, netError(r.ctx, a.ctx, err)
	}
	return size - r.off, nil
}

// Read reads; a broken connection is taken up again.
func (r *body) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if r.off == r.end {
		return 0, io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if r.ans == nil {
			if err := r.connect(); err != nil {
				return 0, r.broken(err)
			}
		}
		r.wait.begin()
		n, err := r.ans.Read(p[:min(int64(len(p)), r.end-r.off, max(r.part, 1))])
		n = int(min(int64(n), r.part)) // longer than promised: cut
		r.wait.end(n)
		r.off, r.part, r.since = r.off+int64(n), r.part-int64(n), r.since+int64(n)
		if r.off == r.end {
			r.ans.Close()
			r.ans = nil
			return n, nil
		}
		if r.part == 0 || err != nil {
			if e := r.interrupted(err); e != nil {
				if n > 0 {
					r.broken(e)
					return n, nil
				}
				return 0, r.broken(e)
			}
		}
		if n > 0 {
			return n, nil
		}
	}
}

// interrupted drops the answer, which ended before everything was read, and
// waits until it makes sense to ask for the rest.
func (r *body) interrupted(err error) *Error {
	run := r.ans.ctx
	whole := r.part == 0 // it has given what it promised
	cause := netError(r.ctx, run, errOr(err, io.ErrUnexpectedEOF))
	r.ans.Close()
	r.ans = nil
	if r.ctx.Err() != nil {
		return done(r.ctx)
	}
	if r.since >= progress {
		r.failures = 0
	}
	r.since = 0
	r.failures++
	if r.failures >= maxAttempts {
		return cause
	}
	if whole {
		return nil
	}
	return pauseFor(r.ctx, r.b.c.backoff(r.failures-1), cause)
}

// broken ends the reader with err.
func (r *body) broken(err *Error) error {
	r.err = r.b.failed(err)
	return r.err
}

// Close ends the request. It may be called again.
func (r *body) Close() error {
	if r.ans != nil {
		r.ans.Close()
		r.ans = nil
	}
	r.wait.stop()
	r.cancel()
	if r.err == nil {
		r.err = fmt.Errorf("fetch: reading a closed body: %w", iofs.ErrClosed)
	}
	return nil
}

// errOr is err, or other if it says nothing.
func errOr(err, other error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return other
	}
	return err
}

// clip is s short enough for a message.
func clip(s string) string { return s[:min(len(s), 64)] }

// parseContentRange reads "bytes first-last/total"; total is -1 for "*".
func parseContentRange(s string) (first, last, total int64, ok bool) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(s), "bytes ")
	span, all, ok2 := strings.Cut(rest, "/")
	a, z, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, 0, false
	}
	f, err1 := strconv.ParseUint(a, 10, 62)
	l, err2 := strconv.ParseUint(z, 10, 62)
	t := int64(-1)
	if all != "*" {
		u, err := strconv.ParseUint(all, 10, 62)
		if err != nil || l >= u {
			return 0, 0, 0, false
		}
		t = int64(u)
	}
	if err1 != nil || err2 != nil || l < f {
		return 0, 0, 0, false
	}
	return int64(f), int64(l), t, true
}
