package integration

import (
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
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A workload is what a worker does: random operations on the tags of some
// repositories, below a mount of a stock. Alone it knows what each must do.
type workload struct {
	Mount, Stock string
	Repos        []string // below the mount
	Tags, Kinds  int
	Seed         uint64
	Shared       bool // others work on the same names
	For          time.Duration
	Start        map[string]int // what is there, by path below the mount: image
}

// A worker does the operations and keeps a model of what they make.
type worker struct {
	workload
	rng    *rand.Rand
	model  map[string]int
	ended  atomic.Bool  // it is to stop
	killed *atomic.Bool // the server may be gone: an operation then ends as it likes
	report report
}

// A report is what a worker tells at its end.
type report struct {
	Model  map[string]int           // what is there; of shared names nobody knows it
	After  map[string]int           // or this, when the last operation was cut off
	Last   string                   // that operation
	Counts map[string]int           // operations that succeeded
	Slow   map[string]time.Duration // the longest of each
	Wrong  []string
}

func newWorker(l workload, killed *atomic.Bool) *worker {
	w := &worker{workload: l, rng: rand.New(rand.NewPCG(l.Seed, 1)), model: maps.Clone(l.Start), killed: killed}
	if w.model == nil {
		w.model = map[string]int{}
	}
	w.report.Counts, w.report.Slow = map[string]int{}, map[string]time.Duration{}
	return w
}

// run works until the time is up or something is wrong.
func (w *worker) run() report {
	for end := time.Now().Add(w.For); time.Now().Before(end) && len(w.report.Wrong) == 0 && !w.ended.Load(); {
		if !w.step() {
			return w.report
		}
	}
	w.report.Model = w.model
	return w.report
}

// name is a random tag of a random repository; often one that is there.
func (w *worker) name() string {
	if w.rng.IntN(2) == 0 && len(w.model) > 0 {
		return slices.Sorted(maps.Keys(w.model))[w.rng.IntN(len(w.model))]
	}
	return w.Repos[w.rng.IntN(len(w.Repos))] + "/t" + strconv.Itoa(w.rng.IntN(w.Tags))
}

// An operation is one system call, what it must answer, and what is there after.
type operation struct {
	kind, text string
	call       func() error
	want       unix.Errno
	effect     func(model map[string]int)
}

// step does one operation; it is false when the server has gone.
func (w *worker) step() bool {
	o, err := w.choose()
	if err != nil {
		w.wrong("%v", err)
		return true
	}
	after := maps.Clone(w.model)
	if o.want == 0 && o.effect != nil {
		o.effect(after)
	}
	start := time.Now()
	err = o.call()
	got := errnoOf(err)
	w.report.Slow[o.kind] = max(w.report.Slow[o.kind], time.Since(start))
	switch {
	case w.Shared:
		if !slices.Contains([]unix.Errno{0, unix.ENOENT, unix.EEXIST, unix.ESTALE}, got) {
			w.wrong("%s: %v", o.text, err)
		}
		if got == 0 {
			w.report.Counts[o.kind]++
		}
		return true
	case got == o.want:
		if got == 0 {
			w.report.Counts[o.kind]++
		}
		w.model = after
		return true
	case w.killed != nil && w.killed.Load():
		w.report.Model, w.report.After, w.report.Last = w.model, after, fmt.Sprintf("%s: %v", o.text, got)
		return false
	}
	w.wrong("%s: %v, want %v", o.text, err, o.want)
	return true
}

func (w *worker) wrong(format string, args ...any) {
	w.report.Wrong = append(w.report.Wrong, fmt.Sprintf(format, args...))
}

// choose makes up the next operation.
func (w *worker) choose() (operation, error) {
	a, b := w.name(), w.name()
	pa, pb := filepath.Join(w.Mount, a), filepath.Join(w.Mount, b)
	_, hereA := w.model[a]
	_, hereB := w.model[b]
	missing := func(o operation) operation {
		if !hereA {
			o.want = unix.ENOENT
		}
		return o
	}
	move := func(m map[string]int) {
		if a != b {
			m[b] = m[a]
			delete(m, a)
		}
	}
	switch w.rng.IntN(9) {
	case 0, 1:
		k, err := w.reset(a)
		o := operation{"mkdir", "mkdir " + a, func() error { return os.Mkdir(pa, 0o755) }, 0, func(m map[string]int) { m[a] = k }}
		if hereA {
			o.want = unix.EEXIST
		}
		return o, err
	case 2:
		return missing(operation{"rmdir", "rmdir " + a, func() error { return unix.Rmdir(pa) }, 0, func(m map[string]int) { delete(m, a) }}), nil
	case 3:
		o := operation{"symlink", "ln -s " + a + " " + b, func() error { return os.Symlink(a, pb) }, 0, func(m map[string]int) { m[b] = m[a] }}
		if o = missing(o); hereB {
			o.want = unix.EEXIST
		}
		return o, nil
	case 4:
		return missing(operation{"rename", "mv -T " + a + " " + b, func() error { return rename2(pa, pb, 0) }, 0, move}), nil
	case 5:
		o := missing(operation{"noreplace", "mv -n " + a + " " + b, func() error { return rename2(pa, pb, unix.RENAME_NOREPLACE) }, 0, move})
		if hereA && hereB {
			o.want = unix.EEXIST
		}
		return o, nil
	case 6:
		o := missing(operation{"exchange", "exchange " + a + " " + b, func() error { return rename2(pa, pb, unix.RENAME_EXCHANGE) }, 0,
			func(m map[string]int) { m[a], m[b] = m[b], m[a] }})
		if !hereB {
			o.want = unix.ENOENT
		}
		return o, nil
	case 7:
		if !hereA && !w.Shared {
			break // a walk that would pull
		}
		k, err := w.reset(a)
		return operation{"touch", "touch " + a, func() error { return touch(pa) }, 0, func(m map[string]int) { m[a] = k }}, err
	}
	if !hereA && !w.Shared {
		return operation{kind: "ls", text: "ls", call: w.list}, nil
	}
	return operation{kind: "read", text: "read " + a, call: func() error {
		k, err := readKind(pa)
		if err == nil && !w.Shared && k != w.model[a] {
			return fmt.Errorf("shows image %d, want %d", k, w.model[a])
		}
		if errors.Is(err, errMixed) {
			w.wrong("%s: %v", a, err)
		}
		return err
	}}, nil
}

// reset decides anew which image the registry has under a name.
func (w *worker) reset(name string) (int, error) {
	k := w.rng.IntN(w.Kinds)
	i := strings.LastIndexByte(name, '/')
	repo := name[:i]
	if host, rest, ok := strings.Cut(repo, "/"); ok && strings.ContainsAny(host, ".:") {
		repo = rest
	}
	resp, err := http.Get(fmt.Sprintf("http://%s/set/%s:%s?image=%d", w.Stock, repo, name[i+1:], k))
	if err != nil {
		return 0, err
	}
	io.Copy(io.Discard, resp.Body)
	return k, resp.Body.Close()
}

// list compares the worker's repositories with its model.
func (w *worker) list() error {
	got, err := w.state()
	if err == nil && !maps.Equal(got, w.model) {
		return fmt.Errorf("there is %v, want %v", got, w.model)
	}
	return err
}

// state is what is there of the worker's repositories.
func (w *worker) state() (map[string]int, error) {
	state := map[string]int{}
	for _, repo := range w.Repos {
		entries, err := os.ReadDir(filepath.Join(w.Mount, repo))
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, err
		}
		for _, e := range entries {
			k, err := readKind(filepath.Join(w.Mount, repo, e.Name()))
			if err != nil {
				return nil, err
			}
			state[repo+"/"+e.Name()] = k
		}
	}
	return state, nil
}

