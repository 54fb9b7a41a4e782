package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// newBring returns the hidden command bring, in which startBring runs the system
// call of a pull. It prints the errno as a number, 0 for none.
func newBring() *cobra.Command {
	return &cobra.Command{
		Use:    "bring MOUNT PATH",
		Short:  "Make or touch the directory of an image",
		Hidden: true,
		Args:   takes(2, 2, "MOUNT PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var errno unix.Errno
			if err := bring(args[0], args[1]); err != nil && !errors.As(err, &errno) {
				return err
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), int(errno))
			return err
		},
	}
}

// startBring brings path below mount here, and sends the outcome. A process that
// waits in the mount's server cannot end, not by any signal, before the server
// has answered: so another one waits, which this one can leave behind.
func startBring(mount, path string) <-chan error {
	called := make(chan error, 1)
	var out strings.Builder
	child := exec.Command("/proc/self/exe", "bring", "--", mount, path)
	child.Args[0] = "imgfs"
	child.Stdout = &out
	child.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // the terminal's interrupt is this process's
	if err := child.Start(); err != nil {
		called <- err
		return called
	}
	// Left behind with the child; this process ends then.
	go func() {
		err := child.Wait()
		errno, bad := strconv.Atoi(strings.TrimSpace(out.String()))
		switch {
		case err == nil && bad == nil && errno == 0:
			called <- nil
		case err == nil && bad == nil:
			called <- unix.Errno(errno)
		default:
			called <- errors.Join(err, bad)
		}
	}()
	return called
}

// bring makes path below mount, which pulls the image, or touches it when it is
// here, which asks its registry again.
func bring(mount, path string) error {
	err := unix.Mkdir(filepath.Join(mount, path), 0o755)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EEXIST):
		return touch(filepath.Join(mount, path))
	case errors.Is(err, unix.ENOENT):
		return makeAll(mount, path)
	}
	return err
}

// touch sets a directory's time to now, which is to ask the registry again.
func touch(path string) error {
	now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, now, 0)
}

// makeAll makes path below mount, in one call: the server then knows which image
// is meant, and asks for nothing on the way to it. Where it cannot know that, the
// directories on the way have to be made first.
func makeAll(mount, path string) error {
	err := unix.Mkdir(filepath.Join(mount, path), 0o755)
	if err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EEXIST) {
		return err
	}
	dir := mount
	for _, part := range strings.Split(path, "/") {
		dir = filepath.Join(dir, part)
		if err := unix.Mkdir(dir, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		return unix.ENOTDIR
	}
	return err
}
