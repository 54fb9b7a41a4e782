package integration

import (
	"fmt"
	"net/http"
	"sync"
	"time"
)

// A link is what lies between a reader and a registry that is far away: each
// request waits for the latency, and all bodies share the rate. It stands for one
// round trip on a warm connection and for one bottleneck. The zero value is no
// link at all.
type link struct {
	latency time.Duration
	mbit    int // 10^6 bits per second; 0 does not limit

	mu   sync.Mutex
	next time.Time // when the link is free again
}

func (l *link) String() string {
	if l.latency == 0 && l.mbit == 0 {
		return "no limit"
	}
	if l.mbit >= 1000 {
		return fmt.Sprintf("%v, %d Gbit/s", l.latency, l.mbit/1000)
	}
	return fmt.Sprintf("%v, %d Mbit/s", l.latency, l.mbit)
}

// ideal is the time that a request for n bytes takes at least.
func (l *link) ideal(n int64) time.Duration {
	if l.mbit == 0 {
		return l.latency
	}
	return l.latency + time.Duration(float64(n)*8/float64(l.mbit)*1e3)
}

// credit is how far the link may be behind: who sleeps wakes up late, and without
// it the mean rate would be well below the nominal one.
const credit = 25 * time.Millisecond

// take reserves n bytes and tells how long to wait for them.
func (l *link) take(n int) time.Duration {
	if l.mbit == 0 {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if floor := now.Add(-credit); l.next.Before(floor) {
		l.next = floor
	}
	l.next = l.next.Add(time.Duration(float64(n) * 8 / float64(l.mbit) * 1e3))
	return l.next.Sub(now)
}

// writer waits for a request to arrive, and returns how its answer goes back.
func (l *link) writer(w http.ResponseWriter) http.ResponseWriter {
	time.Sleep(l.latency)
	return &linkWriter{w, l}
}

type linkWriter struct {
	http.ResponseWriter
	l *link
}

func (w *linkWriter) Write(p []byte) (done int, err error) {
	for len(p) > 0 && err == nil {
		// A sleep of less than a millisecond is not worth it: what is owed stays
		// in l.next, so that the mean rate is right.
		n := min(len(p), 16<<10)
		if d := w.l.take(n); d > time.Millisecond {
			time.Sleep(d)
		}
		n, err = w.ResponseWriter.Write(p[:n])
		done += n
		p = p[n:]
	}
	return done, err
}

// Unwrap gives http.ResponseController the writer below.
func (w *linkWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
