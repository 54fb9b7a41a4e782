package integration

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// TestScripts runs the command line as its users do, by the scripts in
// testdata/script. A script has its own cache ($WORK/cache, by a configuration
// file), its own mount point ($WORK/mnt, which IMGFS_MOUNT names), and these
// commands besides testscript's:
//
//	exits STATUS COMMAND…   runs it, and wants that exit status
//	capture NAME            sets a variable to the last output
//	mounted DIR             waits until imgfs is mounted there; with !, until it is not
//	eventually COMMAND…     runs it until it succeeds
func TestScripts(t *testing.T) {
	bin := scriptBinary(t)
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "script"),
		RequireExplicitExec: true,
		Setup:               func(env *testscript.Env) error { return setupScript(env, bin) },
		Condition:           fuseCondition,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":      exitsCommand,
			"capture":    captureCommand,
			"mounted":    mountedCommand,
			"eventually": eventuallyCommand,
		},
	})
}

// fuseCondition is testscript's [fuse].
func fuseCondition(cond string) (bool, error) {
	if cond != "fuse" {
		return false, fmt.Errorf("unknown condition %q", cond)
	}
	_, err := os.Stat("/dev/fuse")
	// In continuous integration a machine without FUSE fails the scripts.
	return err == nil || inCI(), nil
}

// scriptBinary makes a directory with the binary under both of its names.
func scriptBinary(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"imgfs", "mount.fuse.imgfs"} {
		if err := os.Symlink(binary(t), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func setupScript(env *testscript.Env, bin string) error {
	work := env.WorkDir
	env.Setenv("PATH", bin+string(os.PathListSeparator)+env.Getenv("PATH"))
	env.Setenv("GOARCH", runtime.GOARCH)
	env.Setenv("HOME", filepath.Join(work, "home"))
	env.Setenv("XDG_CONFIG_HOME", filepath.Join(work, "config"))
	env.Setenv("IMGFS_MOUNT", filepath.Join(work, "mnt"))
	for _, dir := range []string{"home", "config/imgfs", "mnt"} {
		if err := os.MkdirAll(filepath.Join(work, dir), 0o755); err != nil {
			return err
		}
	}
	config := "cache-dir = " + strconv.Quote(filepath.Join(work, "cache")) + "\n"
	if err := os.WriteFile(filepath.Join(work, "config/imgfs/imgfs.toml"), []byte(config), 0o600); err != nil {
		return err
	}
	// Whatever the script left mounted goes, so that its directory can.
	env.Defer(func() {
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(work))
		if err != nil {
			return
		}
		for _, m := range slices.Backward(mounts) {
			_ = unix.Unmount(m.Mountpoint, unix.MNT_DETACH)
		}
	})
	return nil
}

func exitsCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits STATUS COMMAND…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("%s: exit status %d, want %d", strings.Join(args[1:], " "), got, want)
	}
}

func captureCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: capture NAME")
	}
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
}

// patience is how long a script waits for something to become true.
const patience = 30 * time.Second

func until(ts *testscript.TestScript, what string, done func() bool) {
	for deadline := time.Now().Add(patience); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			ts.Fatalf("not within %v: %s", patience, what)
		}
	}
}

func mountedCommand(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: [!] mounted DIR")
	}
	dir := ts.MkAbs(args[0])
	until(ts, "mounted "+dir, func() bool {
		mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
		ts.Check(err)
		return (len(mounts) > 0 && mounts[0].FSType == "fuse.imgfs") != neg
	})
}

func eventuallyCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: eventually COMMAND…")
	}
	until(ts, strings.Join(args, " "), func() bool { return ts.Exec(args[0], args[1:]...) == nil })
}

// TestForegroundNotifies plays systemd: a service of Type=notify is ready when
// its mount answers, and stops on SIGTERM.
func TestForegroundNotifies(t *testing.T) {
	needFUSE(t)
	work := t.TempDir()
	dir := filepath.Join(work, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(work, "notify")})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	server := exec.Command(binary(t), "mount", "-f", "--cache-dir", filepath.Join(work, "cache"), dir)
	server.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(work, "notify"))
	var log strings.Builder
	server.Stderr = &log
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // when the test failed
	if err := socket.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 256)
	n, err := socket.Read(buf)
	if got := string(buf[:n]); err != nil || got != "READY=1" {
		t.Errorf("systemd is told %q, %v, want READY=1", got, err)
	}
	if _, err := os.Stat(filepath.Join(dir, ".imgfs/stats.json")); err != nil {
		t.Errorf("ready, but the mount does not answer: %v", err)
	}
	if err := server.Process.Signal(unix.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := server.Wait(); err != nil {
		t.Errorf("mount -f: %v\n%s", err, &log)
	}
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
	if err != nil || len(mounts) != 0 {
		t.Errorf("after SIGTERM: %v, %v, want no mount", mounts, err)
	}
}
