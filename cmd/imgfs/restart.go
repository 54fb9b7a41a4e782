package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// restartTime is how long another server may take to answer.
const restartTime = 60 * time.Second

func newRestart() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "restart [flags] [DIR]",
		Short: "Replace the server of a mount, under those who use it",
		Long: `Replace the server of the mount on DIR by another, of the imgfs that is installed
now, and return when that answers. The mount stays: open files, working
directories, mappings and the mounts above it go on, and what is asked meanwhile
waits for some milliseconds. Flags of the mount stay too; imgfs.toml is read again,
but for what the kernel was told when it mounted (allow-other, dev, suid, modes).

It also revives a mount whose servers crash one after the other.`,
		Example: `  imgfs restart
  imgfs restart /mnt/images`,
		Args: takes(0, 1, "DIR"),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return mountpoints(), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				if err := cmd.Flags().Set("mount", args[0]); err != nil {
					return err
				}
			}
			dir, err := theMount(cmd)
			if err != nil {
				return err
			}
			now, err := restart(cmd.Context(), dir)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: restarted, pid %d\n", dir, now.PID)
			return nil
		},
	}
	mountFlag(cmd)
	return cmd
}

// mountpoints are where imgfs is mounted, for completion.
func mountpoints() []cobra.Completion {
	var dirs []cobra.Completion
	if mounts, err := allMounts(); err == nil {
		for _, m := range mounts {
			dirs = append(dirs, m.Mountpoint)
		}
	}
	return dirs
}

// restart has the mount on dir served by another process, and tells which.
func restart(ctx context.Context, dir string) (processes, error) {
	at, err := mountAt(dir)
	if err != nil {
		return processes{}, err
	}
	if at == nil {
		return processes{}, fmt.Errorf("%q: imgfs is not mounted there", dir)
	}
	before, asked := processesOf(dir)
	if asked == nil {
		asked = askRestart(ctx, dir)
	}
	if errors.Is(asked, errAlone) {
		return processes{}, fmt.Errorf("%q: %w: 'imgfs umount %s', then mount it again", dir, asked, dir)
	}
	if asked != nil {
		supervisor := before.Supervisor
		if supervisor == 0 {
			supervisor, _ = supervisorOf(at)
		}
		if supervisor == 0 {
			return processes{}, fmt.Errorf("%q: %w; and no supervisor of it is seen from here: 'imgfs umount %s', then mount it again", dir, asked, dir)
		}
		if err := signalHolder(at, supervisor, unix.SIGUSR1); err != nil {
			return processes{}, fmt.Errorf("%q: its supervisor (pid %d): %w; 'imgfs umount %s', then mount it again", dir, supervisor, err, dir)
		}
	}
	for end := time.Now().Add(restartTime); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if now, err := processesOf(dir); err == nil && now.PID != before.PID {
			return now, nil
		}
	}
	return processes{}, fmt.Errorf("%q: no other server answers within %v; see its log", dir, restartTime)
}

// signalHolder sends a signal to a process, if that is one which has the mount's
// /dev/fuse open: the number is what the mount says, and may be of another PID
// namespace, or a lie.
func signalHolder(at *mountinfo.Info, pid int, sig unix.Signal) error {
	if pid <= 1 {
		return unix.ESRCH
	}
	fd, err := unix.PidfdOpen(pid, 0) // from here on it is this process, whatever becomes of the number
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if holders, sure := holdersOf(at); !holders[pid] && (sure || len(holders) > 0 || !hasDevice(pid)) {
		return errors.New("no process of this mount")
	}
	return unix.PidfdSendSignal(fd, sig, nil, 0)
}

// hasDevice reports whether a process has /dev/fuse open, of whichever mount: older
// kernels do not tell of which.
func hasDevice(pid int) bool {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	return err == nil && slices.ContainsFunc(fds, func(fd string) bool {
		target, err := os.Readlink(fd)
		return err == nil && target == "/dev/fuse"
	})
}

// askRestart asks the server itself.
func askRestart(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	answer, err := ask(ctx, dir, http.MethodPost, "/restart")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	switch answer.StatusCode {
	case http.StatusAccepted:
		return nil
	case http.StatusConflict:
		return errAlone
	}
	return fmt.Errorf("its server says %s", answer.Status) // an older one
}

// errAlone reports a server that nobody would replace.
var errAlone = errors.New("its supervisor has died")

// processes are those of a mount, as .imgfs/stats.json has them. 0: none.
type processes struct {
	PID        int `json:"pid"`
	Supervisor int `json:"supervisor"`
}

// errSilent reports that a mount did not answer in time.
var errSilent = fmt.Errorf("no answer within %v", askTimeout)

// processesOf asks the mount on dir for its processes.
func processesOf(dir string) (processes, error) {
	type answer struct {
		p   processes
		err error
	}
	answers := make(chan answer, 1)
	// Left behind if the server hangs: this process ends soon, and the read with it.
	go func() {
		var a answer
		text, err := os.ReadFile(filepath.Join(dir, control, "stats.json"))
		if err == nil {
			err = json.Unmarshal(text, &a.p)
		}
		a.err = cause(err)
		answers <- a
	}()
	select {
	case a := <-answers:
		return a.p, a.err
	case <-time.After(askTimeout):
		return processes{}, errSilent
	}
}

// supervisorOf finds the process that keeps the mount, when the mount cannot say:
// of those that have its /dev/fuse open, the one that no other has started. sure
// is false where processes cannot be seen: of other users, in a container, on a
// kernel that does not tell whose connection a descriptor is.
func supervisorOf(at *mountinfo.Info) (pid int, sure bool) {
	holders, sure := holdersOf(at)
	for pid := range holders {
		if !holders[parentPID(pid)] {
			return pid, sure
		}
	}
	return 0, sure
}
