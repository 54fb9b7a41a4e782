package integration

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// warmTree is one file system that holds the benchmark's tree.
type warmTree struct {
	name string
	root string // of a Debian with python
	big  string // a file of 200 MB
}

// warmBench is something that is done with a tree.
type warmBench struct {
	name string
	cold bool // the kernel's caches are dropped first
	work func(t *testing.T, w warmTree)
}

var warmBenches = []warmBench{
	{"find", false, func(t *testing.T, w warmTree) { swallow(t, "find", w.root) }},
	{"ls -lR", false, func(t *testing.T, w warmTree) { swallow(t, "ls", "-lR", w.root) }},
	{"du -s", false, func(t *testing.T, w warmTree) { swallow(t, "du", "-s", w.root) }},
	{"tar c", false, func(t *testing.T, w warmTree) { swallow(t, "tar", "-C", w.root, "-c", ".") }},
	{"grep -r", false, func(t *testing.T, w warmTree) {
		// The pattern is nowhere; grep says so by its exit status.
		swallow(t, "sh", "-c", "grep -rF 'no file has this in it' \"$1\" || true", "sh", w.root)
	}},
	{"python start ×20", false, func(t *testing.T, w warmTree) {
		for range 20 {
			swallow(t, "chroot", w.root, "python3", "-c", "import json, ssl")
		}
	}},
	{"200 MB sequential, page cache", false, func(t *testing.T, w warmTree) { readSequential(t, w.big) }},
	{"random 4 KiB ×50,000, page cache", false, func(t *testing.T, w warmTree) { readRandom(t, w.big) }},
	{"200 MB sequential, disk", true, func(t *testing.T, w warmTree) { readSequential(t, w.big) }},
	{"tar c, disk", true, func(t *testing.T, w warmTree) { swallow(t, "tar", "-C", w.root, "-c", ".") }},
}

// TestBenchWarm compares what costs no network with the kernel's file systems.
func TestBenchWarm(t *testing.T) {
	dir := bench(t)
	trees := warmTrees(t)
	out := table{title: "Warm, beside the kernel's file systems", head: []string{""}}
	for _, w := range trees {
		out.head = append(out.head, w.name)
	}
	runs := benchRuns(t) + 4
	out.text = fmt.Sprintf("The tree is a Debian with python, read whole before; medians of %d, in turns. In brackets the ratio to the kernel's overlayfs. "+
		"\"Disk\": the kernel's caches were dropped, the contents are on this machine.", runs)
	for _, b := range warmBenches {
		times := make([][]sample, len(trees))
		for run := range runs + 1 {
			for i, w := range trees {
				if b.cold {
					dropCaches(t)
				}
				start := time.Now()
				b.work(t, w)
				if run > 0 { // the first one warms
					times[i] = append(times[i], sample{time: time.Since(start)})
				}
			}
		}
		row := []string{b.name}
		base := median(times[slices.IndexFunc(trees, func(w warmTree) bool { return w.name == "overlayfs" })]).time
		for i := range trees {
			m := median(times[i]).time
			row = append(row, fmt.Sprintf("%s (%.2f)", seconds(m), float64(m)/float64(base)))
		}
		t.Log(strings.Join(row, " | "))
		out.add(row...)
	}
	out.save(t, dir, "warm")
}

// warmTrees makes the same trees available through each file system.
func warmTrees(t *testing.T) []warmTree {
	t.Helper()
	r := startRegistry(t)
	m := startMount(t)
	ours := warmTree{"imgfs", m.path(r.push(t, benchPrefix+"python", "estargz")), m.path(r.push(t, "big", "estargz")) + "/srv/big.bin"}
	swallow(t, "tar", "-C", ours.root, "-c", ".")
	readSequential(t, ours.big)

	over := warmTree{"overlayfs", overlay(t, benchPrefix+"python"), overlay(t, "big") + "/srv/big.bin"}
	top, err := os.MkdirTemp(scratch.dir, "warm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	plain := warmTree{"the disk's", filepath.Join(top, "tree"), filepath.Join(top, "big.bin")}
	mustRun(t, "cp", "-a", over.root, plain.root)
	mustRun(t, "cp", over.big, plain.big)
	trees := []warmTree{ours, over, plain}
	if have("mkfs.erofs") {
		if e, ok := mountErofs(t, top, plain); ok {
			trees = append(trees, e)
		}
	}
	return trees
}

// mountErofs makes a file system image of the tree; ok is false on a kernel that
// does not know erofs.
func mountErofs(t *testing.T, top string, from warmTree) (w warmTree, ok bool) {
	t.Helper()
	img, dir := filepath.Join(top, "erofs"), filepath.Join(top, "erofs-mnt")
	both := filepath.Join(top, "both")
	for _, d := range []string{dir, both} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mustRun(t, "cp", "-al", from.root, filepath.Join(both, "tree"))
	mustRun(t, "cp", "-l", from.big, both)
	mustRun(t, "mkfs.erofs", img, both)
	if out, err := runFor(exec.Command("mount", "-t", "erofs", "-o", "loop,ro", img, dir), time.Minute); err != nil {
		t.Logf("no erofs: %v: %s", err, out)
		return w, false
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return warmTree{"erofs", filepath.Join(dir, "tree"), filepath.Join(dir, "big.bin")}, true
}

func readSequential(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for {
		if _, err := f.Read(buf); err == io.EOF {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// readRandom reads at the same places each time.
func readRandom(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 4096)
	r := rand.New(rand.NewPCG(1, 2))
	for range 50_000 {
		if _, err := f.ReadAt(buf, r.Int64N(bigSize/4096)*4096); err != nil {
			t.Fatal(err)
		}
	}
}
