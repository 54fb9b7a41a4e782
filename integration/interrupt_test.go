package integration

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestPullInterrupted interrupts a pull whose registry says nothing: the command
// ends while the pull goes on, though a process that waits in the mount cannot.
func TestPullInterrupted(t *testing.T) {
	needFUSE(t)
	work := t.TempDir()
	dir := filepath.Join(work, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	registry, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mount := exec.Command(binary(t), "mount", "--cache-dir", filepath.Join(work, "cache"), dir)
	if out, err := mount.CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		registry.Close() // who waits for it is answered, by a refusal
		// Busy as long as somebody waits in it; the server has ended when it succeeds.
		out, err := exec.Command(binary(t), "umount", dir).CombinedOutput()
		for deadline := time.Now().Add(patience); err != nil && time.Now().Before(deadline); {
			time.Sleep(20 * time.Millisecond)
			out, err = exec.Command(binary(t), "umount", dir).CombinedOutput()
		}
		if err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	pull := exec.Command(binary(t), "pull", "--mount", dir, registry.Addr().String()+"/silent:1")
	var stderr bytes.Buffer
	pull.Stderr = &stderr
	if err := pull.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := registry.Accept() // the pull is under way
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := pull.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- pull.Wait() }()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the command has not ended, and the registry has not answered")
	}
	if got := pull.ProcessState.ExitCode(); got != 1 || !strings.Contains(stderr.String(), "interrupted; the pull goes on") {
		t.Errorf("exit status %d, stderr %q, want 1 and that it was interrupted", got, &stderr)
	}
}
