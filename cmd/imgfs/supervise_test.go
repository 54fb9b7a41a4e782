package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCrashes counts crashes: five within a minute are too many, and after that
// one; who was killed after it had answered for a while has not crashed.
func TestCrashes(t *testing.T) {
	crash := ending{err: exec.Command("sh", "-c", "exit 2").Run(), answered: true, lived: 5 * time.Second}
	kill := ending{err: exec.Command("sh", "-c", "kill -9 $$").Run(), answered: true, lived: 5 * time.Second}
	if crash.killed() || !kill.killed() {
		t.Fatalf("killed: %v and %v, want false and true", crash.killed(), kill.killed())
	}
	young, old := kill, crash
	young.lived, old.lived = time.Millisecond, time.Hour
	type step struct {
		end    ending
		after  time.Duration // since the step before
		wait   time.Duration
		refuse bool
	}
	for name, steps := range map[string][]step{
		"a loop": {{crash, 0, 0, false}, {crash, time.Second, firstWait, false}, {crash, time.Second, 2 * firstWait, false},
			{crash, time.Second, 4 * firstWait, false}, {crash, time.Second, 0, true}, {crash, 2 * time.Minute, 0, true}, {old, 0, 0, false}},
		"now and then": {{crash, 0, 0, false}, {crash, 2 * crashWindow, 0, false}, {crash, 2 * crashWindow, 0, false},
			{crash, 2 * crashWindow, 0, false}, {crash, 2 * crashWindow, 0, false}, {crash, 2 * crashWindow, 0, false}},
		"killed by hand": {{kill, 0, 0, false}, {kill, 0, 0, false}, {kill, 0, 0, false}, {kill, 0, 0, false}, {kill, 0, 0, false}, {kill, 0, 0, false}},
		"killed at once": {{young, 0, 0, false}, {young, 0, firstWait, false}, {young, 0, 2 * firstWait, false}, {young, 0, 4 * firstWait, false}, {young, 0, 0, true}},
	} {
		s, now := &supervisor{}, time.Now()
		for i, x := range steps {
			now = now.Add(x.after)
			if wait, refuse := s.count(x.end, now); wait != x.wait || refuse != x.refuse {
				t.Errorf("%s, crash %d: count = %v, %v, want %v, %v", name, i, wait, refuse, x.wait, x.refuse)
			}
		}
	}
}

// TestReport passes a verdict and the locks that come with it from a server to its
// supervisor, which takes them off.
func TestReport(t *testing.T) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ends[0])
	path := filepath.Join(t.TempDir(), "lock")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if err := sendReport(ends[1], verdict{Port: 7, Lines: []string{"x"}}, f); err != nil {
		t.Fatal(err)
	}
	v, locks, ok := readReport(ends[0])
	if !ok || v.Port != 7 || len(v.Lines) != 1 || len(locks) != 1 {
		t.Fatalf("readReport = %+v, %v, %v, want what was sent", v, locks, ok)
	}
	other, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("the lock of a server that lives: %v, want EWOULDBLOCK", err)
	}
	(&child{locks: locks}).free()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("the lock of a server that has ended: %v, want it", err)
	}
	if _, _, ok := readReport(ends[0]); ok {
		t.Error("readReport of a server that has ended is ok")
	}
}

// TestDying tells processes that live from those that are dead and not yet reaped.
func TestDying(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &child{cmd: cmd}
	if p.dying() {
		t.Error("a process that lives is dying")
	}
	for end := time.Now().Add(10 * time.Second); !p.stuck(); time.Sleep(time.Millisecond) { // it sleeps soon
		if time.Now().After(end) {
			t.Fatal("a process that sleeps: stuck is false")
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); !p.dying() || p.stuck(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("a zombie: dying %v, stuck %v, want true and false", p.dying(), p.stuck())
		}
	}
	_ = cmd.Wait()
}
