package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// readyEnv names the descriptor on which a background supervisor reports; that it
// is set is what makes the process one.
const readyEnv = "IMGFS_READY_FD"

// verdict is what a server reports to its supervisor, and that to whoever mounts,
// once: lines for the user when the mount answers, or why there is none.
type verdict struct {
	Lines []string `json:"lines,omitempty"`
	Port  int      `json:"port,omitempty"`  // of the demo's registry
	Store string   `json:"store,omitempty"` // as images.Store.ID has it
	Error string   `json:"error,omitempty"`
}

// maxVerdict bounds what is read of a report, in bytes.
const maxVerdict = 1 << 16

// startBackground runs this program again as a supervisor in a session of its
// own, and waits until its mount answers.
func startBackground(cmd *cobra.Command, c *config, args []string) error {
	log, err := openLog(c.logPath())
	if err != nil {
		return err
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer r.Close()

	supervisor := exec.Command(self, args...)
	supervisor.Args[0] = "imgfs"
	supervisor.Env = append(os.Environ(), readyEnv+"=3")
	supervisor.ExtraFiles = []*os.File{w}
	supervisor.Stdout, supervisor.Stderr = log, log
	supervisor.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = supervisor.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("server: %w", err)
	}
	said, err := io.ReadAll(io.LimitReader(r, maxVerdict))
	if err != nil {
		return fmt.Errorf("server: %w", err)
	}
	var v verdict
	if json.Unmarshal(said, &v) != nil {
		end := "ended"
		if err := supervisor.Wait(); err != nil {
			end = err.Error()
		}
		return fmt.Errorf("%q: the server stopped before the mount answered (%s); see %q", c.dir, end, c.logPath())
	}
	if v.Error != "" {
		return errors.New(v.Error)
	}
	for _, line := range v.Lines {
		fmt.Fprintln(cmd.OutOrStdout(), line)
	}
	return supervisor.Process.Release()
}

// readyPipe is nil in a process that was not started by startBackground.
func readyPipe() *os.File {
	fd, err := strconv.Atoi(os.Getenv(readyEnv))
	if err != nil || fd < 3 {
		return nil
	}
	// The server is not to have it.
	unix.CloseOnExec(fd)
	if os.Unsetenv(readyEnv) != nil {
		return nil
	}
	return os.NewFile(uintptr(fd), "ready")
}

// send writes the verdict, and ends the pipe.
func (v verdict) send(pipe *os.File) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = pipe.Write(text)
	return errors.Join(err, pipe.Close())
}

// superviseBackground is the life of the background supervisor. Its stderr is the
// log.
func superviseBackground(c *config, args []string, pipe *os.File) error {
	s := &supervisor{c: c, args: args, stderr: os.Stderr, log: newLog(c.logLevel, os.Stderr)}
	reported := false
	err := s.run(func(lines []string) error {
		reported = true
		return verdict{Lines: lines}.send(pipe)
	})
	if err != nil && !reported {
		return errors.Join(err, verdict{Error: err.Error()}.send(pipe))
	}
	return err
}

// superviseForeground supervises in this process, and tells systemd when the mount
// is ready.
func superviseForeground(cmd *cobra.Command, c *config, args []string) error {
	stderr := os.Stderr
	if c.logFile != "" {
		f, err := openLog(c.logFile)
		if err != nil {
			return err
		}
		defer f.Close()
		stderr = f
	}
	s := &supervisor{c: c, args: args, stderr: stderr, loud: c.logFile == "", log: newLog(c.logLevel, stderr)}
	return s.run(func(lines []string) error {
		for _, line := range lines {
			fmt.Fprintln(cmd.OutOrStdout(), line)
		}
		// Without systemd this does nothing, and a systemd that does not listen
		// is no reason to give up a mount that works.
		_, _ = daemon.SdNotify(true, daemon.SdNotifyReady)
		return nil
	})
}
