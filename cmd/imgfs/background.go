package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// readyEnv names the descriptor on which a background server reports; that it is
// set is what makes the process one.
const readyEnv = "IMGFS_READY_FD"

// verdict is what a background server reports, once: lines for the user when the
// mount answers, or why there is none.
type verdict struct {
	Lines []string `json:"lines,omitempty"`
	Error string   `json:"error,omitempty"`
}

// maxVerdict bounds what is read of a report, in bytes.
const maxVerdict = 1 << 20

// startBackground runs this program again as a server in a session of its own,
// and waits until its mount answers.
func startBackground(cmd *cobra.Command, c *config, args []string) error {
	logFile := c.logFile
	if logFile == "" {
		logFile = filepath.Join(c.cacheDir, "imgfs.log")
	}
	log, err := openLog(logFile)
	if err != nil {
		return err
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer r.Close()

	server := exec.Command("/proc/self/exe", args...)
	server.Args[0] = "imgfs"
	server.Env = append(os.Environ(), readyEnv+"=3")
	server.ExtraFiles = []*os.File{w}
	// Whatever the server prints, a panic above all, belongs to its log.
	server.Stdout, server.Stderr = log, log
	server.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = server.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("server: %w", err)
	}
	report, err := io.ReadAll(io.LimitReader(r, maxVerdict))
	if err != nil {
		return fmt.Errorf("server: %w", err)
	}
	var v verdict
	if json.Unmarshal(report, &v) != nil {
		end := "ended"
		if err := server.Wait(); err != nil {
			end = err.Error()
		}
		return fmt.Errorf("%q: the server stopped before the mount answered (%s); see %q", c.dir, end, logFile)
	}
	if v.Error != "" {
		return errors.New(v.Error)
	}
	for _, line := range v.Lines {
		fmt.Fprintln(cmd.OutOrStdout(), line)
	}
	return server.Process.Release()
}

// ready is the background server's end of the pipe.
type ready struct{ pipe *os.File }

// readyPipe is nil in a process that was not started by startBackground.
func readyPipe() *ready {
	fd, err := strconv.Atoi(os.Getenv(readyEnv))
	if err != nil || fd < 3 {
		return nil
	}
	// Credential helpers are not to have it.
	unix.CloseOnExec(fd)
	if os.Unsetenv(readyEnv) != nil {
		return nil
	}
	return &ready{os.NewFile(uintptr(fd), "ready")}
}

func (r *ready) report(v verdict) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = r.pipe.Write(text)
	return errors.Join(err, r.pipe.Close())
}

// serve is the life of the background server. Its stderr is the log.
func (r *ready) serve(c *config) error {
	// The terminal's end is not the mount's.
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	if err := os.Chdir("/"); err != nil {
		return err
	}
	reported := false
	err := serve(c, os.Stderr, func(lines []string) error {
		reported = true
		return r.report(verdict{Lines: lines})
	})
	if err != nil && !reported {
		return errors.Join(err, r.report(verdict{Error: err.Error()}))
	}
	return err
}
