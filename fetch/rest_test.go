package fetch

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestRest gives memory back a while after the last request, once.
func TestRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var freed atomic.Int64
		r := newRest()
		r.free = func() { freed.Add(1) }
		check := func(want int64) {
			t.Helper()
			synctest.Wait()
			if got := freed.Load(); got != want {
				t.Errorf("freed %d times, want %d", got, want)
			}
		}
		time.Sleep(2 * time.Hour)
		check(0)
		a, b := r.begin(), r.begin()
		a()
		time.Sleep(time.Minute)
		check(0)
		b()
		c := r.begin()
		time.Sleep(time.Minute)
		check(0)
		c()
		time.Sleep(restTime / 2)
		check(0)
		time.Sleep(time.Hour)
		check(1)
		r.begin()()
		r.close()
		time.Sleep(time.Hour)
		check(1)
	})
}