var errMixed = errors.New("files of several images in one")

// readKind reads all of an image of a stock, and says which it is.
func readKind(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	var parts [3]int
	for i, name := range []string{"me", "low", "mid"} {
		f, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return 0, &os.PathError{Op: "open", Path: dir + "/" + name, Err: err}
		}
		buf := make([]byte, 4096)
		n, err := unix.Read(f, buf)
		unix.Close(f)
		if err != nil {
			return 0, &os.PathError{Op: "read", Path: dir + "/" + name, Err: err}
		}
		if parts[i], err = strconv.Atoi(strings.TrimRight(string(buf[:n]), "m")); err != nil {
			return 0, fmt.Errorf("%w: %s/%s: %v", errMixed, dir, name, err)
		}
	}
	if k := parts[0]; parts[1] != k%stockLow || parts[2] != k%stockMid {
		return 0, fmt.Errorf("%w: %s: me %d, low %d, mid %d", errMixed, dir, k, parts[1], parts[2])
	}
	return parts[0], nil
}

// workerVariable has the workload of a process that is one worker.
const workerVariable = "IMGFS_TEST_WORKER"

// workerMain is the test binary as one worker.
func workerMain(load string) int {
	var l workload
	if err := json.Unmarshal([]byte(load), &l); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := json.NewEncoder(os.Stdout).Encode(newWorker(l, nil).run()); err != nil {
		return 1
	}
	return 0
}

// inProcess runs a workload in a process of its own.
func inProcess(t testing.TB, l workload) (r report, err error) {
	load, err := json.Marshal(l)
	if err != nil {
		return r, err
	}
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), workerVariable+"="+string(load), "GOMAXPROCS=1")
	out, err := runFor(cmd, l.For+2*time.Minute)
	if err != nil {
		return r, fmt.Errorf("worker: %w\n%s", err, out)
	}
	return r, json.Unmarshal([]byte(out), &r)
}
