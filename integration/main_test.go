// Package integration drives the built binary: it mounts images from real
// registries, uses them by system calls and by programs, and compares them with
// what another tool unpacks. It imports no room of the module.
//
// The images are made by the tests themselves, once per machine (corpus_test.go),
// in a cache directory: $IMGFS_TEST_CACHE, else imgfs-test in the user's cache
// directory. $IMGFS_TEST_BINARY names a built imgfs to test; else one is built.
package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

func TestMain(m *testing.M) {
	if load := os.Getenv(workerVariable); load != "" {
		os.Exit(workerMain(load))
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	tmp, err := os.MkdirTemp("", "imgfs-integration-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	scratch.dir = tmp
	defer os.RemoveAll(tmp)
	// Tests of other users must be able to reach what is in it.
	if err := os.Chmod(tmp, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer backend.stop()
	defer func() {
		for _, f := range exits {
			f()
		}
	}()
	return m.Run()
}

// exits are run at the end.
var exits []func()

// atExit has f run when all tests have ended.
func atExit(f func()) { exits = append(exits, f) }

// scratch is the directory of this run, removed at its end.
var scratch struct{ dir string }

// inCI reports whether what this machine lacks is a failure.
func inCI() bool { return os.Getenv("CI") == "true" }

// lacking skips a test, or fails it in continuous integration.
func lacking(t testing.TB, format string, args ...any) {
	t.Helper()
	if inCI() {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// need skips a test on a machine that lacks one of the programs (make deps installs them).
func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			lacking(t, "%v (make deps)", err)
		}
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("makes images of hundreds of megabytes")
	}
	if os.Getuid() != 0 {
		lacking(t, "needs root, to unpack owners and devices and to mount")
	}
}

func needFUSE(t testing.TB) {
	t.Helper()
	needRoot(t)
	if _, err := os.Stat("/dev/fuse"); err != nil {
		lacking(t, "no FUSE: %v", err)
	}
}

// buildBinary builds imgfs once per run.
var buildBinary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("IMGFS_TEST_BINARY"); path != "" {
		return filepath.Abs(path)
	}
	path := filepath.Join(scratch.dir, "imgfs")
	args := []string{"build", "-o", path}
	if raceServer() {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, "./cmd/imgfs")...)
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// raceServer reports whether the server under test is built with -race.
func raceServer() bool { return os.Getenv("IMGFS_TEST_RACE") != "" }

func binary(t testing.TB) string {
	t.Helper()
	path, err := buildBinary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}
