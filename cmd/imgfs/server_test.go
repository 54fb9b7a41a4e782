package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/fs"
)

// TestMain is also the process that pull starts (startBring).
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "bring" {
		os.Exit(run(os.Args, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// serveDemo mounts a demo in this process, and ends it with the test.
func serveDemo(t *testing.T) *config {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil || os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" && err != nil {
			t.Fatal(err)
		}
		t.Skip("needs root and /dev/fuse")
	}
	c := &config{fsName: "imgfs"}
	c.keys() // defaults
	c.dir, c.cacheDir, c.demo, c.pull, c.logLevel = t.TempDir(), t.TempDir(), true, "never", "error"
	up, served := make(chan bool, 1), make(chan error, 1)
	go func() {
		served <- serve(c, &handover{}, t.Output(), func(verdict, []*os.File) error { up <- true; return nil })
	}()
	select {
	case <-up:
	case err := <-served:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(fs.Unmount(c.dir, 0), <-served); err != nil {
			t.Error(err)
		}
	})
	return c
}

// imgfs runs a command on the mount and returns what it printed.
func (c *config) imgfs(t *testing.T, args ...string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	args = append([]string{"imgfs", args[0], "--mount", c.dir}, args[1:]...)
	if status := run(args, &stdout, &stderr); status != exitOK {
		t.Fatalf("%s: status %d: %s", strings.Join(args, " "), status, &stderr)
	}
	return stdout.String()
}

// demoRepository is what the demo calls its image on this mount.
func (c *config) demoRepository(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(c.imgfs(t, "images", "--format", "{{.Repository}}"))
}

// TestDiffReadsNothing compares two images that were never read, and counts the
// kernel's messages by the socket, which costs none.
func TestDiffReadsNothing(t *testing.T) {
	c := serveDemo(t)
	repo := c.demoRepository(t)
	c.imgfs(t, "pull", "-q", repo+":base", repo+":latest")
	base, latest := filepath.Join(c.dir, repo, "base"), filepath.Join(c.dir, repo, "latest")

	before, err := askServer(c.dir)
	if err != nil {
		t.Fatal(err)
	}
	got, err := diffTrees(base, latest, "/")
	if err != nil {
		t.Fatal(err)
	}
	after, err := askServer(c.dir)
	if err != nil {
		t.Fatal(err)
	}
	want := []difference{
		{"C", "/etc"}, {"D", "/etc/hostname"}, {"C", "/etc/motd"},
		{"C", "/home"}, {"C", "/home/demo"}, {"A", "/home/demo/README"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("diffTrees(base, latest) (-want +got):\n%s", d)
	}
	if n := after.Stats.Fuse["READ"] - before.Stats.Fuse["READ"]; n != 0 {
		t.Errorf("diff made %d READ messages, want 0", n)
	}
	if n := after.Stats.Registry.Requests - before.Stats.Registry.Requests; n != 0 {
		t.Errorf("diff made %d requests to registries, want 0", n)
	}
	if after.Stats.Fuse["LOOKUP"] == before.Stats.Fuse["LOOKUP"] && after.Stats.Fuse["READDIRPLUS"] == before.Stats.Fuse["READDIRPLUS"] {
		t.Error("diff asked the server nothing: the counters do not count")
	}
}

// TestPullMovedTag moves a tag in the registry: pull brings what it names now.
func TestPullMovedTag(t *testing.T) {
	c := serveDemo(t)
	repo := c.demoRepository(t)
	if got := c.imgfs(t, "pull", repo+":base"); !strings.Contains(got, "Status: Downloaded newer image for "+repo+":base\n") {
		t.Errorf("first pull prints %q", got)
	}
	old := digestOf(c.dir, image{path: repo + "/base"})
	if got := c.imgfs(t, "pull", repo+":base"); !strings.Contains(got, "Status: Image is up to date for "+repo+":base\n") {
		t.Errorf("second pull prints %q", got)
	}

	latest, err := name.ParseReference(repo+":latest", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(latest)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Tag(latest.Context().Tag("base"), img); err != nil {
		t.Fatal(err)
	}
	got := c.imgfs(t, "pull", repo+":base")
	now := digestOf(c.dir, image{path: repo + "/base"})
	if old == now || now != digestOf(c.dir, image{path: repo + "/latest"}) {
		t.Errorf("base is %s after its tag moved, was %s", now, old)
	}
	for _, line := range []string{"Digest: " + now, "Status: Downloaded newer image for " + repo + ":base"} {
		if !strings.Contains(got, line+"\n") {
			t.Errorf("pull of a moved tag prints %q, without %q", got, line)
		}
	}
	if got := c.imgfs(t, "images", "-q", "--filter", "dangling=true"); strings.Count(got, "\n") != 1 {
		t.Errorf("dangling images: %q, want the old one", got)
	}
}

// TestSocketReplaced starts servers where one was killed, and where something
// that is no socket is in the way.
func TestSocketReplaced(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 40)) // longer than a socket's path may be
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, socketName)
	for range 2 { // the second finds the first one's
		listener, err := listenSocket(dir)
		if err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil || st.Mode != unix.S_IFSOCK|0o600 {
			t.Errorf("socket: mode %o, %v, want %o", st.Mode, err, unix.S_IFSOCK|0o600)
		}
		listener.Close()
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("beside the socket there is %v, %v", entries, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := listenSocket(dir); err == nil {
		l.Close()
		t.Error("a file in the socket's place was replaced")
	}
	if text, err := os.ReadFile(path); string(text) != "mine" {
		t.Errorf("the file holds %q, %v", text, err)
	}
}

// TestEventsAfterTheirHalf follows a file whose older half is dropped.
func TestEventsAfterTheirHalf(t *testing.T) {
	file := filepath.Join(t.TempDir(), "events")
	var out bytes.Buffer
	print, err := linePrinter[event]("{{.Name}}", nil)
	if err != nil {
		t.Fatal(err)
	}
	w := eventWatch{file: file, out: &out, print: print}
	line := func(name string) string {
		return `{"time":"` + time.Now().UTC().Format(time.RFC3339) + `","op":"pull","name":"` + name + "\"}\n"
	}
	a, b, c, d := line("a"), line("b"), line("c"), line("d")
	for i, text := range []string{a + b, a + b, a + b + c[:10], a + b + c, b + c, c + d} {
		changed := time.Unix(int64(i), 0) // as the server does, at each change
		if err := errors.Join(os.WriteFile(file, []byte(text), 0o600), os.Chtimes(file, changed, changed)); err != nil {
			t.Fatal(err)
		}
		if err := w.look(); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := out.String(), "a\nb\nc\nd\n"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
}
