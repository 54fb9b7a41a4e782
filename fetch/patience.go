package fetch

import (
	"context"
	"fmt"
	"io"
	"time"
)

// errStalled is the cause with which a Stream is cancelled that has waited for
// too long.
var errStalled = fmt.Errorf("nothing more came: %w", context.DeadlineExceeded)

// minProgress is how many bytes make a waiting reader patient again: a registry
// that gives a byte now and then would else hold a slot, and who reads, for ever.
const minProgress = 4 << 10

// patience bounds the time that a stream waits for the registry without
// progress. The time of whoever reads the stream does not count. It is for one
// goroutine; nil waits for ever.
type patience struct {
	limit time.Duration
	left  time.Duration // of limit
	since int64         // bytes since left was limit
	began time.Time     // of the waiting that goes on
	timer *time.Timer   // cancels the stream; runs while we wait
}

func newPatience(limit time.Duration, cancel context.CancelCauseFunc) *patience {
	w := &patience{limit: limit, left: limit, timer: time.AfterFunc(limit, func() { cancel(errStalled) })}
	w.timer.Stop()
	return w
}

// begin says that we wait from now on.
func (w *patience) begin() {
	if w != nil {
		w.began = time.Now()
		w.timer.Reset(w.left)
	}
}

// end says that we do not wait any more, and that n bytes came.
func (w *patience) end(n int) {
	if w == nil {
		return
	}
	w.timer.Stop()
	w.left -= time.Since(w.began)
	if w.since += int64(n); w.since >= minProgress {
		w.left, w.since = w.limit, 0
	}
}

func (w *patience) stop() {
	if w != nil {
		w.timer.Stop()
	}
}

// watched reads r while w counts.
type watched struct {
	r io.Reader
	w *patience
}

func (r watched) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.w.end(n)
	r.w.begin()
	return n, err
}
