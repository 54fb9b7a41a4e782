package fetch

import (
	"runtime/debug"
	"sync/atomic"
	"time"
)

// restTime is how long after the last request the memory of what was fetched is
// given back.
const restTime = time.Second

// rest gives memory back when the registries have been left alone for a while. What
// passed through (chunks, tables of contents) may be many times what is kept, and the
// Go runtime keeps twice of what it needed last.
type rest struct {
	active atomic.Int64
	timer  atomic.Pointer[time.Timer]
	free   func() // debug.FreeOSMemory; tests have another
}

func newRest() *rest {
	r := &rest{free: debug.FreeOSMemory}
	t := time.AfterFunc(time.Hour, r.trim)
	t.Stop()
	r.timer.Store(t)
	return r
}

// begin notes a request; end must be called when it is over.
func (r *rest) begin() (end func()) {
	r.active.Add(1)
	return func() {
		if r.active.Add(-1) == 0 {
			if t := r.timer.Load(); t != nil {
				t.Reset(restTime)
			}
		}
	}
}

func (r *rest) trim() {
	if r.active.Load() == 0 {
		r.free()
	}
}

// close ends what was begun.
func (r *rest) close() {
	if t := r.timer.Swap(nil); t != nil {
		t.Stop()
	}
}
