package integration

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// long reports whether the tests that find more the longer they run may take minutes.
func long() bool { return os.Getenv("IMGFS_TEST_LONG") != "" }

// chaosKinds is how many images the workers' names share.
const chaosKinds = 24

// loads are n workloads on names of their own, in two registries.
func loads(m *mount, s *stock, n int, shared bool) []workload {
	seed := uint64(time.Now().UnixNano())
	m.t.Logf("seed %d", seed)
	list := make([]workload, n)
	for i := range list {
		own := fmt.Sprintf("w%02d", i)
		if shared {
			own = "shared"
		}
		list[i] = workload{Mount: m.dir, Stock: s.host, Repos: []string{own, s.host + "/o" + own}, Tags: 5, Kinds: chaosKinds, Seed: seed + uint64(i), Shared: shared}
	}
	return list
}

// TestManyProcesses has 64 processes do random operations, half of them on names
// of their own and half on the same names: afterwards every name is what the
// models say, or at least an image, and every counter is what a count gives.
func TestManyProcesses(t *testing.T) {
	s := startStock(t, chaosKinds)
	m := startFast(t, s.hub(t)...)
	work := append(loads(m, s, 32, false), loads(m, s, 32, true)...)
	reports := make([]report, len(work))
	var wg sync.WaitGroup
	for i := range work {
		work[i].For = 10 * time.Second
		if long() {
			work[i].For = time.Minute
		}
		wg.Go(func() {
			var err error
			if reports[i], err = inProcess(t, work[i]); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	counts, slow := map[string]int{}, map[string]time.Duration{}
	for i, r := range reports {
		for _, w := range r.Wrong {
			t.Errorf("worker %d: %s", i, w)
		}
		for op, n := range r.Counts {
			counts[op] += n
		}
		for op, d := range r.Slow {
			slow[op] = max(slow[op], d)
		}
	}
	t.Logf("operations that succeeded: %v; the longest: %v", counts, slow)
	for _, op := range []string{"mkdir", "rmdir", "symlink", "rename", "noreplace", "exchange", "touch", "read", "ls"} {
		if counts[op] == 0 {
			t.Errorf("no %s has succeeded", op)
		}
	}
	if t.Failed() {
		return
	}
	check := func() {
		t.Helper()
		want := map[string]int{}
		for i, r := range reports {
			if work[i].Shared {
				continue
			}
			maps.Copy(want, r.Model)
			checkState(t, work[i], r)
		}
		m.checkModel(s, want)
		s.check(m)
		m.recount()
	}
	check()
	m.restart()
	check()
}

// startFast mounts with a cache in memory, where there is room for one: so many
// more operations take place.
func startFast(t testing.TB, flags ...string) *mount {
	t.Helper()
	needFUSE(t)
	top, err := os.MkdirTemp(roomy(), "imgfs-integration-")
	if err != nil {
		t.Fatal(err)
	}
	return startMountAt(t, top, append(flags, "--cache-size", "4GiB")...)
}

// checkState compares what is there of a worker's names with what it reported.
func checkState(t *testing.T, l workload, r report) map[string]int {
	t.Helper()
	got, err := newWorker(l, nil).state()
	if err != nil {
		t.Errorf("%v: %v", l.Repos, err)
		return nil
	}
	if !maps.Equal(got, r.Model) && (r.After == nil || !maps.Equal(got, r.After)) {
		t.Errorf("%s (seed %d): there is %v, want %v", l.Repos[0], l.Seed, got, r.Model)
		if r.After != nil {
			t.Errorf("or, when the last operation (%s) was done: %v", r.Last, r.After)
		}
	}
	return got
}

// checkModel compares images.json with a model: all names in it but shared ones.
func (m *mount) checkModel(s *stock, want map[string]int) {
	m.t.Helper()
	ids := map[string]string{}
	for path, k := range want {
		ids[path] = s.kinds[k].id.String()
	}
	got := map[string]string{}
	for _, i := range m.images() {
		if !i.Dangling && !strings.HasSuffix(i.Repository, "shared") {
			got[i.path()] = i.ID
		}
	}
	if !maps.Equal(got, ids) {
		m.t.Errorf("images.json has %v, want %v", got, ids)
	}
}

// TestKilledInOperations kills the server again and again while workers work: after
// each restart every name is as it was before the operation that was cut off, or
// as it is after it.
func TestKilledInOperations(t *testing.T) {
	kills := 20
	if long() {
		kills = 200
	}
	s := startStock(t, chaosKinds)
	m := startFast(t, s.hub(t)...)
	work := loads(m, s, 8, false)
	cut := map[string]int{}
	for round := range kills {
		var killed atomic.Bool
		reports := make([]report, len(work))
		var wg sync.WaitGroup
		for i := range work {
			work[i].Seed += 1000
			work[i].For = time.Minute
			w := newWorker(work[i], &killed)
			wg.Go(func() { reports[i] = w.run() })
		}
		time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
		killed.Store(true)
		m.kill()
		// A thread of the server may be in the kernel, waiting for somebody who waits
		// for the server: umount ends both. That it is busy is nothing.
		if out, err := exec.Command(binary(t), "umount", m.dir).CombinedOutput(); err != nil {
			t.Logf("umount after a kill: %s", out)
		}
		wg.Wait()
		m.revive()
		for i, r := range reports {
			for _, w := range r.Wrong {
				t.Errorf("round %d, worker %d: %s", round, i, w)
			}
			kind, _, _ := strings.Cut(r.Last, " ")
			if r.After != nil && !maps.Equal(r.Model, r.After) {
				cut[kind]++
			}
			work[i].Start = checkState(t, work[i], r)
		}
		if m.recount(); t.Failed() {
			t.Fatalf("after kill %d", round+1)
		}
	}
	s.check(m)
	t.Logf("operations that were cut off: %v", cut)
	if len(cut) < 3 {
		t.Errorf("only %v were cut off: the kills come at the wrong moments", slices.Sorted(maps.Keys(cut)))
	}
}

// kill ends all of the mount's processes: the supervisor too, which meanwhile may
// start another server.
func (m *mount) kill() {
	m.t.Helper()
	pids := m.pids()
	if len(pids) == 0 {
		m.t.Fatal("no process of the mount found")
	}
	for range 3 {
		for _, pid := range pids {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
				m.t.Fatal(err)
			}
		}
		pids = m.pids()
	}
}

// revive mounts again after a kill.
func (m *mount) revive() {
	m.t.Helper()
	for range 100 {
		if len(m.pids()) == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for m.mounted() {
		if err := unix.Unmount(m.dir, unix.MNT_DETACH); err != nil {
			m.t.Fatal(err)
		}
	}
	m.start()
}
