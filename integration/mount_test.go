package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A mount is an imgfs mount with its own cache directory.
type mount struct {
	t      testing.TB
	dir    string // the mount point
	cache  string
	logs   string
	flags  []string
	marker string // in the environment of its processes
}

// startMount mounts with an empty cache; it is unmounted when the test ends.
func startMount(t testing.TB, flags ...string) *mount {
	t.Helper()
	needFUSE(t)
	binary(t)
	top, err := os.MkdirTemp(scratch.dir, "mount-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(top, 0o755); err != nil {
		t.Fatal(err)
	}
	return startMountAt(t, top, flags...)
}

// startMountAt mounts like startMount, with everything of it below top.
func startMountAt(t testing.TB, top string, flags ...string) *mount {
	t.Helper()
	m := &mount{t: t, dir: filepath.Join(top, "mnt"), cache: filepath.Join(top, "cache"), logs: filepath.Join(top, "log"), flags: flags}
	m.marker = "IMGFS_TEST_MARK=" + filepath.Base(top)
	for _, d := range []string{m.dir, m.cache, filepath.Join(top, "home")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { m.cleanup(top) })
	m.start()
	return m
}

// command is a run of the binary that no configuration of this machine touches.
func (m *mount) command(args ...string) *exec.Cmd {
	cmd := exec.Command(binary(m.t), args...)
	home := filepath.Join(filepath.Dir(m.dir), "home")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "XDG_CONFIG_HOME=" + home, "XDG_CACHE_HOME=" + home, "DOCKER_CONFIG=" + home,
		"TMPDIR=" + os.TempDir(), "GORACE=log_path=" + filepath.Join(home, "race"), m.marker}
	return cmd
}

func (m *mount) start() {
	m.t.Helper()
	args := append([]string{"mount", "--cache-dir", m.cache, "--log-file", m.logs}, m.flags...)
	if out, err := runFor(m.command(append(args, m.dir)...), time.Minute); err != nil {
		m.t.Fatalf("imgfs mount: %v\n%s%s", err, out, m.tail())
	}
	if !m.mounted() {
		m.t.Fatalf("imgfs mount has returned, and nothing is mounted at %s", m.dir)
	}
}

func (m *mount) stop() {
	m.t.Helper()
	if out, err := runFor(m.command("umount", m.dir), time.Minute); err != nil {
		m.t.Fatalf("imgfs umount: %v\n%s%s", err, out, m.tail())
	}
	if m.mounted() {
		m.t.Fatalf("imgfs umount has returned, and %s is still mounted", m.dir)
	}
	for range 100 {
		if len(m.pids()) == 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	m.t.Errorf("five seconds after imgfs umount there are processes %v", m.pids())
}

// restart unmounts and mounts again with the same cache.
func (m *mount) restart() {
	m.t.Helper()
	m.stop()
	m.start()
}

// cleanup leaves neither a mount nor a process, whatever the test has done.
func (m *mount) cleanup(top string) {
	if m.t.Failed() {
		m.t.Logf("%s", m.tail())
	}
	if m.mounted() {
		if out, err := runFor(m.command("umount", m.dir), 20*time.Second); err != nil {
			m.t.Errorf("imgfs umount: %v\n%s", err, out)
		}
	}
	for m.mounted() {
		if err := unix.Unmount(m.dir, unix.MNT_DETACH); err != nil {
			m.t.Error(err)
			break
		}
	}
	for _, pid := range m.pids() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	reports, _ := filepath.Glob(filepath.Join(top, "home/race.*"))
	for _, r := range reports {
		text, _ := os.ReadFile(r)
		m.t.Errorf("the server has a data race:\n%s", text)
	}
	if err := os.RemoveAll(top); err != nil {
		m.t.Error(err)
	}
}

func (m *mount) mounted() bool {
	data, err := os.ReadFile("/proc/self/mounts")
	return err == nil && strings.Contains(string(data), " "+m.dir+" fuse")
}

// options are the mount's options as the kernel lists them.
func (m *mount) options() []string {
	data, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 3 && f[1] == m.dir {
			return strings.Split(f[3], ",")
		}
	}
	return nil
}

// pids are the processes of this mount.
func (m *mount) pids() []int {
	var pids []int
	exes, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, exe := range exes {
		if target, err := os.Readlink(exe); err != nil || target != binary(m.t) {
			continue
		}
		env, err := os.ReadFile(filepath.Join(filepath.Dir(exe), "environ"))
		if err != nil || !slices.Contains(strings.Split(string(env), "\x00"), m.marker) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(exe))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// rss is the resident memory, in bytes, of the largest of the mount's processes.
func (m *mount) rss() (size int64) {
	m.t.Helper()
	for _, pid := range m.pids() {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
				if err != nil {
					m.t.Fatal(err)
				}
				size = max(size, kb<<10)
			}
		}
	}
	if size == 0 {
		m.t.Fatal("no process of the mount found")
	}
	return size
}

