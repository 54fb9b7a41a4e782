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
	Quiet      bool       `json:"quiet"` // the supervisor says at the same place why there is no mount
	Port       int        `json:"port"`  // where the demo's registry was before; 0: nowhere
}

// Descriptors of a server.
const (
	deviceFD = 3 // /dev/fuse
	reportFD = 4 // a pipe, for its verdict
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

func (h *handover) report(v verdict) error { return v.send(os.NewFile(reportFD, "report")) }

// run is the life of a server. Its stderr is the log. made says why there can be
// none, if the command line has become wrong.
func (h *handover) run(c *config, made error) error {
	// The terminal's end is not the mount's.
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	reported := false
	err := made
	if err == nil {
		err = serve(c, h, os.Stderr, func(lines []string, port int) error {
			reported = true
			return h.report(verdict{Lines: lines, Port: port})
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
