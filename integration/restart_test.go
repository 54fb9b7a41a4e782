package integration

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// settled is how long a server must have answered to be killed without counting
// as one that crashes.
const settled = 1100 * time.Millisecond

// processes are the server and the supervisor, as the mount itself says.
func (m *mount) processes() (server, supervisor int) {
	m.t.Helper()
	var p struct{ PID, Supervisor int }
	data, err := os.ReadFile(m.path(".imgfs/stats.json"))
	if err == nil {
		err = json.Unmarshal(data, &p)
	}
	if err != nil {
		m.t.Fatalf("stats.json: %v", err)
	}
	return p.PID, p.Supervisor
}

// signal sends a signal to a process of the mount.
func (m *mount) signal(pid int, sig syscall.Signal) {
	m.t.Helper()
	if pid <= 1 {
		m.t.Fatalf("no process to signal: %d", pid)
	}
	if err := syscall.Kill(pid, sig); err != nil {
		m.t.Fatal(err)
	}
}

// answers waits until the mount does, which STATFS always asks the server.
func (m *mount) answers() time.Duration {
	m.t.Helper()
	start := time.Now()
	within(m.t, time.Minute, "statfs", func() error {
		var st unix.Statfs_t
		return unix.Statfs(m.dir, &st)
	})
	return time.Since(start)
}

// logged counts what the log says.
func (m *mount) logged(what string) int {
	m.t.Helper()
	data, err := os.ReadFile(m.logs)
	if err != nil {
		m.t.Fatal(err)
	}
	return bytes.Count(data, []byte(what))
}

// TestKilledUnderReaders kills the server again and again under all that a mount is
// used for: nobody sees a wrong byte or an error.
func TestKilledUnderReaders(t *testing.T) {
	kills := 20
	if long() {
		kills = 500
	}
	var outages []time.Duration
	u := useMount(t)
	for range kills {
		time.Sleep(settled + time.Duration(rand.IntN(200))*time.Millisecond)
		server, _ := u.m.processes()
		u.m.signal(server, syscall.SIGKILL)
		outages = append(outages, u.m.answers())
		if u.check(); t.Failed() {
			break
		}
	}
	u.stop()
	slices.Sort(outages)
	t.Logf("%d kills, from each to the first answer: median %v, longest %v; %d files read", len(outages),
		outages[len(outages)/2].Round(time.Millisecond), outages[len(outages)-1].Round(time.Millisecond), u.files.Load())
}

// TestRestartedUnderReaders is the same with imgfs restart, which waits for no
// server to settle.
func TestRestartedUnderReaders(t *testing.T) {
	u := useMount(t)
	for range 8 {
		before, _ := u.m.processes()
		start := time.Now()
		out := u.m.imgfs("restart", u.m.dir)
		took := time.Since(start)
		after, _ := u.m.processes()
		if want := fmt.Sprintf("%s: restarted, pid %d\n", u.m.dir, after); before == after || out != want {
			t.Errorf("imgfs restart: %q, from %d to %d, want %q and another process", out, before, after, want)
		}
		t.Logf("restarted in %v", took.Round(time.Millisecond))
		if u.check(); t.Failed() {
			break
		}
	}
	u.stop()
}

// use is a mount that is being used in many ways, all of which are checked.
type use struct {
	t     *testing.T
	m     *mount
	root  string // of the image
	want  *unpacked
	ended atomic.Bool
	wg    sync.WaitGroup
	files atomic.Int64

	big    string // a large file of the image
	open   *os.File
	mapped []byte
	bytes  []byte // of big
	shell  *exec.Cmd
	in     *bufio.Writer
	out    *bufio.Reader
	loop   *exec.Cmd // a program of the image, in it
	over   string    // an overlayfs over the image
}

func useMount(t *testing.T) *use {
	t.Helper()
	u := &use{t: t, want: oracle(t, "nginx")}
	r := startRegistry(t)
	path := r.push(t, "nginx", "gzip")
	u.m = startMount(t)
	u.root = u.m.path(path)
	t.Cleanup(u.stop)
	if _, err := os.ReadDir(u.root); err != nil {
		t.Fatal(err)
	}
	u.hold()
	u.mountOver()
	for i := range 16 {
		root := u.root
		if i%4 == 0 {
			root = u.over
		}
		u.wg.Go(func() { u.read(root, uint64(i)) })
	}
	u.wg.Go(u.find)
	return u
}

