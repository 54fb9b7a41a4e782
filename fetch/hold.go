package fetch

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// maxHeld bounds the bytes that a Client holds: enough to keep a link of 1 Gbit/s
// busy for as long as it takes to compile the indexes of an image.
const maxHeld = 16 << 20

// Hold is a range of a blob that is fetched before anybody can use it: the tables
// of contents while the config is on its way, what a profile has while the tables
// are compiled. Range is answered from it. What it holds is as little checked as
// what Range reads.
type Hold struct {
	b      *Blob // for the request, and for all of the same blob; its Range would find this
	key    string
	prio   Priority
	off, n int64
	gone   context.Context // ends when it is released
	end    context.CancelFunc

	mu      sync.Mutex // guards what follows
	started bool       // the request is under way
	buf     []byte
	have    int64
	err     error
	pulse   chan struct{} // closed when something changes; nil when nobody waits
}

// holds are the ranges that a Client holds. Its mutex is taken before those of a
// Hold and of a Blob.
type holds struct {
	mu     sync.Mutex
	byBlob map[string][]*Hold
	size   int64
}

// Hold makes place for n bytes from off of a blob; Fetch brings them, by a request
// with priority p. Demand says that somebody will wait for it. It returns nil when
// there is no room, or the range is not within the blob, or is held. The caller
// releases it.
func (c *Client) Hold(repo name.Repository, desc v1.Descriptor, off, n int64, p Priority) *Hold {
	if off < 0 || n <= 0 || n > maxHeld || off > desc.Size || n > desc.Size-off {
		return nil
	}
	h := &Hold{b: c.Blob(repo, desc), prio: p, off: off, n: n}
	h.key = h.b.key()
	c.holds.mu.Lock()
	defer c.holds.mu.Unlock()
	others := c.holds.byBlob[h.key]
	if c.holds.size+n > maxHeld || slices.ContainsFunc(others, func(o *Hold) bool { return o.covers(off, n) }) {
		return nil
	}
	h.gone, h.end = context.WithCancel(context.Background())
	if len(others) > 0 {
		h.b = others[0].b
	}
	if c.holds.byBlob == nil {
		c.holds.byBlob = map[string][]*Hold{}
	}
	c.holds.size += n
	c.holds.byBlob[h.key] = append(others, h)
	return h
}

// Release gives up what is held, and ends its Fetch. Who reads from it goes on.
func (h *Hold) Release() {
	c := h.b.c
	c.holds.mu.Lock()
	defer c.holds.mu.Unlock()
	c.holds.drop(h)
}

// drop is Release. The caller holds mu.
func (hs *holds) drop(h *Hold) {
	list := hs.byBlob[h.key]
	i := slices.Index(list, h)
	if i < 0 {
		return
	}
	h.end()
	hs.size -= h.n
	if list = slices.Delete(list, i, i+1); len(list) == 0 {
		delete(hs.byBlob, h.key)
	} else {
		hs.byBlob[h.key] = list
	}
}

// unhold gives up all that is held of a blob, which was wrong, and returns the host
// that it came from, "" if nothing was.
func (b *Blob) unhold() (from string) {
	hs := &b.c.holds
	hs.mu.Lock()
	defer hs.mu.Unlock()
	for _, h := range slices.Clone(hs.byBlob[b.key()]) {
		if h.b != b {
			h.b.mu.Lock()
			from = h.b.good
			h.b.mu.Unlock()
		}
		hs.drop(h)
	}
	return from
}

// ReleaseUnstarted is Release, for a Hold that nobody waits for and whose request
// has not had its turn.
func (h *Hold) ReleaseUnstarted() {
	h.mu.Lock()
	idle := h.prio != Demand && !h.started && h.err == nil
	if idle {
		h.end() // here: a turn that comes now finds it ended
	}
	h.mu.Unlock()
	if idle {
		h.Release()
	}
}

func (h *Hold) covers(off, n int64) bool { return off >= h.off && n <= h.n && off-h.off <= h.n-n }

