package integration

import (
	"bytes"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"golang.org/x/sys/unix"
)

// startSmall starts a registry in this process, behind a proxy, for images that a
// test makes itself.
func startSmall(t testing.TB) *registry {
	t.Helper()
	server := httptest.NewServer(ggcr.New(ggcr.Logger(quiet)))
	t.Cleanup(server.Close)
	return startProxy(t, strings.TrimPrefix(server.URL, "http://"))
}

// pushTar pushes an image of gzip layers of the given entries.
func (r *registry) pushTar(t testing.TB, path string, layers ...[]entry) {
	t.Helper()
	var blobs []blob
	for _, entries := range layers {
		archive := tarball(t, entries...)
		blobs = append(blobs, bytesBlob(mediaGzip, gzipped(archive), archive))
	}
	r.pushBlobs(t, path, blobs...)
}

func (r *registry) pushBlobs(t testing.TB, path string, blobs ...blob) {
	t.Helper()
	img, err := newImage(blobs...)
	if err != nil {
		t.Fatal(err)
	}
	pushImage(t, tagSpelling(r.host+"/"+path), img)
}

// TestSharedMapping lets root write into a shared mapping of a file that all
// images share: the server refuses the WRITE, and soon nobody sees what was written.
func TestSharedMapping(t *testing.T) {
	r := startSmall(t)
	want := bytes.Repeat([]byte("what the layer holds\n"), 5000)
	r.pushTar(t, "small/v1", []entry{file("data", string(want), mode(0o666))})
	m := startMount(t)
	path := m.path(r.host, "small/v1/data")
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("reading %s: %v, %d bytes", path, err, len(got))
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Logf("root cannot even open the file for writing: %v", err)
		return
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("overwritten"), 0); err == nil {
		t.Error("a write into a file of an image succeeds, want EROFS")
	} else {
		t.Logf("write: %v", err)
	}
	mapped, err := unix.Mmap(int(f.Fd()), 0, len(want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Logf("root cannot map the file for writing: %v", err)
	} else {
		// No msync, no munmap: the server has to notice by itself.
		copy(mapped[8192:], "written through the mapping")
		defer unix.Munmap(mapped)
	}
	deadline := time.Now().Add(2 * time.Second)
	for {
		got := program(t, "cat", path)
		if got == string(want) {
			break
		}
		if time.Now().After(deadline) {
			i := 0
			for i < len(got) && got[i] == want[i] {
				i++
			}
			t.Fatalf("two seconds after the write, another reader sees %d bytes that differ from byte %d on", len(got), i)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := os.Truncate(path, 0); err == nil {
		t.Error("truncate of a file of an image succeeds, want EROFS")
	}
	if got := program(t, "cat", path); got != string(want) {
		t.Error("after a truncate that was refused another reader sees other bytes")
	}
}

// TestOtherUsers shows an image to another user on an --allow-other mount: files
// can be read by their modes, and none can be opened for writing.
func TestOtherUsers(t *testing.T) {
	r := startSmall(t)
	r.pushTar(t, "small/v1", []entry{
		file("writable", "w", mode(0o666)), file("own", "o", mode(0o600), owner(65534, 65534)), file("secret", "s", mode(0o600)),
	})
	m := startMount(t, "--allow-other")
	root := m.path(r.host, "small/v1")
	if _, err := os.ReadDir(root); err != nil { // root pulls; others reach what is here
		t.Fatal(err)
	}
	nobody := func(script string) (string, error) {
		cmd := exec.Command("sh", "-c", script)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		return runFor(cmd, 20*time.Second)
	}
	for _, name := range []string{"writable", "own"} {
		if out, err := nobody(fmt.Sprintf("exec cat '%s/%s'", root, name)); err != nil || out != name[:1] {
			t.Errorf("another user reads %q from %s (%v), want %q", out, name, err, name[:1])
		}
		if out, err := nobody(fmt.Sprintf("exec 3<>'%s/%s'", root, name)); err == nil {
			t.Errorf("another user can open %s for writing %s", name, out)
		}
	}
	if out, err := nobody(fmt.Sprintf("exec cat '%s/secret'", root)); err == nil {
		t.Errorf("another user reads %q from a file of mode 0600", out)
	}
	// What is not here is not there for others, and no registry hears of it.
	r.pushTar(t, "small/v2", []entry{file("new", "n")})
	before := m.stats().Registry.Requests
	for _, path := range []string{m.path(r.host, "small/v2"), m.path(r.host, "other/v1"), m.path("registry.invalid/a/b"), m.path(r.host, "small:v2")} {
		if out, err := nobody(fmt.Sprintf("exec ls '%s/'", path)); err == nil || !strings.Contains(out, "No such file") {
			t.Errorf("another user walks to %s: %v %s", path, err, out)
		}
	}
	if out, err := nobody(fmt.Sprintf("exec mkdir '%s'", m.path(r.host, "small/v2"))); err == nil {
		t.Errorf("another user can pull by mkdir: %s", out)
	}
	if n := m.stats().Registry.Requests - before; n != 0 {
		t.Errorf("another user had the server make %d requests", n)
	}
	all := startMount(t, "--allow-other", "--pull-by-others")
	if out, err := nobody(fmt.Sprintf("exec cat '%s/new'", all.path(r.host, "small/v2"))); err != nil || out != "n" {
		t.Errorf("with --pull-by-others another user reads %q (%v)", out, err)
	}
	plain := startMount(t)
	if out, err := nobody(fmt.Sprintf("exec ls '%s'", plain.dir)); err == nil {
		t.Errorf("another user can list a mount without --allow-other: %s", out)
	}
}