// hold opens and maps a file, and starts a shell and a program in the image.
func (u *use) hold() {
	t := u.t
	for name, n := range u.want.snap {
		if n.isFile() && (u.big == "" || n.stat.Size > u.want.snap[u.big].stat.Size) {
			u.big = name
		}
	}
	var err error
	if u.bytes, err = os.ReadFile(filepath.Join(u.want.root, u.big)); err != nil {
		t.Fatal(err)
	}
	if u.open, err = os.Open(filepath.Join(u.root, u.big)); err != nil {
		t.Fatal(err)
	}
	if u.mapped, err = unix.Mmap(int(u.open.Fd()), 0, len(u.bytes), unix.PROT_READ, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	u.shell = exec.Command("sh")
	u.shell.Dir = filepath.Join(u.root, "etc")
	in, err := u.shell.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := u.shell.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	u.in, u.out = bufio.NewWriter(in), bufio.NewReader(out)
	if err := u.shell.Start(); err != nil {
		t.Fatal(err)
	}
	u.loop = exec.Command("chroot", u.root, "/bin/sh", "-c", "while :; do ls -lR /etc || exit 7; sleep 0.05; done")
	u.loop.Stderr = t.Output()
	if err := u.loop.Start(); err != nil {
		t.Fatal(err)
	}
}

// mountOver mounts the kernel's overlayfs over the image.
func (u *use) mountOver() {
	top := u.t.TempDir()
	u.over = filepath.Join(top, "over")
	for _, dir := range []string{"over", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(top, dir), 0o755); err != nil {
			u.t.Fatal(err)
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", strings.ReplaceAll(u.root, ":", `\:`), top, top)
	if err := unix.Mount("overlay", u.over, "overlay", 0, options); err != nil {
		u.t.Fatal(err)
	}
}

// read compares files of a tree with the oracle, in an order of its own.
func (u *use) read(root string, seed uint64) {
	names := slices.Sorted(maps.Keys(u.want.sums))
	rng := rand.New(rand.NewPCG(seed, 1))
	buf := make([]byte, 1<<20)
	for !u.ended.Load() {
		name := names[rng.IntN(len(names))]
		sum, err := checksum(filepath.Join(root, name), buf)
		if err != nil {
			u.t.Errorf("a reader: %v", err)
			return
		}
		if sum != u.want.sums[name] {
			u.t.Errorf("a reader: %q has other bytes", name)
			return
		}
		u.files.Add(1)
	}
}

// find walks the whole image, again and again.
func (u *use) find() {
	for !u.ended.Load() {
		out, err := exec.Command("find", u.root, "-print0").CombinedOutput()
		if n := bytes.Count(out, []byte{0}); err != nil || n != len(u.want.snap) {
			u.t.Errorf("find: %v, %d names, want %d: %s", err, n, len(u.want.snap), out[max(0, len(out)-300):])
			return
		}
	}
}

// check uses what is held, after the kernel has forgotten what it can.
func (u *use) check() {
	t := u.t
	t.Helper()
	dropCaches(t)
	p := make([]byte, 1<<16)
	for range 10 {
		off := rand.Int64N(int64(len(u.bytes)))
		n, err := u.open.ReadAt(p, off)
		if n == 0 && err != nil || !bytes.Equal(p[:n], u.bytes[off:off+int64(n)]) {
			t.Errorf("an open file at %d: %d bytes, %v, or others", off, n, err)
		}
	}
	if !bytes.Equal(u.mapped, u.bytes) {
		t.Error("a mapped file has other bytes")
	}
	fmt.Fprintln(u.in, "pwd -P; cat os-release passwd | wc -c; cat ../usr/lib/os-release >/dev/null && echo end")
	if err := u.in.Flush(); err != nil {
		t.Errorf("a shell in the image: %v", err)
	}
	size := u.want.snap["etc/passwd"].stat.Size + u.want.snap["usr/lib/os-release"].stat.Size
	for _, want := range []string{filepath.Join(u.root, "etc"), fmt.Sprint(size), "end"} {
		line, err := u.out.ReadString('\n')
		if got := strings.TrimSpace(line); got != want {
			t.Errorf("a shell in the image says %q, %v, want %q", got, err, want)
		}
	}
	if err := syscall.Kill(u.loop.Process.Pid, 0); err != nil {
		t.Errorf("a program of the image has ended: %v", err)
	}
	added := filepath.Join(u.over, "etc/passwd")
	if f, err := os.OpenFile(added, os.O_APPEND|os.O_WRONLY, 0); err != nil {
		t.Errorf("copying up: %v", err)
	} else {
		f.Close()
	}
}

// stop ends all uses. A program that has ended by itself has failed.
func (u *use) stop() {
	if u.ended.Swap(true) {
		return
	}
	u.wg.Wait()
	if u.loop != nil {
		u.loop.Process.Kill()
		var exit *exec.ExitError
		if err := u.loop.Wait(); errors.As(err, &exit) && exit.Exited() {
			u.t.Errorf("a program of the image: %v", err)
		}
	}
	if u.shell != nil {
		u.shell.Process.Kill()
		u.shell.Wait()
	}
	if u.mapped != nil {
		unix.Munmap(u.mapped)
	}
	if u.open != nil {
		u.open.Close()
	}
	if u.over != "" {
		if err := unix.Unmount(u.over, 0); err != nil {
			u.t.Errorf("overlay: %v", err)
		}
	}
}

// TestKilledUnderOperations kills the server while workers work: no operation
// fails, is done twice or is lost.
func TestKilledUnderOperations(t *testing.T) {
	kills := 15
	if long() {
		kills = 200
	}
	s := startStock(t, chaosKinds)
	m := startFast(t, s.hub(t)...)
	work := loads(m, s, 8, false)
	reports := make([]report, len(work))
	var wg sync.WaitGroup
	workers := make([]*worker, len(work))
	for i := range work {
		work[i].For = time.Hour
		workers[i] = newWorker(work[i], nil)
		wg.Go(func() { reports[i] = workers[i].run() })
	}
	var outages []time.Duration
	for range kills {
		time.Sleep(settled + time.Duration(rand.IntN(200))*time.Millisecond)
		server, _ := m.processes()
		m.signal(server, syscall.SIGKILL)
		outages = append(outages, m.answers())
	}
	for _, w := range workers {
		w.ended.Store(true)
	}
	wg.Wait()
	counts := map[string]int{}
	want := map[string]int{}
	for i, r := range reports {
		for _, w := range r.Wrong {
			t.Errorf("worker %d: %s", i, w)
		}
		for op, n := range r.Counts {
			counts[op] += n
		}
		maps.Copy(want, r.Model)
		checkState(t, work[i], r)
	}
	slices.Sort(outages)
	t.Logf("operations that succeeded: %v; outages: median %v, longest %v; servers that could not die: %d", counts,
		outages[len(outages)/2].Round(time.Millisecond), outages[len(outages)-1].Round(time.Millisecond), m.logged("a thread of it waits"))
	if t.Failed() {
		return
	}
	m.checkModel(s, want)
	s.check(m)
	m.recount()
}

// crash has servers crash until the mount answers EIO.
func (m *mount) crash() {
	m.t.Helper()
	_, supervisor := m.processes()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		var st unix.Statfs_t
		if err := unix.Statfs(m.dir, &st); err == unix.EIO {
			return
		} else if err != nil {
			m.t.Fatalf("statfs while servers crash: %v", err)
		}
		for _, pid := range m.pids() {
			if pid != supervisor {
				_ = syscall.Kill(pid, syscall.SIGSEGV)
			}
		}
	}
	m.t.Fatal("servers crash, and the mount does not answer EIO")
}

// TestCrashLoop has one server crash after the other: the mount answers errors and
// does not hang, until imgfs restart revives it.
func TestCrashLoop(t *testing.T) {
	s := startStock(t, chaosKinds)
	m := startMount(t, s.hub(t)...)
	if err := os.MkdirAll(m.path("w/t1"), 0o755); err != nil {
		t.Fatal(err)
	}
	m.crash()
	within(t, 5*time.Second, "ls", func() error {
		_, err := os.ReadDir(m.dir)
		if errnoOf(err) != unix.EIO {
			return fmt.Errorf("%v, want EIO", err)
		}
		return nil
	})
	if out, err := runFor(m.command("status", "--mount", m.dir), 10*time.Second); err == nil || !strings.Contains(out, "imgfs restart") {
		t.Errorf("imgfs status: %v, %s, want a failure and what to do", err, out)
	}
	m.imgfs("restart", m.dir)
	if _, err := os.Stat(m.path("w/t1")); err != nil {
		t.Errorf("after imgfs restart: %v", err)
	}
	if !strings.Contains(m.imgfs("status", "--mount", m.dir), "Restarts:") {
		t.Error("imgfs status tells of no restarts")
	}
	// On probation one more crash is enough.
	server, _ := m.processes()
	m.signal(server, syscall.SIGSEGV)
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		var st unix.Statfs_t
		if unix.Statfs(m.dir, &st) == unix.EIO {
			break
		}
		if time.Now().After(end) {
			t.Fatal("a crash after many: no EIO")
		}
	}
	m.stop()
}

