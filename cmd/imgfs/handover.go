package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/fs"
)

// serverEnv tells a process that it is the server of a supervisor, and what it
// has from it: a handover as JSON.
const serverEnv = "IMGFS_SERVER"

// handover is what a supervisor gives to a server, besides its descriptors.
type handover struct {
	device     *fs.Device // nil: none is handed over
	Init       []byte     `json:"init"` // as in fs.Device
	Dev        uint64     `json:"dev"`
	Mount      string     `json:"mount"`
	Again      bool       `json:"again"`
	Dir        string     `json:"dir"` // the working directory in which the command line was written
	Supervisor int        `json:"supervisor"`
	Restarts   int        `json:"restarts"`
	LastEnd    string     `json:"lastEnd"`
	Quiet      bool       `json:"quiet"`      // the supervisor says at the same place why there is no mount
	Store      string     `json:"store"`      // images.Options.Resume
	Port       int        `json:"port"`       // where the demo's registry was before; 0: nowhere
	AllowOther bool       `json:"allowOther"` // what the kernel was told, whatever a configuration says now
	ExactModes bool       `json:"exactModes"`
}

// Descriptors of a server.
const (
	deviceFD = 3 // /dev/fuse
	reportFD = 4 // a socket, for its verdict
)

// Exit statuses of a server, which its supervisor understands.
const (
	exitRestart = 3 // another server is to take over
	exitStopped = 4 // it was told to end, and did while it was in use
)

// takeHandover is nil in a process that is not a server.
func takeHandover() (*handover, error) {
	text, ok := os.LookupEnv(serverEnv)
	if !ok {
		return nil, nil
	}
	h := &handover{}
	if err := json.Unmarshal([]byte(text), h); err != nil {
		return nil, fmt.Errorf("%s: %w; only imgfs itself sets it", serverEnv, err)
	}
	// Credential helpers are not to have them.
	unix.CloseOnExec(deviceFD)
	unix.CloseOnExec(reportFD)
	h.device = &fs.Device{File: os.NewFile(deviceFD, "/dev/fuse"), Init: h.Init, Dev: h.Dev, Dir: h.Mount, Again: h.Again}
	return h, os.Unsetenv(serverEnv)
}

// supervised reports whether the supervisor still lives.
func (h *handover) supervised() bool { return os.Getppid() == h.Supervisor }

// report tells the supervisor, with copies of the files that have the cache's
// locks.
func (h *handover) report(v verdict, locks ...*os.File) error {
	return sendReport(reportFD, v, locks...)
}

func sendReport(socket int, v verdict, locks ...*os.File) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var fds []int
	for _, f := range locks {
		fds = append(fds, int(f.Fd()))
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	return errors.Join(unix.Sendmsg(socket, text, rights, nil, unix.MSG_NOSIGNAL), unix.Close(socket))
}

// readReport waits for what a server tells at the other end. ok is false when it
// never will.
func readReport(socket int) (v verdict, locks []int, ok bool) {
	text, rights := make([]byte, maxVerdict), make([]byte, unix.CmsgSpace(4*maxLocks))
	for {
		n, nrights, _, _, err := unix.Recvmsg(socket, text, rights, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if messages, err := unix.ParseSocketControlMessage(rights[:nrights]); err == nil {
			for _, m := range messages {
				if fds, err := unix.ParseUnixRights(&m); err == nil {
					locks = append(locks, fds...)
				}
			}
		}
		return v, locks, err == nil && json.Unmarshal(text[:n], &v) == nil
	}
}

// maxLocks bounds the files that come with a report.
const maxLocks = 8

// run is the life of a server. Its stderr is the log. made says why there can be
// none, if the command line has become wrong.
func (h *handover) run(c *config, made error) error {
	// The terminal's end is not the mount's.
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	reported := false
	err := made
	if err == nil {
		err = serve(c, h, os.Stderr, func(v verdict, locks []*os.File) error {
			reported = true
			return h.report(v, locks...)
		})
	}
	if err != nil && !reported {
		err = errors.Join(err, h.report(verdict{Error: err.Error()}))
		if h.Quiet {
			return &statusError{code: exitFail}
		}
	}
	if errors.Is(err, errServing) {
		return &statusError{code: exitStopped, err: err}
	}
	return err
}
