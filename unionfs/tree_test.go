package unionfs

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

// wordLayer is a Builder that is fed with the words of a memLayer.
type wordLayer struct {
	*Builder
	t testing.TB
}

func (l wordLayer) add(word string) {
	var e *Entry
	switch {
	case strings.Contains(word, "->"):
		name, target, _ := strings.Cut(word, "->")
		e = symlink(name, target)
	case strings.Contains(word, "=>"):
		name, target, _ := strings.Cut(word, "=>")
		e = hardlink(name, target)
	case strings.HasSuffix(word, "/"):
		e = dir(word)
	default:
		e = file(word, "") // whiteouts too
	}
	if _, err := l.Add(e); err != nil && !errors.Is(err, iofs.ErrInvalid) {
		l.t.Fatalf("Add(%q) = %v", word, err)
	}
}

func (l wordLayer) finish() { l.Complete() }

func newWordLayer(t testing.TB) wordLayer { return wordLayer{newBuilder(t), t} }

// realLayers are indexes of layers given in words. They differ from memLayers
// where a Builder follows the layer's own symbolic links.
func realLayers(t testing.TB, specs ...string) []source {
	t.Helper()
	var s []source
	for _, spec := range specs {
		l := newWordLayer(t)
		for _, w := range strings.Fields(spec) {
			l.add(w)
		}
		s = append(s, openIndex(t, writeIndex(t, l.Builder)))
		l.Close()
	}
	return s
}

// TestMergeIndexes merges real indexes and compares them with the naive merge,
// and what a stack of Builders answers with the tree.
func TestMergeIndexes(t *testing.T) {
	for n := range 60 {
		specs := wordsFrom(randomBytes(uint64(n), 4+3*n))
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Logf("layers: %q", specs)
			compareNaive(t, realLayers(t, specs...))
			for k, spec := range specs {
				specs[k] = withoutReplaced(spec)
				l := newWordLayer(t)
				for _, w := range strings.Fields(specs[k]) {
					l.add(w)
				}
				if l.Replaced() > 0 {
					t.Skip("a layer's own symbolic links make names meet")
				}
				l.Close()
			}
			tree := compareNaive(t, realLayers(t, specs...))
			if tree == nil || len(specs) > 4 {
				return
			}
			feedStack(t, specs, tree, func() liveLayer { return newWordLayer(t) })
		})
	}
}

var treeSpecs = []string{
	"a/ a/b/ a/b/x a/b/y a/l->b/x bin->usr/bin usr/ usr/bin/ usr/bin/sh d/ d/e/ d/e/f",
	"a/ a/b/ a/b/.wh.x a/b/z bin/ls loop->loop up->../../a",
	"usr/ usr/bin/ usr/bin/cat link=>a/b/y n/ n/o/ n/o/p=>d/e/f",
}

func TestTreeFS(t *testing.T) {
	tree, err := mergeTree(t, realLayers(t, treeSpecs...))
	if err != nil {
		t.Fatal(err)
	}
	content := func(ref Ref) ([]byte, error) {
		var a Attr
		err := tree.Attr(ref, &a)
		return make([]byte, a.Size), err
	}
	fsys := tree.FS(content)
	whole, err := mergeTree(t, realLayers(t, append(treeSpecs[:len(treeSpecs):len(treeSpecs)], ".wh.loop a/.wh.l")...))
	if err != nil {
		t.Fatal(err)
	}
	// TestFS opens symbolic links, so that none may lead nowhere.
	if err := fstest.TestFS(whole.FS(content), "a/b/z", "usr/bin/ls", "usr/bin/cat", "link", "n/o/p", "bin"); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"bin/ls", "up/b/z", "up"} {
		if _, err := iofs.Stat(fsys, name); err != nil {
			t.Errorf("Stat(%q) = %v", name, err)
		}
	}
	for _, name := range []string{"a/b/x", "loop", "a/l", "usr/bin/sh/x"} {
		if _, err := iofs.Stat(fsys, name); !errors.Is(err, iofs.ErrNotExist) {
			t.Errorf("Stat(%q) = %v, want ErrNotExist", name, err)
		}
	}
	if got, err := iofs.ReadLink(fsys, "bin"); got != "usr/bin" || err != nil {
		t.Errorf("ReadLink(bin) = %q, %v", got, err)
	}
	if _, err := iofs.ReadFile(tree.FS(nil), "a/b/z"); !errors.Is(err, iofs.ErrInvalid) {
		t.Errorf("ReadFile without content = %v, want ErrInvalid", err)
	}
	empty, err := mergeTree(t, realLayers(t, "x d/ d/y"))
	if err != nil {
		t.Fatal(err)
	}
	if err := fstest.TestFS(empty.FS(content), "x", "d/y"); err != nil {
		t.Error(err)
	}
}