// TestUnmountInEveryState unmounts while the processes of the mount are in each of
// their states: no mount and no process is left.
func TestUnmountInEveryState(t *testing.T) {
	for _, state := range []struct {
		name string
		make func(m *mount)
	}{
		{"answering", func(*mount) {}},
		{"just killed", func(m *mount) { server, _ := m.processes(); m.signal(server, syscall.SIGKILL) }},
		{"restarted", func(m *mount) { m.imgfs("restart", m.dir) }},
		{"refusing", func(m *mount) { m.crash() }},
		{"hanging", func(m *mount) {
			server, _ := m.processes()
			m.signal(server, syscall.SIGSTOP)
			if out, err := runFor(m.command("umount", m.dir), time.Minute); err == nil || !strings.Contains(out, "imgfs restart") {
				m.t.Errorf("imgfs umount of a mount that hangs: %v, %s, want what to do", err, out)
			}
			m.imgfs("restart", m.dir)
		}},
		{"without supervisor", func(m *mount) { _, supervisor := m.processes(); m.signal(supervisor, syscall.SIGKILL) }},
		{"dead", func(m *mount) { m.kill() }},
	} {
		t.Run(state.name, func(t *testing.T) {
			m := startMount(t)
			state.make(m)
			m.stop()
			m.start() // the cache is free
			m.stop()
		})
	}
}