// reads counts the read calls of the mount's processes since they started, as the
// kernel does: each FUSE message takes one, whether a counter of ours shows it or not.
func (m *mount) reads() (n int64) {
	m.t.Helper()
	for _, pid := range m.pids() {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
		if err != nil {
			m.t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			if rest, ok := strings.CutPrefix(line, "syscr:"); ok {
				calls, err := strconv.ParseInt(strings.TrimSpace(rest), 10, 64)
				if err != nil {
					m.t.Fatal(err)
				}
				n += calls
			}
		}
	}
	return n
}

// counters are what .imgfs/stats.json tells.
type counters struct {
	FUSE      map[string]int64
	Registry  struct{ Requests, Bytes int64 }
	Catalogue struct{ Reads int64 }
}

func (m *mount) stats() (c counters) {
	m.t.Helper()
	data, err := os.ReadFile(filepath.Join(m.dir, ".imgfs/stats.json"))
	if err != nil {
		m.t.Fatal(err)
	}
	if err := json.Unmarshal(data, &c); err != nil {
		m.t.Fatalf("stats.json: %v\n%s", err, data)
	}
	if c.FUSE == nil {
		m.t.Fatalf("stats.json has no counters of FUSE messages:\n%s", data)
	}
	return c
}

// errors is what .imgfs/errors says.
func (m *mount) errors() string {
	m.t.Helper()
	data, err := os.ReadFile(filepath.Join(m.dir, ".imgfs/errors"))
	if err != nil {
		m.t.Fatal(err)
	}
	return string(data)
}

// messages counts the FUSE messages that work makes, by opcode. The server is asked
// through its socket, which makes none.
func (m *mount) messages(work func()) map[string]int64 {
	m.t.Helper()
	before := m.counts()
	work()
	n := m.counts()
	for op := range n {
		if n[op] -= before[op]; n[op] == 0 {
			delete(n, op)
		}
	}
	return n
}

// counts are the FUSE messages so far, by opcode.
func (m *mount) counts() map[string]int64 {
	m.t.Helper()
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(m.cache, "imgfs.sock"))
		}}}
	answer, err := client.Get("http://imgfs/status")
	if err != nil {
		m.t.Fatal(err)
	}
	defer answer.Body.Close()
	var status struct{ Stats counters }
	if err := json.NewDecoder(answer.Body).Decode(&status); err != nil || status.Stats.FUSE == nil {
		m.t.Fatalf("status has no counters of FUSE messages: %v", err)
	}
	return status.Stats.FUSE
}

// quiet waits until the kernel reads nothing any more.
func (m *mount) quiet() {
	m.t.Helper()
	for range 100 {
		if m.messages(func() { time.Sleep(50 * time.Millisecond) })["READ"] == 0 {
			return
		}
	}
	m.t.Fatal("the kernel goes on reading")
}

// tail is the end of the server's log.
func (m *mount) tail() string {
	data, err := os.ReadFile(m.logs)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("log:\n%s", data[max(0, len(data)-1500):])
}

// path is a path below the mount.
func (m *mount) path(parts ...string) string {
	return filepath.Join(append([]string{m.dir}, parts...)...)
}

// runFor runs a command that must end within a time. What it starts in the
// background may keep its output open.
func runFor(cmd *exec.Cmd, limit time.Duration) (string, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = 2 * time.Second
	if err := cmd.Start(); err != nil {
		return "", err
	}
	timer := time.AfterFunc(limit, func() { cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Wait()
	if err != nil && !timer.Stop() {
		err = fmt.Errorf("killed after %v: %w", limit, err)
	}
	return out.String(), err
}

// program runs a program that must succeed within two minutes, and returns its output.
func program(t testing.TB, name string, args ...string) string {
	t.Helper()
	need(t, name)
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := runFor(cmd, 2*time.Minute)
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return out
}

// swallow runs a program like program, and counts its output: tar must not see
// /dev/null, for which it reads nothing.
func swallow(t testing.TB, name string, args ...string) (n int64) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(5*time.Minute, func() { cmd.Process.Kill() })
	defer timer.Stop()
	n, _ = io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, stderr.Bytes())
	}
	return n
}

// within fails the test when work takes longer: a read that hangs must not hang
// the run.
func within(t testing.TB, limit time.Duration, what string, work func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		defer close(done) // also when work ends by t.Fatal
		if err := work(); err != nil {
			done <- err
		}
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if t.Failed() {
			t.FailNow()
		}
	case <-time.After(limit):
		t.Fatalf("%s: no answer after %v", what, limit)
	}
}
