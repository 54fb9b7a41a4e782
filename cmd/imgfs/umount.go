package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
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
	server, answers := serverOf(at.Mountpoint)
	if server >= 0 {
		defer unix.Close(server)
	}
	if !answers && orphaned(at) {
		// A thread of a server that was killed may wait in the kernel for a lock
		// that somebody holds who waits for the server. Only ending the connection
		// ends both.
		_ = unix.Unmount(at.Mountpoint, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
		if again, err := mountAt(dir); err != nil || again == nil {
			return err
		}
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
// server that is dead, hangs, or lives in another PID namespace. answers is false
// when reading the mount neither worked nor failed in time.
func serverOf(dir string) (pidfd int, answers bool) {
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
			return -1, true
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return -1, true
		}
		return fd, true
	case <-time.After(askTimeout):
		return -1, false
	}
}

// orphaned reports whether no process that lives serves the mount. It is false
// where that cannot be told: not root, a container, a kernel that does not tell
// whose connection a descriptor is.
func orphaned(at *mountinfo.Info) bool {
	const first = "pid:[4026531836]" // PROC_PID_INIT_INO: from it all processes are seen
	if space, err := os.Readlink("/proc/self/ns/pid"); err != nil || space != first || os.Geteuid() != 0 {
		return false
	}
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil || len(fds) == 0 {
		return false
	}
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err != nil || target != "/dev/fuse" {
			continue
		}
		dir, number := filepath.Split(fd)
		if n, told := fuseConnection(filepath.Join(dir, "../fdinfo", number)); !told || n == at.Minor {
			return false
		}
	}
	return true
}

// fuseConnection is the connection of an open /dev/fuse, which is the minor
// number of its mount's device.
func fuseConnection(fdinfo string) (n int, ok bool) {
	text, err := os.ReadFile(fdinfo)
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(text)) {
		if v, is := strings.CutPrefix(line, "fuse_connection:"); is {
			n, err = strconv.Atoi(strings.TrimSpace(v))
			return n, err == nil
		}
	}
	return 0, false
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
