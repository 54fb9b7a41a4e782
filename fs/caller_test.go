package fs

import (
	"io"
	"os/exec"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// A caller who is on a processor still, or has been driven from it, is about to wait:
// its call is known then.
func TestCallOfRunning(t *testing.T) {
	cmd := exec.Command("sh", "-c", "echo; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; read x")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if got := callOf(uint32(cmd.Process.Pid)); len(got) < 2 || got[0] != strconv.Itoa(unix.SYS_READ) {
		t.Errorf("callOf = %q, want a read", got)
	}
	if got := callOf(1 << 30); got != nil {
		t.Errorf("callOf of no thread = %q", got)
	}
}

func TestPasses(t *testing.T) {
	for _, c := range []struct {
		mkdir, path string
		want        bool
	}{
		{"/mnt/images/bitnami/redis/7.2", "bitnami", true},
		{"/mnt/images/bitnami/redis/7.2", "bitnami/redis", true},
		{"/mnt/images/bitnami/redis/7.2", "bitnami/redis/7.2", false},
		{"/mnt/images/bitnami/redis/7.2/", "bitnami/redis/7.2", false},
		{"redis/7.2", "bitnami/redis", true},
		{"./redis//7.2", "bitnami/redis/7.2", false},
		{"7.2", "bitnami/redis/7.2", false},
		{"/m/h/a/a/v1", "h/a", true},
		{"/m/h/a/a/v1", "h/a/a", true},
		{"/m/h/a/a/v1", "h/a/a/v1", false},
		{"/m/docker.io/library/redis/7", "redis", true},
		{"/m/docker.io/library/redis/7", "redis/7", false},
		{"../x/y", "x", true},
		{"../x/y", "a/x/y", false},
		{"a/../../x/y", "x/y", false},
		{"..", "x", false}, // not known
		{"x/..", "x", false},
		{"", "x", false}, // not known
	} {
		if got := (change{call: callMkdir, paths: []string{c.mkdir}}).passes(c.path); got != c.want {
			t.Errorf("passes(mkdir %q, %q) = %v, want %v", c.mkdir, c.path, got, c.want)
		}
	}
}

// A rename walks to two places, and neither is a step to the other.
func TestPassesRename(t *testing.T) {
	for _, c := range []struct {
		from, to, path string
		want           bool
	}{
		{"/m/ubuntu/18.04", "/m/new/v1", "new", true},
		{"/m/ubuntu/18.04", "/m/new/v1", "new/v1", false},
		{"/m/ubuntu/18.04", "/m/new/v1", "ubuntu/18.04", false},
		{"/m/ubuntu/18.04", "/m/new/v1", "ubuntu", true},
		{"18.04", "../new/v1", "new", true},
		{"18.04", "../new/v1", "new/v1", false},
		{"18.04", "", "new", false}, // not known
	} {
		if got := (change{call: callRename, paths: []string{c.from, c.to}}).passes(c.path); got != c.want {
			t.Errorf("passes(rename %q %q, %q) = %v, want %v", c.from, c.to, c.path, got, c.want)
		}
	}
}
