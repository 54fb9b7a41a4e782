package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/fs"
)

// A mount has two processes. The supervisor mounts, keeps /dev/fuse open and
// starts the server, which does all the rest. While the supervisor has the
// device, requests wait for a server, whoever uses the mount notices nothing but
// the time, and the kernel's caches stay.

// supervisor keeps a mount going.
type supervisor struct {
	c      *config
	args   []string // of imgfs, for the server
	binary string   // where this program was installed when it was started
	cwd    string   // where args were written
	stderr *os.File // of the server
	loud   bool     // it is also where this process prints its error
	log    *slog.Logger

	device    *fs.Device
	signals   chan os.Signal
	stopping  bool // somebody asked for the end
	announced bool // that the mount answers, to who started this process
	failed    bool // the last server has never answered

	crashes  []time.Time // in the last crashWindow
	refused  bool        // there were too many, and no server has lived for crashWindow since
	restarts int
	lastEnd  string
	down     time.Time // when the last server ended
	port     int       // of the demo's registry
	store    string    // images.Store.ID
}

// Bounds of a server that crashes again and again.
const (
	maxCrashes  = 5
	crashWindow = time.Minute
	// A server that was killed (by hand, for want of memory) after it has answered
	// for so long has not crashed.
	killedAfter = time.Second
	// startTime is how long a server that is not the first may take to answer.
	startTime = 2 * time.Minute
	// dyingTime is how often to look whether the server has begun to die.
	dyingTime = 250 * time.Millisecond
	goneTime  = 2 * endTimeout         // that a server has to end in, once unmounted
	firstWait = 100 * time.Millisecond // after the second crash; then twice that for each
)

// ending is how a server ended.
type ending struct {
	err      error         // of its process
	failure  string        // why it could not serve, as it said itself
	answered bool          // its mount has answered
	lived    time.Duration // since then
	planned  bool          // it was asked to
}

// run mounts, and serves by one server after the other until the mount is gone.
// It calls ready once, when the mount answers; if that fails nobody waits for the
// mount and it is taken away.
func (s *supervisor) run(ready func(lines []string) error) error {
	var err error
	if s.cwd, err = os.Getwd(); err != nil {
		s.cwd = "/" // gone; then no path is relative to it either
	}
	if !s.c.foreground {
		if err := os.Chdir("/"); err != nil { // what is below it can be unmounted
			return err
		}
	}
	// What is below the mount can be asked for only while there is a server.
	if s.binary, err = os.Executable(); err != nil || isBelow(s.binary, s.c.dir) {
		s.binary = self
	}
	_ = os.WriteFile("/proc/self/comm", []byte("imgfs"), 0) // it was started as "exe"
	s.signals = make(chan os.Signal, 4)
	signal.Ignore(unix.SIGPIPE)
	signal.Notify(s.signals, unix.SIGINT, unix.SIGTERM, restartSignal)
	if s.c.foreground && !signal.Ignored(unix.SIGHUP) {
		signal.Notify(s.signals, unix.SIGHUP) // the terminal's end is the mount's
	} else {
		signal.Ignore(unix.SIGHUP)
	}
	defer signal.Stop(s.signals)
	if s.device, err = fs.OpenDevice(s.c.dir, s.c.mountOptions()); err != nil {
		return explain(err)
	}
	defer s.device.Close()
	for {
		server, err := s.start()
		var end ending
		if err == nil {
			end = s.watch(server, ready)
		} else {
			end = ending{err: err}
		}
		if over, err := s.after(end); over {
			return err
		}
		s.device.Again = true
		if s.announced {
			ready = nil
		}
	}
}

// restartSignal asks a supervisor for another server.
const restartSignal = unix.SIGUSR1

// self is this very program, whatever is installed in its place by now.
const self = "/proc/self/exe"

