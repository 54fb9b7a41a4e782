package integration

import (
	"archive/tar"
	"io"
	"os"
	"path"
	"strings"
	"testing"
)

// implicitDirs are the directories of an image that no layer has an entry for.
// Nothing decides their times (tar and umoci show when they unpacked; the mount
// shows its layer's earliest time), and they are 0755 and root's.
func implicitDirs(t testing.TB, image string) map[string]bool {
	t.Helper()
	explicit, implicit := map[string]bool{}, map[string]bool{".": true}
	tree := oracle(t, image).snap
	for _, l := range images[image] {
		for _, h := range headers(t, openCorpus(t).tar(t, l)) {
			name := path.Clean(strings.TrimPrefix(h.Name, "/"))
			if h.Typeflag == tar.TypeDir {
				explicit[name] = true
			}
			for p := path.Dir(name); p != "."; p = path.Dir(p) {
				implicit[p] = tree[p].isDir()
			}
		}
	}
	for name := range explicit {
		delete(implicit, name)
	}
	return implicit
}

func headers(t testing.TB, archive string) []tar.Header {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var list []tar.Header
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return list
		} else if err != nil {
			t.Fatal(err)
		}
		list = append(list, *h)
	}
}

// TestOracle checks the oracle: that umoci unpacks every name that the layers
// have, that a tree compared with itself has no differences, and that a change
// is seen.
func TestOracle(t *testing.T) {
	o := oracle(t, "python")
	diffs, err := o.compare(o.root, comparison{})
	if err != nil {
		t.Fatal(err)
	}
	reportDiffs(t, diffs)
	for name, want := range map[string]bool{
		"odd/change/removed": false, "odd/change/removed-dir": false, "odd/change/opaque/hidden": false, "odd/change/opaque/new": true,
		"odd/change/target-dir/through": true, "odd/change/dir-to-file/x": false, "odd/\x80fifo": true, "odd/sparse/hole": true,
	} {
		if _, got := o.snap[name]; got != want {
			t.Errorf("umoci: %q exists = %v, want %v", name, got, want)
		}
	}
	groups := hardlinks(o.snap)
	for name, want := range map[string]string{
		"odd/hard-3": "odd/hard-1", "odd/change/linked": "odd/change/link-across", "odd/change/pair-2": "odd/change/pair-2", "odd/hard-fifo-2": "odd/hard-fifo-1",
	} {
		if got := groups[name]; got != want {
			t.Errorf("umoci: %q is linked with %q, want %q", name, got, want)
		}
	}
	if len(o.snap) < 5000 {
		t.Errorf("umoci: %d names, want a whole Debian", len(o.snap))
	}
	changed := *o
	changed.sums = map[string][32]byte{}
	if diffs, _ := changed.compare(o.root, comparison{only: func(n string) bool { return n == "etc/hostname" }}); len(diffs) != 1 {
		t.Errorf("a changed content gives %d differences, want 1", len(diffs))
	}
}
