package fetch

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/imgfs/imgfs/fetch/registrytest"
)

func TestPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q pool
		var running, served [3]atomic.Int64
		var release [3][]func()
		var mu sync.Mutex
		ask := func(k Priority) {
			go func() {
				f, err := q.acquire(t.Context(), k)
				if err != nil {
					return
				}
				running[k].Add(1)
				served[k].Add(1)
				mu.Lock()
				defer mu.Unlock()
				release[k] = append(release[k], func() { running[k].Add(-1); f(); f() })
			}()
		}
		check := func(what string, want ...int64) {
			t.Helper()
			synctest.Wait()
			for k, w := range want {
				if n := running[k].Load(); n != w {
					t.Errorf("%s: %d of class %d running, want %d", what, n, k, w)
				}
			}
		}
		for range 30 {
			ask(Background)
		}
		check("background alone", 0, 0, slotsBackground)
		for range 30 {
			ask(Soon)
		}
		check("soon takes what background may not", 0, slots-slotsDemand-slotsBackground, slotsBackground)
		for range 30 {
			ask(Demand)
		}
		check("demand has its own", slotsDemand, slots-slotsDemand-slotsBackground, slotsBackground)
		mu.Lock()
		for _, f := range release[Background] {
			f()
		}
		release[Background] = nil
		mu.Unlock()
		check("demand goes first", slotsDemand+slotsBackground, slots-slotsDemand-slotsBackground, 0)
		for range 100 {
			mu.Lock()
			all := append(append(release[0], release[1]...), release[2]...)
			release = [3][]func(){}
			mu.Unlock()
			for _, f := range all {
				f()
			}
			synctest.Wait()
		}
		check("all served", 0, 0, 0)
		for k := range served {
			if n := served[k].Load(); n != 30 {
				t.Errorf("%d of class %d served, want 30", n, k)
			}
		}
		if !q.idle() || q.used != 0 || q.low != 0 || q.background != 0 {
			t.Errorf("the pool is left with %+v", &q)
		}
	})
}

// Who stops waiting leaves no slot taken.
func TestPoolCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q pool
		var all []func()
		for range slots {
			f, err := q.acquire(t.Context(), Demand)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, f)
		}
		ctx, cancel := context.WithCancel(t.Context())
		errs := make(chan error, 3)
		for _, k := range []Priority{Demand, Soon, Background} {
			go func() {
				_, err := q.acquire(ctx, k)
				errs <- err
			}()
		}
		synctest.Wait()
		cancel()
		for range 3 {
			if err := <-errs; err != context.Canceled {
				t.Errorf("acquire: %v, want canceled", err)
			}
		}
		for _, f := range all {
			f()
		}
		if !q.idle() {
			t.Errorf("the pool is left with %+v", &q)
		}
	})
}

// Readers are served while streams and background have all they may have, and
// the host never has more than its slots.
func TestForegroundFirst(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		data := noise(64 << 10)
		b := blob(t, s, c, data)
		stall := &registrytest.Fault{Path: "/blobs/", Stall: 1 << 10, Times: slots - slotsDemand}
		s.Add(stall)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for i := range 40 {
			wg.Go(func() {
				r, err := b.Stream(ctx, Priority(i%3), 0)
				if err != nil {
					return
				}
				defer r.Close()
				io.Copy(io.Discard, r)
			})
		}
		synctest.Wait()
		start := time.Now()
		for range 50 {
			got, err := wholeRange(t, b, 5000, 100)
			if err != nil {
				t.Fatal(err)
			}
			same(t, got, data, 5000, 100)
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("readers waited %v behind streams", d)
		}
		if n := s.Most(); n > slots {
			t.Errorf("%d requests at once, want at most %d", n, slots)
		}
		cancel()
		stall.Release()
		wg.Wait()
	})
}

// Closing early and reading to the end both give the slot back.
func TestSlotsComeBack(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		b := blob(t, s, c, noise(100<<10))
		for i := range 5 * slots {
			r, err := b.Range(t.Context(), Background, int64(i), 50<<10)
			if err != nil {
				t.Fatal(err)
			}
			if i%2 == 0 {
				io.Copy(io.Discard, r)
			}
			if i%3 != 0 {
				r.Close()
			}
			r.Close()
			if _, err := r.Read(make([]byte, 1)); err == nil {
				t.Error("a closed reader reads")
			}
		}
		if h := c.state("http://" + s.Host()); !h.pool.idle() {
			t.Error("slots are still taken")
		}
	})
}