// TestKilledWhileUnproved has a registry give wrong bytes of a layer that is streamed,
// and kills the server before it can know: the next one proves the layer, and what
// the kernel has kept of the wrong bytes is seen by nobody any more.
func TestKilledWhileUnproved(t *testing.T) {
	r := startRegistry(t)
	m := startMount(t)
	first, last := noiseOf(1, 300<<10), noiseOf(2, 4<<20)
	archive := tarball(t, file("f", string(first)), file("rest", string(last)))
	layer := bytesBlob(types.OCILayer, gzipped(archive), archive)
	img, err := newImage(layer)
	if err != nil {
		t.Fatal(err)
	}
	pushImage(t, backend.start(t)+"/unproved:v1", img)
	lied := tarball(t, file("f", string(flip(first))), file("rest", string(last)))
	bad := gzipped(lied)
	stalled := make(chan struct{})
	r.broken.Store(&broken{path: "/blobs/" + layer.Hash.String(), fault: &fault{serve: func(w http.ResponseWriter, req *http.Request, _ http.Handler) {
		w.Header().Set("Content-Length", fmt.Sprint(layer.Length))
		w.Write(bad[:2<<20])
		http.NewResponseController(w).Flush()
		select {
		case <-stalled:
		case <-req.Context().Done():
		}
		panic(http.ErrAbortHandler)
	}}})
	root := m.path(r.host, "unproved/v1")
	f, err := os.Open(root + "/f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(first))
	if _, err := io.ReadFull(f, got); err != nil || !bytes.Equal(got, flip(first)) {
		t.Fatalf("before the layer is proved: %v; want the registry's wrong bytes, which nobody knows to be wrong", err)
	}
	server, _ := m.processes()
	m.signal(server, unix.SIGKILL)
	r.broken.Store(nil)
	close(stalled)
	m.answers()
	within(t, time.Minute, "the right bytes", func() error {
		for {
			if _, err := f.ReadAt(got, 0); err != nil {
				return err
			}
			if bytes.Equal(got, first) {
				return nil
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
	if got, err := os.ReadFile(root + "/f"); err != nil || !bytes.Equal(got, first) {
		t.Errorf("opened anew: %v, right bytes: %v", err, bytes.Equal(got, first))
	}
}
