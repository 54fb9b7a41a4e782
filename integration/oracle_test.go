package integration

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// unpacked is what umoci unpacks of an image of the corpus: the tree that the
// mount must equal. Made once per run.
type unpacked struct {
	root string
	snap snapshot
	sums map[string][32]byte
}

var oracles struct {
	mu     sync.Mutex
	byName map[string]*unpacked
}

func oracle(t testing.TB, image string) *unpacked {
	t.Helper()
	need(t, "umoci")
	c := openCorpus(t)
	oracles.mu.Lock()
	defer oracles.mu.Unlock()
	if o := oracles.byName[image]; o != nil {
		return o
	}
	img := c.image(t, image, "gzip")
	layoutDir := filepath.Join(scratch.dir, "layout-"+image)
	if err := writeLayout(layoutDir, img); err != nil {
		t.Fatal(err)
	}
	o := &unpacked{root: filepath.Join(scratch.dir, "umoci-"+image)}
	start := time.Now()
	cmd := exec.Command("umoci", "raw", "unpack", "--image", layoutDir+":image", o.root)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("umoci: %v\n%s", err, out)
	}
	if err := os.RemoveAll(layoutDir); err != nil {
		t.Fatal(err)
	}
	var err error
	if o.snap, err = takeSnapshot(o.root, nil); err != nil {
		t.Fatal(err)
	}
	if o.sums, err = checksums(o.root, o.snap); err != nil {
		t.Fatal(err)
	}
	t.Logf("umoci unpacked %s: %d names, %v", image, len(o.snap), time.Since(start).Round(time.Millisecond))
	if oracles.byName == nil {
		oracles.byName = map[string]*unpacked{}
	}
	oracles.byName[image] = o
	return o
}

// checksums reads every regular file of a snapshot.
func checksums(root string, s snapshot) (map[string][32]byte, error) {
	sums := map[string][32]byte{}
	buf := make([]byte, 1<<20)
	for name, n := range s {
		if !n.isFile() {
			continue
		}
		sum, err := checksum(filepath.Join(root, name), buf)
		if err != nil {
			return nil, err
		}
		sums[name] = sum
	}
	return sums, nil
}

func checksum(path string, buf []byte) (sum [32]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{f}, buf); err != nil {
		return sum, &fs.PathError{Op: "read", Path: path, Err: err}
	}
	return [32]byte(h.Sum(nil)), nil
}

// A comparison says in what a mount may differ from the unpacked tree.
type comparison struct {
	wholeSeconds bool                   // times may be rounded to the second: the format's table has no more
	mtimeFree    map[string]bool        // names whose time nothing decides: see implicitDirs
	only         func(name string) bool // compare these names alone; nil: all
	known        func(diff string) bool // differences that are the oracle's fault, each documented where it is used
}

// compare lists the differences between the tree at root and the oracle's.
func (o *unpacked) compare(root string, c comparison) ([]string, error) {
	snap, err := takeSnapshot(root, nil)
	if err != nil {
		return nil, err
	}
	sums, err := checksums(root, snap)
	if err != nil {
		return nil, err
	}
	var diffs []string
	add := func(name, what string, got, want any) {
		d := fmt.Sprintf("%q: %s = %v, want %v", name, what, got, want)
		if c.known == nil || !c.known(d) {
			diffs = append(diffs, d)
		}
	}
	names := maps.Clone(o.snap)
	maps.Copy(names, snap)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if c.only != nil && !c.only(name) {
			continue
		}
		want, here := o.snap[name]
		got, there := snap[name]
		if !here || !there {
			add(name, "exists", there, here)
			continue
		}
		compareInode(name, got, want, c, add)
		if sums[name] != o.sums[name] {
			add(name, "content", fmt.Sprintf("sha256 %x", sums[name]), fmt.Sprintf("sha256 %x", o.sums[name]))
		}
	}
	got, want := hardlinks(snap), hardlinks(o.snap)
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if g := got[name]; g != want[name] && (c.only == nil || c.only(name)) {
			add(name, "linked with", g, want[name])
		}
	}
	return diffs, nil
}

func compareInode(name string, got, want inode, c comparison, add func(name, what string, got, want any)) {
	g, w := got.stat, want.stat
	if g.Mode != w.Mode {
		add(name, "mode", fmt.Sprintf("%o", g.Mode), fmt.Sprintf("%o", w.Mode))
	}
	if g.Uid != w.Uid || g.Gid != w.Gid {
		add(name, "owner", fmt.Sprintf("%d:%d", g.Uid, g.Gid), fmt.Sprintf("%d:%d", w.Uid, w.Gid))
	}
	if !got.isDir() && g.Size != w.Size {
		add(name, "size", g.Size, w.Size)
	}
	if got.special() && g.Rdev != w.Rdev {
		add(name, "device", fmt.Sprintf("%x", g.Rdev), fmt.Sprintf("%x", w.Rdev))
	}
	if got.target != want.target {
		add(name, "target", got.target, want.target)
	}
	if !sameXattrs(got.xattrs, want.xattrs) {
		add(name, "xattrs", fmt.Sprintf("%q", got.xattrs), fmt.Sprintf("%q", want.xattrs))
	}
	if c.mtimeFree[name] || g.Mtim == w.Mtim {
		return
	}
	if off := got.mtime() - want.mtime(); c.wholeSeconds && g.Mtim.Nsec == 0 && -5e8 <= off && off <= 5e8 {
		return
	}
	add(name, "mtime", stamp(g.Mtim), stamp(w.Mtim))
}

func stamp(t unix.Timespec) string { return fmt.Sprintf("%d.%09d", t.Sec, t.Nsec) }

// sameXattrs compares all but the host's own labels, and user.empty: an empty PAX
// record means none to Go's archive/tar, and so to umoci and to the tools that
// make tables of contents; GNU tar sets the empty attribute. Both are right.
func sameXattrs(a, b map[string]string) bool {
	clean := func(m map[string]string) map[string]string {
		out := map[string]string{}
		for k, v := range m {
			if k != "security.selinux" && k != "security.ima" && (k != "user.empty" || v != "") {
				out[k] = v
			}
		}
		return out
	}
	return maps.Equal(clean(a), clean(b))
}

// hardlinks names for each file the first name of the same inode in the tree.
func hardlinks(s snapshot) map[string]string {
	first := map[uint64]string{}
	groups := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(s)) {
		n := s[name]
		if n.isDir() {
			continue
		}
		if _, ok := first[n.stat.Ino]; !ok {
			first[n.stat.Ino] = name
		}
		groups[name] = first[n.stat.Ino]
	}
	return groups
}

// reportDiffs fails the test with the first few differences.
func reportDiffs(t testing.TB, diffs []string) {
	t.Helper()
	const most = 25
	if len(diffs) > 0 {
		t.Errorf("%d differences from what umoci unpacks:\n%s", len(diffs), strings.Join(diffs[:min(most, len(diffs))], "\n"))
	}
}
