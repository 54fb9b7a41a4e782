package fetch

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// What a host is asked at once. A demand always finds a slot that nobody else
// may take: those who do not wait for a reader, and streams, which last, leave
// slotsDemand of them alone.
const (
	slots           = 16
	slotsDemand     = 4 // kept for ranges with priority Demand
	slotsBackground = 6 // most that Background may have
)

// pool bounds the requests to one host.
type pool struct {
	mu         sync.Mutex
	used       int           // slots taken
	low        int           // of them by streams, Soon and Background
	background int           // of them by Background
	queue      [3][]*waiting // by class, in order of arrival
}

// waiting is a request without a slot.
type waiting struct {
	got chan struct{} // closed when the slot is its
}

// class is what decides about a slot: a stream of priority Demand stands with
// Soon, because it may last for minutes.
func class(p Priority, stream bool) Priority {
	p = min(max(p, Demand), Background)
	if stream && p == Demand {
		return Soon
	}
	return p
}

// free reports whether a request of the class may begin. mu is held.
func (q *pool) free(k Priority) bool {
	switch {
	case q.used >= slots:
		return false
	case k == Demand:
		return true
	case q.low >= slots-slotsDemand:
		return false
	}
	return k == Soon || q.background < slotsBackground
}

// take and put count a slot. mu is held.
func (q *pool) take(k Priority) { q.count(k, 1) }

func (q *pool) count(k Priority, n int) {
	q.used += n
	if k != Demand {
		q.low += n
	}
	if k == Background {
		q.background += n
	}
}

// acquire waits for a slot; release gives it back, and may be called again
// without effect. An error is ctx's.
func (q *pool) acquire(ctx context.Context, k Priority) (release func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	q.mu.Lock()
	if q.free(k) && len(q.queue[k]) == 0 {
		q.take(k)
		q.mu.Unlock()
		return q.releaser(k), nil
	}
	w := &waiting{got: make(chan struct{})}
	q.queue[k] = append(q.queue[k], w)
	q.mu.Unlock()

	select {
	case <-w.got:
		return q.releaser(k), nil
	case <-ctx.Done():
	}
	q.mu.Lock()
	for i, x := range q.queue[k] {
		if x == w {
			q.queue[k] = append(q.queue[k][:i], q.queue[k][i+1:]...)
			q.mu.Unlock()
			return nil, ctx.Err()
		}
	}
	q.mu.Unlock()
	q.releaser(k)() // it got the slot meanwhile
	return nil, ctx.Err()
}

func (q *pool) releaser(k Priority) func() {
	var once sync.Once
	return func() {
		once.Do(func() {
			q.mu.Lock()
			defer q.mu.Unlock()
			q.count(k, -1)
			q.wake()
		})
	}
}

// wake gives free slots to those who wait, readers first. mu is held.
func (q *pool) wake() {
	for k := Demand; k <= Background; k++ {
		for len(q.queue[k]) > 0 && q.free(k) {
			q.take(k)
			close(q.queue[k][0].got)
			q.queue[k] = q.queue[k][1:]
		}
	}
}

// idle reports whether nobody has or wants a slot.
func (q *pool) idle() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.used == 0 && len(q.queue[Demand])+len(q.queue[Soon])+len(q.queue[Background]) == 0
}

// hostState is what all requests to one host share.
type hostState struct {
	pool                     pool
	requests, bytes, retries atomic.Int64
	paused                   atomic.Int64 // no request before this time (Unix, ns): the host said 429
	down                     atomic.Int64 // other hosts go first until this time: the host was not reachable
}

// pause keeps requests from the host for d.
func (h *hostState) pause(d time.Duration) {
	until := time.Now().Add(d).UnixNano()
	for {
		old := h.paused.Load()
		if old >= until || h.paused.CompareAndSwap(old, until) {
			return
		}
	}
}

// ready waits until the host may be asked. If that is beyond ctx's deadline it
// does not wait, and says so.
func (h *hostState) ready(ctx context.Context) *Error {
	d := time.Until(time.Unix(0, h.paused.Load()))
	if d <= 0 {
		return nil
	}
	return pauseFor(ctx, d, fail(ErrRateLimit, "the registry asked for a pause of %v", d.Round(time.Second)))
}

// pauseFor sleeps. It returns late at once if ctx would end before, and ctx's
// error if it ends nevertheless.
func pauseFor(ctx context.Context, d time.Duration, late *Error) *Error {
	if end, ok := ctx.Deadline(); ok && time.Until(end) <= d {
		return late
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return done(ctx)
	}
}