// Fetch brings what is to be held. It returns when all has come or nothing more
// will: who needs the rest asks for it himself, so it is no error.
func (h *Hold) Fetch(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(h.gone, cancel)()
	if err := recovered(func() error { return h.fetch(ctx, cancel) }); err != nil {
		h.set(func() { h.err = err })
	}
}

// errNoRanges: the blob comes from its beginning only, which no range is worth.
var errNoRanges = errors.New("the registry knows no ranges")

// fetch is Fetch. cancel ends ctx.
func (h *Hold) fetch(ctx context.Context, cancel context.CancelFunc) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if h.b.NoRanges() {
		return errNoRanges
	}
	turn := onTurn(ctx, func(has bool) {
		h.set(func() { h.started = has })
		if h.gone.Err() != nil {
			cancel() // before the request is made, not a moment after it
		}
	})
	rc, err := h.b.request(turn, h.prio, h.off, h.n)
	if err != nil {
		return err
	}
	defer rc.Close()
	buf := make([]byte, h.n)
	for at := int64(0); at < h.n; {
		n, err := rc.Read(buf[at:])
		at += int64(n)
		if n > 0 {
			h.set(func() { h.buf, h.have = buf, at })
		}
		if err != nil && at < h.n {
			return err
		}
	}
	return nil
}

// set changes h and wakes who waits.
func (h *Hold) set(change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change()
	if h.pulse != nil {
		close(h.pulse)
		h.pulse = nil
	}
}

// near reports whether the byte at off is here or about to come.
func (h *Hold) near(off int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err != nil {
		return h.off+h.have > off
	}
	return (h.started || h.prio == Demand) && off-(h.off+h.have) <= maxGap
}

// key names a blob in its repository.
func (b *Blob) key() string { return b.repo.Name() + "@" + b.desc.Digest.String() }

// held returns a Hold that has the range, or is about to.
func (b *Blob) held(off, n int64) *Hold {
	hs := &b.c.holds
	hs.mu.Lock()
	defer hs.mu.Unlock()
	for _, h := range hs.byBlob[b.key()] {
		if h.covers(off, n) && h.near(off) {
			return h
		}
	}
	return nil
}

// HeldTail is how many bytes of the blob's end are held for somebody who waits, or
// are about to be.
func (b *Blob) HeldTail() (n int64) {
	b.c.holds.mu.Lock()
	defer b.c.holds.mu.Unlock()
	for _, h := range b.c.holds.byBlob[b.key()] {
		if h.prio == Demand && h.off+h.n == b.desc.Size && h.near(h.off) {
			n = max(n, h.n)
		}
	}
	return n
}

// heldReader reads [off, end) of a blob from what is held, and what is missing
// there by a request of its own.
type heldReader struct {
	b        *Blob
	h        *Hold
	ctx      context.Context // of the Range call
	cancel   context.CancelFunc
	p        Priority
	off, end int64
	rest     io.ReadCloser // nil while the Hold answers
}

func (r *heldReader) Read(p []byte) (int, error) {
	if r.rest != nil {
		return r.rest.Read(p)
	}
	if r.off == r.end {
		return 0, io.EOF
	}
	for {
		r.h.mu.Lock()
		at := r.off - r.h.off
		n := copy(p[:min(int64(len(p)), r.end-r.off)], r.h.buf[min(at, r.h.have):r.h.have])
		err := r.h.err
		if err == nil && r.p == Demand && r.h.prio != Demand && !r.h.started {
			err = errTurn
		}
		if r.h.pulse == nil {
			r.h.pulse = make(chan struct{})
		}
		pulse := r.h.pulse
		r.h.mu.Unlock()
		if n > 0 || len(p) == 0 {
			r.off += int64(n)
			return n, nil
		}
		if err != nil {
			if r.rest, err = r.b.request(r.ctx, r.p, r.off, r.end-r.off); err != nil {
				r.rest = nil
				return 0, err
			}
			return r.rest.Read(p)
		}
		select {
		case <-pulse:
		case <-r.ctx.Done():
			return 0, r.b.failed(done(r.ctx))
		}
	}
}

func (r *heldReader) Close() error {
	r.cancel()
	if r.rest != nil {
		return r.rest.Close()
	}
	return nil
}
