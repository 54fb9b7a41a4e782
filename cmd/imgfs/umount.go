package main

import (
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

	"github.com/imgfs/imgfs/fs"
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
			return mountpoints(), cobra.ShellCompDirectiveNoFileComp
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
	ends, answers := pidfdsOf(at)
	defer func() {
		for _, fd := range ends {
			unix.Close(fd)
		}
	}()
	if !answers && orphaned(at) {
		// A thread of a server that was killed may wait in the kernel for a lock
		// that somebody holds who waits for the server. Only ending the connection
		// ends both.
		_ = unix.Unmount(at.Mountpoint, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
		if again, err := mountAt(dir); err != nil || again == nil {
			return err
		}
	}
	err = fs.Unmount(at.Mountpoint, 0)
	if errors.Is(err, unix.EBUSY) && !answers {
		return fmt.Errorf("%q: its server does not answer; have it replaced by 'imgfs restart %s', then unmount", at.Mountpoint, at.Mountpoint)
	}
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%q: busy: %s", at.Mountpoint, busyText(at.Mountpoint))
	}
	if err != nil {
		return fmt.Errorf("%q: %w", at.Mountpoint, err)
	}
	for _, fd := range ends {
		if err := waitEnd(fd); err != nil {
			return err
		}
	}
	return nil
}

const (
	askTimeout = 2 * time.Second  // for the server to say who it is
	endTimeout = 60 * time.Second // for the server to end, once unmounted
)

// pidfdsOf are pidfds of the processes of a mount, as far as they live and can be
// found. answers is false when reading the mount neither worked nor failed in
// time.
func pidfdsOf(at *mountinfo.Info) (fds []int, answers bool) {
	p, err := processesOf(at.Mountpoint)
	pids := []int{p.PID, p.Supervisor}
	if err != nil {
		supervisor, _ := supervisorOf(at)
		pids = []int{supervisor}
	}
	for _, pid := range pids {
		if pid <= 1 {
			continue
		}
		if fd, err := unix.PidfdOpen(pid, 0); err == nil { // else it is in another PID namespace
			fds = append(fds, fd)
		}
	}
	return fds, !errors.Is(err, errSilent)
}

// orphaned reports whether no process that lives serves the mount. It is false
// where that cannot be told.
func orphaned(at *mountinfo.Info) bool {
	holders, sure := holdersOf(at)
	return sure && len(holders) == 0
}

// holdersOf are the processes that have the /dev/fuse of a mount open. sure is
// false where there may be others: not root, a container, a kernel that does not
// tell whose connection a descriptor is.
func holdersOf(at *mountinfo.Info) (pids map[int]bool, sure bool) {
	pids = map[int]bool{}
	const first = "pid:[4026531836]" // PROC_PID_INIT_INO: from it all processes are seen
	space, err := os.Readlink("/proc/self/ns/pid")
	sure = err == nil && space == first && os.Geteuid() == 0
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil || len(fds) == 0 {
		return pids, false
	}
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err != nil || target != "/dev/fuse" {
			continue
		}
		dir, number := filepath.Split(fd)
		n, told := fuseConnection(filepath.Join(dir, "../fdinfo", number))
		sure = sure && told
		if pid, err := strconv.Atoi(strings.Split(fd, "/")[2]); err == nil && told && n == at.Minor {
			pids[pid] = true
		}
	}
	return pids, sure
}

// parentPID is the parent of a process, 0 if it cannot be told.
func parentPID(pid int) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if v, is := strings.CutPrefix(line, "PPid:"); is {
			parent, _ := strconv.Atoi(strings.TrimSpace(v))
			return parent
		}
	}
	return 0
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

// waitEnd waits for the end of the process behind a pidfd.
func waitEnd(pidfd int) error {
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