// start starts a server: of the program as it is installed now, so that it can be
// upgraded, but not again if that has just failed.
func (s *supervisor) start() (*child, error) {
	s.turnLog()
	program := s.binary
	if info, err := os.Stat(program); s.failed || err != nil || !info.Mode().IsRegular() {
		program = self
	}
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	theirs := os.NewFile(uintptr(ends[1]), "report")
	defer theirs.Close()
	given, err := json.Marshal(handover{
		Init: s.device.Init, Dev: s.device.Dev, Mount: s.device.Dir, Again: s.device.Again, Dir: s.cwd, Supervisor: os.Getpid(),
		Restarts: s.restarts, LastEnd: s.lastEnd, Port: s.port, Store: s.store,
		Quiet:      s.loud && !s.device.Again,
		AllowOther: s.c.allowOther, ExactModes: s.c.modes == "exact",
	})
	if err != nil {
		unix.Close(ends[0])
		return nil, err
	}
	cmd := exec.Command(program, s.args...)
	cmd.Args[0] = "imgfs"
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "NOTIFY_SOCKET=") // systemd hears from this process
	}), serverEnv+"="+string(given))
	cmd.ExtraFiles = []*os.File{s.device.File, theirs} // deviceFD, reportFD
	// Whatever the server prints, a panic above all, belongs to its log.
	cmd.Stdout, cmd.Stderr = s.stderr, s.stderr
	// A terminal's interrupt is for this process, which passes it on.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		unix.Close(ends[0])
		return nil, fmt.Errorf("server: %w", err)
	}
	p := &child{cmd: cmd, verdict: make(chan said, 1), ended: make(chan error, 1)}
	go func() {
		defer close(p.verdict)
		defer unix.Close(ends[0])
		if v, locks, ok := readReport(ends[0]); ok {
			p.verdict <- said{v, locks}
		}
	}()
	go func() { p.ended <- cmd.Wait() }()
	return p, nil
}

// turnLog begins another log file when the old one has become long.
func (s *supervisor) turnLog() {
	if s.loud || s.restarts == 0 {
		return
	}
	f, err := openLog(s.c.logPath())
	if err != nil {
		s.log.Warn("the log goes on in the old file", "err", err)
		return
	}
	if s.stderr != os.Stderr {
		s.stderr.Close()
	}
	s.stderr, s.log = f, newLog(s.c.logLevel, f)
}

// watch waits for the end of a server, and passes signals on to it. ready is nil
// but for the first server.
func (s *supervisor) watch(p *child, ready func(lines []string) error) (end ending) {
	var answered, gone time.Time
	verdicts := p.verdict
	look, seen := time.NewTicker(dyingTime), false
	defer look.Stop()
	late := time.NewTimer(startTime)
	defer late.Stop()
	if ready != nil {
		late.Stop()
	}
	for {
		select {
		case v, ok := <-verdicts:
			verdicts = nil
			late.Stop()
			if ok {
				answered = s.heard(p, v, &end, ready)
			}
		case sig := <-s.signals:
			if sig == restartSignal {
				s.log.Info("another server is asked for", "dir", s.c.dir)
				end.planned = true
				_ = p.cmd.Process.Kill()
			} else {
				s.stop(p)
			}
		case <-late.C:
			s.log.Error("the server does not answer", "after", startTime)
			_ = p.cmd.Process.Kill()
		case <-look.C:
			dying := p.dying()
			if dying && seen && p.stuck() {
				return s.ended(p, end, errDying, answered)
			}
			if seen = dying; dying {
				look.Reset(dyingTime / 5)
			}
			if gone.IsZero() && s.device.Gone() {
				gone = time.Now()
			}
			if !gone.IsZero() && time.Since(gone) > goneTime {
				s.log.Error("unmounted, and the server does not end", "dir", s.c.dir)
				_ = p.cmd.Process.Kill()
			}
		case err := <-p.ended:
			if v, ok := <-p.verdict; verdicts != nil && ok { // it was quicker than this process
				answered = s.heard(p, v, &end, ready)
			}
			return s.ended(p, end, err, answered)
		}
	}
}

// heard takes a server's verdict, and returns when its mount answered; the zero time
// when it cannot.
func (s *supervisor) heard(p *child, v said, end *ending, ready func(lines []string) error) (answered time.Time) {
	p.locks = v.locks
	if v.Error != "" {
		end.failure = v.Error
		return answered
	}
	answered = time.Now()
	end.answered, s.failed, s.port, s.store = true, false, v.Port, v.Store
	if ready == nil {
		s.log.Info("another server has taken over", "dir", s.c.dir, "pid", p.cmd.Process.Pid,
			"after", answered.Sub(s.down).Round(time.Millisecond))
		return answered
	}
	s.announced = true
	if err := ready(v.Lines); err != nil {
		s.log.Warn("nobody waits for the mount", "err", err)
		s.stop(p)
	}
	return answered
}

// ended completes what is to be known of the end of a server.
func (s *supervisor) ended(p *child, end ending, err error, answered time.Time) ending {
	p.free()
	s.down = time.Now()
	end.err = err
	if end.answered {
		end.lived = s.down.Sub(answered)
	}
	end.planned = end.planned || exitStatus(err) == exitRestart
	return end
}

// stop passes the wish for the end on to the server.
func (s *supervisor) stop(p *child) {
	s.stopping = true
	_ = p.cmd.Process.Signal(unix.SIGTERM)
}

// exitStatus is that of a process which err tells of; -1 when it has none, as
// after a signal.
func exitStatus(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}