func TestTreeReadDirResumes(t *testing.T) {
	tree, err := mergeTree(t, realLayers(t, "d/ d/a d/b d/c e/ e/x .wh.no e/.wh.y e/z", "d/ d/.wh.b d/bb"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ dir, want string }{{"d", "a bb c"}, {"e", "x z"}} {
		dir, _, err := tree.Lookup(tree.Root(), tt.dir)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for pos, more := 0, true; more; {
			more = false
			err := tree.ReadDir(dir, pos, func(next int, name string, _ Ref) bool {
				got, pos, more = append(got, name), next, true
				return false
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("ReadDir(%s) in steps = %s, want %s", tt.dir, s, tt.want)
		}
	}
	for _, dir := range []Ref{{-1, RootID}, {2, RootID}, {0, FileID(0)}} {
		if _, _, err := tree.Lookup(dir, "a"); !errors.Is(err, iofs.ErrInvalid) {
			t.Errorf("Lookup in %v = %v, want ErrInvalid", dir, err)
		}
	}
	if err := tree.ReadDir(tree.Root(), -1, nil); !errors.Is(err, iofs.ErrInvalid) {
		t.Errorf("ReadDir from -1 = %v, want ErrInvalid", err)
	}
}

// TestTreeDamage flips every byte of a tree file, or cuts the file there: then
// everything is ErrDamaged or as before.
func TestTreeDamage(t *testing.T) {
	layers := realLayers(t, treeSpecs...)
	name := filepath.Join(t.TempDir(), "tree")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := mergeSources(f, layers); err != nil {
		t.Fatal(err)
	}
	f.Close()
	good, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := openTree(name, layers)
	if err != nil {
		t.Fatal(err)
	}
	if err := tree.Verify(); err != nil {
		t.Errorf("Verify() = %v", err)
	}
	tree.Close()
	try := func(what string, data []byte) {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		tree, err := openTree(name, layers)
		if err == nil {
			if err = tree.Verify(); err == nil {
				t.Errorf("%s: Verify() = nil", what)
			}
			_, ok, lerr := tree.Lookup(tree.Root(), "usr")
			if lerr == nil && !ok || lerr != nil && !errors.Is(lerr, ErrDamaged) {
				t.Errorf("%s: Lookup(usr) = %v, %v", what, ok, lerr)
			}
			tree.Close()
		}
		if !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v, want ErrDamaged", what, err)
		}
	}
	for i := 0; i < len(good); i++ {
		if i > 600 && i < sectionHeader-8 && i%97 != 0 {
			continue // the unused part of the header
		}
		bad := append([]byte(nil), good...)
		bad[i] ^= 0x41
		try(fmt.Sprintf("byte %d", i), bad)
	}
	for _, n := range []int{0, 1, sectionHeader - 1, sectionHeader, len(good) - 1} {
		try(fmt.Sprintf("cut at %d", n), good[:n])
	}
	try("longer", append(append([]byte(nil), good...), 0))
}

// TestTreeLies lets a tree with right checksums lie: nothing panics, nothing
// outside of the sections is read.
func TestTreeLies(t *testing.T) {
	layers := realLayers(t, treeSpecs...)
	m, err := newMerger(layers)
	if err == nil {
		err = m.run()
	}
	if err != nil {
		t.Fatal(err)
	}
	for i := range 12 {
		for _, v := range []byte{0xff, 0x80, 0x01} {
			w := &treeWriter{merger: m}
			name := filepath.Join(t.TempDir(), "tree")
			f, err := os.Create(name)
			if err != nil {
				t.Fatal(err)
			}
			w.sectionWriter = newSectionWriter(f, treeMagic, treeVersion)
			w.collect()
			w.begin(treeNames)
			for _, d := range w.stored {
				if err := w.dirBlock(d); err != nil {
					t.Fatal(err)
				}
			}
			for off := i; off < len(w.recs); off += 3 * dirRecord / 10 {
				if off%dirRecord < 8 && v == 0x01 {
					continue
				}
				w.recs[off] ^= v
			}
			w.begin(treeDirs)
			w.append(w.recs)
			w.begin(treeLayers)
			for k, l := range layers {
				w.append(w.layerRec(k, l))
			}
			if err := w.finish(nil); err != nil {
				t.Fatal(err)
			}
			f.Close()
			tree, err := openTree(name, layers)
			if err != nil {
				continue
			}
			budget := 1000
			var walk func(dir Ref, depth int)
			walk = func(dir Ref, depth int) {
				tree.Parent(dir)
				tree.Source(dir)
				var a Attr
				tree.Attr(dir, &a)
				tree.ReadDir(dir, 0, func(_ int, name string, ref Ref) bool {
					tree.Lookup(dir, name)
					if budget--; ref.ID.IsDir() && depth < 10 && budget > 0 {
						walk(ref, depth+1)
					}
					return budget > 0
				})
			}
			walk(tree.Root(), 0)
			tree.Close()
		}
	}
}

// TestMergeFile goes by the exported names.
func TestMergeFile(t *testing.T) {
	var layers []*Index
	for _, l := range realLayers(t, treeSpecs...) {
		layers = append(layers, l.(*Index))
	}
	name := filepath.Join(t.TempDir(), "tree")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Merge(f, layers); err != nil {
		t.Fatal(err)
	}
	tree, err := OpenTree(name, layers)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	before := show(t, tree)
	tree.ForgetPages()
	if after := show(t, tree); after != before {
		t.Errorf("after ForgetPages: %s, before: %s", after, before)
	}
	const want = "a/:1 a/b/:1 a/b/y:0 a/b/z:1 a/l:0 bin:0 d/:0 d/e/:0 d/e/f:0 link:0 loop:1 n/:2 n/o/:2 n/o/p:0 up:1 usr/:2 usr/bin/:2 usr/bin/cat:2 usr/bin/ls:1 usr/bin/sh:0"
	if before != want {
		t.Errorf("tree:\n got %s\nwant %s", before, want)
	}
}

func TestTreeOfOtherLayers(t *testing.T) {
	name := filepath.Join(t.TempDir(), "tree")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := mergeSources(f, realLayers(t, "a", "b")); err != nil {
		t.Fatal(err)
	}
	for _, specs := range [][]string{{"a"}, {"a", "b", "c"}, {"a", "b c"}, nil} {
		if _, err := openTree(name, realLayers(t, specs...)); !errors.Is(err, ErrDamaged) {
			t.Errorf("opening the tree with %q = %v, want ErrDamaged", specs, err)
		}
	}
	if _, err := OpenTree(filepath.Join(t.TempDir(), "none"), nil); !errors.Is(err, iofs.ErrNotExist) {
		t.Errorf("OpenTree of nothing = %v, want ErrNotExist", err)
	}
}

func TestTreeAllocations(t *testing.T) {
	tree, err := mergeTree(t, realLayers(t, treeSpecs...))
	if err != nil {
		t.Fatal(err)
	}
	root := tree.Root()
	de, _, _ := tree.Lookup(root, "d")
	var a Attr
	if n := testing.AllocsPerRun(100, func() {
		for _, name := range []string{"usr", "none", "link"} {
			tree.Lookup(root, name)
		}
		tree.Lookup(de, "e")
		tree.Lookup(de, "none")
		tree.Attr(root, &a)
		tree.Attr(de, &a)
		tree.Parent(de)
		tree.Source(root)
		tree.ReadDir(root, 0, func(int, string, Ref) bool { return true })
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}
