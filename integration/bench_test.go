package integration

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The benchmarks compare imgfs with other ways to the same end, in turns in one
// run. They print tables and assert no time. `make bench` runs them; a table of
// each is kept in $IMGFS_BENCH, and docs/benchmarks.md is made of those.
const benchVariable = "IMGFS_BENCH"

// bench skips a test unless benchmarks are run, and returns where its table goes.
func bench(t *testing.T) (dir string) {
	t.Helper()
	dir = os.Getenv(benchVariable)
	if dir == "" {
		t.Skip("benchmarks run with make bench")
	}
	needFUSE(t)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// benchRuns is how often each side runs; medians are told.
func benchRuns(t *testing.T) int {
	return benchNumber(t, "IMGFS_BENCH_RUNS", 3)
}

func benchNumber(t *testing.T, variable string, otherwise int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s is %q, not a number", variable, text)
	}
	return n
}

// benchChosen reports whether a name is among those that the variable lists, or
// the variable does not say.
func benchChosen(variable, name string) bool {
	text := os.Getenv(variable)
	return text == "" || slices.Contains(strings.Split(text, ","), name)
}

// sample is what one run of a side took.
type sample struct {
	time     time.Duration
	bytes    int64 // of bodies from the registry
	requests int   // of the registry
}

// median is the sample with the median time. list is not empty.
func median(list []sample) sample {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b sample) int { return cmp.Compare(a.time, b.time) })
	return list[len(list)/2]
}

func (s sample) String() string {
	text := seconds(s.time)
	if s.requests > 0 {
		text += fmt.Sprintf(", %.1f MB, %d", float64(s.bytes)/1e6, s.requests)
	}
	return text
}

// seconds are three figures of a time.
func seconds(d time.Duration) string {
	switch s := d.Seconds(); {
	case s >= 100:
		return fmt.Sprintf("%.0f s", s)
	case s >= 10:
		return fmt.Sprintf("%.1f s", s)
	case s >= 1:
		return fmt.Sprintf("%.2f s", s)
	}
	return fmt.Sprintf("%.3g ms", d.Seconds()*1e3)
}

// timed runs work once.
func timed(work func()) sample {
	start := time.Now()
	work()
	return sample{time: time.Since(start)}
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// table is a table of a page.
type table struct {
	title, text string
	head        []string
	rows        [][]string
	after       string // what follows it
}

func (b *table) add(cells ...string) { b.rows = append(b.rows, cells) }

func (b *table) String() string {
	var out strings.Builder
	fmt.Fprintf(&out, "## %s\n\n", b.title)
	if b.text != "" {
		fmt.Fprintf(&out, "%s\n\n", b.text)
	}
	fmt.Fprintf(&out, "| %s |\n|%s\n", strings.Join(b.head, " | "), strings.Repeat(" --- |", len(b.head)))
	for _, r := range b.rows {
		fmt.Fprintf(&out, "| %s |\n", strings.Join(r, " | "))
	}
	if b.after != "" {
		fmt.Fprintf(&out, "\n%s\n", b.after)
	}
	return out.String()
}

// save prints the table and keeps it.
func (b *table) save(t *testing.T, dir, name string) {
	t.Helper()
	t.Logf("\n%s", b)
	if err := os.WriteFile(filepath.Join(dir, name+".md"), []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// machine says what the figures come from.
func machine() string {
	var u unix.Utsname
	unix.Uname(&u)
	model := "an unknown processor"
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	memory := 0
	if data, err := os.ReadFile("/proc/meminfo"); err == nil {
		fmt.Sscanf(string(data), "MemTotal: %d kB", &memory)
	}
	return fmt.Sprintf("%d processors (%s), %.0f GB of memory, Linux %s, %s, %s", runtime.NumCPU(), model, float64(memory)/1e6,
		unix.ByteSliceToString(u.Release[:]), runtime.Version(), time.Now().Format("January 2006"))
}

// mustRun runs a program of a benchmark, which must succeed.
func mustRun(t testing.TB, argv ...string) string {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	out, err := runFor(cmd, 10*time.Minute)
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return out
}

// buildCrane builds crane, once per run, of the module that this one requires.
var buildCrane = sync.OnceValues(func() (string, error) {
	path := filepath.Join(scratch.dir, "crane")
	cmd := exec.Command("go", "build", "-o", path, "github.com/google/go-containerregistry/cmd/crane")
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

func craneBinary(t testing.TB) string {
	t.Helper()
	path, err := buildCrane()
	if err != nil {
		t.Fatal(err)
	}
	return path
}
