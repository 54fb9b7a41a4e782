package integration

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A walk is a program that reads a tree.
type walk struct {
	name string
	argv func(root string) []string
	zero []string // opcodes that must not occur from the third run on
}

// warmWork are the three walks whose FUSE messages are counted.
var warmWork = []walk{
	{"find", func(root string) []string { return []string{"find", root} }, silent},
	{"ls -lR", func(root string) []string { return []string{"ls", "-lR", root} }, nil},
	{"tar c", func(root string) []string { return []string{"tar", "-C", root, "-c", "."} }, silent},
}

var silent = []string{"LOOKUP", "GETATTR", "OPEN", "OPENDIR", "READ", "READDIR", "READDIRPLUS", "FLUSH", "RELEASE", "RELEASEDIR"}

const (
	warmRuns     = 4
	maxGetxattrs = 20  // of one ls -lR
	maxReads     = 100 // of the server in a silent walk: reading the counters makes some
)

// TestWarm counts the FUSE messages of walks over a tree that is warm, and prints
// their times beside those of the kernel's overlayfs over the same tree. The
// counts are asserted, the times are not.
func TestWarm(t *testing.T) {
	// The image has no layer with an ACL: where one has, ls must ask for each file.
	r := startRegistry(t)
	m := startMount(t)
	root := m.path(r.push(t, "nginx", "estargz"))
	for _, w := range warmWork {
		// What the kernel drops for other programs' sake is asked for again; a
		// server that is asked for ever fails each time.
		var faults []string
		for attempt := range 3 {
			if faults = warmRun(t, m, w, root); len(faults) == 0 {
				break
			}
			t.Logf("attempt %d: %s", attempt+1, strings.Join(faults, "; "))
		}
		for _, f := range faults {
			t.Error(f)
		}
	}
	over := overlay(t, "nginx")
	for _, w := range warmWork {
		least := inTurns(t, w.argv(root), w.argv(over))
		t.Logf("%-7s warm: %v, kernel overlayfs %v, ratio %.2f", w.name, least[0], least[1], float64(least[0])/float64(least[1]))
	}
}

// warmRun walks a tree several times, prints the messages, and returns what is
// more than promised.
func warmRun(t *testing.T, m *mount, w walk, root string) (faults []string) {
	t.Helper()
	for run := 1; run <= warmRuns; run++ {
		before := m.reads()
		n := m.messages(func() { swallow(t, w.argv(root)[0], w.argv(root)[1:]...) })
		reads := m.reads() - before
		t.Logf("%-7s run %d: %s(%d reads by the server)", w.name, run, opcodes(n), reads)
		if run >= 3 && w.zero != nil && reads > maxReads {
			faults = append(faults, fmt.Sprintf("%s, run %d: the server makes %d read calls: the kernel asks something that no counter shows", w.name, run, reads))
		}
		for _, op := range w.zero {
			if run >= 3 && n[op] != 0 {
				faults = append(faults, fmt.Sprintf("%s, run %d: %d %s, want none", w.name, run, n[op], op))
			}
		}
		if w.name == "ls -lR" && n["GETXATTR"] >= maxGetxattrs {
			faults = append(faults, fmt.Sprintf("%s, run %d: %d GETXATTR, want fewer than %d", w.name, run, n["GETXATTR"], maxGetxattrs))
		}
	}
	return faults
}

func opcodes(n map[string]int64) string {
	var b strings.Builder
	for _, op := range slices.Sorted(maps.Keys(n)) {
		fmt.Fprintf(&b, "%s %d ", op, n[op])
	}
	if b.Len() == 0 {
		return "no message "
	}
	return b.String()
}

// inTurns runs two commands alternately and returns the least time of each.
func inTurns(t testing.TB, a, b []string) (least [2]time.Duration) {
	t.Helper()
	for range 7 {
		for i, argv := range [][]string{a, b} {
			start := time.Now()
			swallow(t, argv[0], argv[1:]...)
			if d := time.Since(start); least[i] == 0 || d < least[i] {
				least[i] = d
			}
		}
	}
	return least
}

// overlay unpacks the layers of an image, each into a directory, and mounts them
// with the kernel's overlayfs, read-only.
func overlay(t testing.TB, image string) string {
	t.Helper()
	top, err := os.MkdirTemp(scratch.dir, "overlay-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	var lowers []string
	for i, l := range images[image] {
		lower := filepath.Join(top, fmt.Sprint(i))
		if err := os.Mkdir(lower, 0o755); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("tar", "-C", lower, "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", openCorpus(t).tar(t, l)).CombinedOutput()
		if err != nil {
			t.Fatalf("tar: %v\n%s", err, out)
		}
		if err := overlayWhiteouts(lower); err != nil {
			t.Fatal(err)
		}
		lowers = append([]string{lower}, lowers...)
	}
	dir := filepath.Join(top, "merged")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("overlay", dir, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lowers, ":")); err != nil {
		t.Fatalf("overlayfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	return dir
}

// overlayWhiteouts turns the whiteouts of archives into those of overlayfs.
func overlayWhiteouts(root string) error {
	return filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, ok := strings.CutPrefix(d.Name(), ".wh.")
		if !ok {
			return nil
		}
		if err := os.Remove(p); err != nil {
			return err
		}
		if name == ".wh..opq" {
			return unix.Setxattr(filepath.Dir(p), "trusted.overlay.opaque", []byte("y"), 0)
		}
		return unix.Mknod(filepath.Join(filepath.Dir(p), name), unix.S_IFCHR, 0)
	})
}

// TestMemory walks two images of 100,000 files each.
func TestMemory(t *testing.T) {
	if raceServer() {
		t.Skip("a server built with -race takes more")
	}
	const first, more = 60 << 20, 15 << 20
	for _, format := range []string{"estargz", "gzip"} {
		t.Run(format, func(t *testing.T) {
			r := startRegistry(t)
			m := startMount(t)
			var sizes []int64
			for _, image := range []string{"many", "many2"} {
				root := m.path(r.push(t, image, format))
				if n := strings.Count(program(t, "find", root, "-type", "f"), "\n"); n != manyFiles {
					t.Errorf("find: %d files, want %d", n, manyFiles)
				}
				sizes = append(sizes, m.rss())
			}
			t.Logf("RSS %.1f MB after one image of %d files, %.1f MB after two", float64(sizes[0])/1e6, manyFiles, float64(sizes[1])/1e6)
			if sizes[0] >= first {
				t.Errorf("RSS %d bytes after find over %d files, want under %d", sizes[0], manyFiles, first)
			}
			if sizes[1]-sizes[0] > more {
				t.Errorf("RSS grows by %d bytes with a second such image, want at most %d", sizes[1]-sizes[0], more)
			}
		})
	}
}