// after decides what follows the end of a server: the supervisor's own, or
// another server, when it returns.
func (s *supervisor) after(end ending) (over bool, err error) {
	text := "exit status 0"
	if end.err != nil {
		text = end.err.Error()
	}
	gone, first := s.device.Gone(), !s.device.Again
	switch {
	case first && !end.answered:
		s.detach(gone)
		if end.failure != "" {
			return true, errors.New(end.failure)
		}
		hint := ""
		if !s.loud {
			hint = fmt.Sprintf("; see %q", s.c.logPath())
		}
		return true, fmt.Errorf("%q: the server stopped before the mount answered (%s)%s", s.c.dir, text, hint)
	case gone && end.err == nil:
		return true, nil
	case gone || s.stopping || exitStatus(end.err) == exitStopped:
		s.log.Info("the server has ended, and the mount with it", "dir", s.c.dir, "end", text)
		s.detach(gone)
		return true, &statusError{code: exitFail}
	}
	s.restarts++
	s.lastEnd = text
	if end.planned {
		s.lastEnd = "asked for"
		s.log.Info("starting another server", "dir", s.c.dir)
		return false, nil
	}
	s.failed = !end.answered
	if end.failure != "" {
		text += ": " + end.failure
	}
	return s.crashed(end, text)
}

// crashed waits as long as is right after a crash. The first is followed by
// another server at once, more of them later, and too many by errors instead of
// answers, until it is time to try again.
func (s *supervisor) crashed(end ending, text string) (over bool, err error) {
	wait, refuse := s.count(end, time.Now())
	if refuse {
		s.log.Error("servers crash one after the other: the mount answers EIO; trying again in a minute, or when told to by 'imgfs restart'",
			"dir", s.c.dir, "end", text)
		return s.refuse()
	}
	s.log.Error("the server has died; starting another", "dir", s.c.dir, "end", text, "in", wait)
	return s.pause(wait)
}

// count counts a crash, and tells how long to wait after it, or to refuse.
func (s *supervisor) count(end ending, now time.Time) (wait time.Duration, refuse bool) {
	if end.lived >= crashWindow {
		s.refused, s.crashes = false, nil
	}
	if !end.killed() || end.lived < killedAfter {
		s.crashes = append(s.crashes, now)
	}
	s.crashes = slices.DeleteFunc(s.crashes, func(t time.Time) bool { return now.Sub(t) > crashWindow })
	n := len(s.crashes)
	if n >= maxCrashes || s.refused && n > 0 {
		s.refused, s.crashes = true, nil
		return 0, true
	}
	if n > 1 {
		wait = firstWait << (n - 2)
	}
	return wait, false
}

// killed reports whether somebody has killed the server, or the kernel for want of
// memory.
func (e ending) killed() bool {
	var exit *exec.ExitError
	return e.err == errDying || errors.As(e.err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == unix.SIGKILL
}

// pause waits, or until somebody wants something.
func (s *supervisor) pause(wait time.Duration) (over bool, err error) {
	select {
	case sig := <-s.signals:
		return s.told(sig)
	case <-time.After(wait):
	}
	if s.device.Gone() {
		return true, nil
	}
	return false, nil
}

// told is what a signal means while there is no server.
func (s *supervisor) told(sig os.Signal) (over bool, err error) {
	if sig == restartSignal {
		s.log.Info("another server is asked for", "dir", s.c.dir)
		return false, nil
	}
	s.log.Info("stopping", "signal", sig.String())
	s.detach(false)
	return true, nil
}

// refuse answers with errors until it is time for another server.
func (s *supervisor) refuse() (over bool, err error) {
	stop, refused := make(chan struct{}), make(chan error, 1)
	go func() { refused <- s.device.Refuse(stop) }()
	end := func() error {
		close(stop)
		return <-refused
	}
	select {
	case sig := <-s.signals:
		if err := end(); errors.Is(err, unix.ENODEV) {
			return true, nil
		}
		return s.told(sig)
	case <-time.After(crashWindow):
		s.log.Info("trying again", "dir", s.c.dir)
		return false, end()
	case err := <-refused:
		if !errors.Is(err, unix.ENODEV) {
			s.log.Error("cannot answer", "dir", s.c.dir, "err", err)
			return s.pause(crashWindow)
		}
		return true, nil
	}
}

// detach takes the mount off its path. What uses it loses it when this process
// ends.
func (s *supervisor) detach(gone bool) {
	if gone || !s.device.Mounted(s.c.dir) {
		return
	}
	if err := detach(s.c.dir); err != nil {
		s.log.Error("detach", "dir", s.c.dir, "err", err)
	}
}

// logPath is the file of a log in the background, and with -f if it has one.
func (c *config) logPath() string {
	if c.logFile != "" {
		return c.logFile
	}
	return filepath.Join(c.cacheDir, "imgfs.log")
}
