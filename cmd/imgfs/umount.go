package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newUmount() *cobra.Command {
	return &cobra.Command{
		Use:     "umount DIR",
		Aliases: []string{"unmount"},
		Short:   "Unmount, and stop the server",
		Long: `Unmount DIR and wait for its server to end, so that the cache directory is free
again. If the mount is in use, nothing happens, and the processes that use it are
named.`,
		Example: "  imgfs umount /mnt/images",
		Args:    takes(1, 1, "DIR"),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			var dirs []cobra.Completion
			if mounts, err := allMounts(); err == nil {
				for _, m := range mounts {
					dirs = append(dirs, m.Mountpoint)
				}
			}
			return dirs, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error { return umount(args[0]) },
	}
}

func umount(dir string) error {
	at, err := mountAt(dir)
	if err != nil {
		return err
	}
	if at == nil {
		return fmt.Errorf("%q: imgfs is not mounted there", dir)
	}
	server := serverOf(at.Mountpoint)
	if server >= 0 {
		defer unix.Close(server)
	}
	err = unmount(at.Mountpoint, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%q: busy: %s", at.Mountpoint, busyText(at.Mountpoint))
	}
	if err != nil {
		return fmt.Errorf("%q: %w", at.Mountpoint, err)
	}
	return waitEnd(server)
}

const (
	askTimeout = 2 * time.Second  // for the server to say who it is
	endTimeout = 60 * time.Second // for the server to end, once unmounted
)

// serverOf is a pidfd of the process that serves the mount on dir, or -1: a
// server that is dead, hangs, or lives in another PID namespace.
func serverOf(dir string) int {
	answer := make(chan int, 1)
	// Left behind if the server hangs: this process ends soon, and the read with it.
	go func() {
		var stats struct {
			PID int `json:"pid"`
		}
		text, err := os.ReadFile(filepath.Join(dir, control, "stats.json"))
		if err != nil || json.Unmarshal(text, &stats) != nil {
			stats.PID = 0
		}
		answer <- stats.PID
	}()
	select {
	case pid := <-answer:
		if pid <= 1 {
			return -1
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return -1
		}
		return fd
	case <-time.After(askTimeout):
		return -1
	}
}

// waitEnd waits for the end of the process behind a pidfd; -1 is over already.
func waitEnd(pidfd int) error {
	if pidfd < 0 {
		return nil
	}
	deadline := time.Now().Add(endTimeout)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("unmounted, but its server has not ended within %v; see its log", endTimeout)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for the server: %w", err)
		}
		if n > 0 {
			return nil
		}
	}
}
