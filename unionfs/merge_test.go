package unionfs

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func memLayers(specs ...string) []source {
	var s []source
	for _, spec := range specs {
		s = append(s, mem(spec))
	}
	return s
}

// mergeTree merges layers in a temporary file and opens it.
func mergeTree(t testing.TB, layers []source) (*Tree, error) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "tree")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := mergeSources(f, layers); err != nil {
		return nil, err
	}
	tree, err := openTree(name, layers)
	if err != nil {
		t.Fatalf("openTree() = %v", err)
	}
	t.Cleanup(func() { tree.Close() })
	return tree, nil
}

// walkTree calls fn for everything in the tree, parents first, and checks that
// its methods agree with each other.
func walkTree(t testing.TB, tree *Tree, fn func(p string, ref Ref)) {
	t.Helper()
	seen := map[Ref]string{}
	var walk func(p string, dir Ref)
	walk = func(p string, dir Ref) {
		if other, ok := seen[dir]; ok {
			t.Fatalf("%v is both %q and %q", dir, other, p)
		}
		seen[dir] = p
		nlink, last := uint32(2), ""
		err := tree.ReadDir(dir, 0, func(pos int, name string, ref Ref) bool {
			if name <= last {
				t.Errorf("ReadDir(%q): %q after %q", p, name, last)
			}
			last = name
			q := path.Join(p, name)
			got, ok, err := tree.Lookup(dir, name)
			if got != ref || !ok || err != nil {
				t.Errorf("Lookup(%q) = %v, %v, %v, want %v", q, got, ok, err, ref)
			}
			fn(q, ref)
			if !ref.ID.IsDir() {
				return true
			}
			nlink++
			if parent, err := tree.Parent(ref); parent != dir || err != nil {
				t.Errorf("Parent(%q) = %v, %v, want %v", q, parent, err, dir)
			}
			walk(q, ref)
			return true
		})
		if err != nil {
			t.Fatalf("ReadDir(%q) = %v", p, err)
		}
		var a Attr
		if err := tree.Attr(dir, &a); err != nil || a.Nlink != nlink || a.Mode&unix.S_IFMT != unix.S_IFDIR {
			t.Errorf("Attr(%q) = %+v, %v, want %d links", p, a, err, nlink)
		}
	}
	if parent, err := tree.Parent(tree.Root()); parent != tree.Root() || err != nil {
		t.Errorf("Parent(root) = %v, %v", parent, err)
	}
	walk("", tree.Root())
}

// show lists a tree: a directory as "d/:1" with the layer that names it, and
// where its attributes are from if that is another; a file as "f:0".
func show(t testing.TB, tree *Tree) string {
	var out []string
	walkTree(t, tree, func(p string, ref Ref) {
		if !ref.ID.IsDir() {
			out = append(out, fmt.Sprintf("%s:%d", p, ref.Layer))
			return
		}
		src, err := tree.Source(ref)
		if err != nil {
			t.Errorf("Source(%q) = %v", p, err)
		}
		s := fmt.Sprintf("%s/:%d", p, ref.Layer)
		if src != ref {
			s += fmt.Sprintf("<%d", src.Layer)
		}
		out = append(out, s)
	})
	return strings.Join(out, " ")
}

func TestMerge(t *testing.T) {
	for _, tt := range []struct {
		name   string
		layers []string
		want   string
	}{
		{"one layer", []string{"a/ a/b c .wh.x"}, "a/:0 a/b:0 c:0"},
		{"empty layers", []string{"", "", ""}, ""},
		{"disjoint", []string{"a/ a/x", "b/ b/y"}, "a/:0 a/x:0 b/:1 b/y:1"},
		{"union", []string{"a/ a/x a/z", "a/ a/y"}, "a/:1 a/x:0 a/y:1 a/z:0"},
		{"upper file wins", []string{"a/ a/x", "a/ a/x"}, "a/:1 a/x:1"},
		{"whiteout of a file", []string{"a/ a/x a/y", "a/ a/.wh.x"}, "a/:1 a/y:0"},
		{"whiteout of a directory", []string{"a/ a/x b", ".wh.a"}, "b:0"},
		{"whiteout of nothing", []string{"b", ".wh.a a2"}, "a2:1 b:0"},
		{"whiteout, then made again", []string{"a/ a/x", ".wh.a", "a/ a/y"}, "a/:2 a/y:2"},
		{"whiteout and entry of one layer", []string{"a/ a/x", ".wh.a a/ a/y"}, "a/:1 a/y:1"},
		{"opaque", []string{"a/ a/x a/d/ a/d/e", "a/ a/.wh..wh..opq a/y"}, "a/:1 a/y:1"},
		{"opaque cuts deep", []string{"a/ a/d/ a/d/x", "a/ a/d/ a/d/y", "a/ a/.wh..wh..opq a/d/ a/d/z", "a/ a/d/ a/d/w"}, "a/:3 a/d/:3 a/d/w:3 a/d/z:2"},
		{"opaque root", []string{"a/ a/x", ".wh..wh..opq b"}, "b:1"},
		{"directory over file", []string{"a", "a/ a/x"}, "a/:1 a/x:1"},
		{"file over directory", []string{"a/ a/x", "a"}, "a:1"},
		{"file between directories", []string{"a/ a/x", "a", "a/ a/y"}, "a/:2 a/y:2"},
		{"directory over symbolic link", []string{"b/ a->b", "a/ a/x"}, "a/:1 a/x:1 b/:0"},
		{"implicit over directory", []string{"a/ a/x", "a/y"}, "a/:1<0 a/x:0 a/y:1"},
		{"implicit over implicit", []string{"a/x", "a/y", "a/z"}, "a/:2<0 a/x:0 a/y:1 a/z:2"},
		{"implicit over file", []string{"a", "a/x"}, "a/:1 a/x:1"},
		{"implicit over symbolic link", []string{"b/ b/x a->b", "a/y"}, "a:0 b/:1<0 b/x:0 b/y:1"},
		{"absolute symbolic link", []string{"d/ d/b/ d/b/x a->/d/b", "a/y"}, "a:0 d/:0 d/b/:1<0 d/b/x:0 d/b/y:1"},
		{"symbolic link above the root", []string{"b/ a->../../b", "a/y"}, "a:0 b/:1<0 b/y:1"},
		{"chain of symbolic links", []string{"b/ c->a a->b", "c/y"}, "a:0 b/:1<0 b/y:1 c:0"},
		{"dangling symbolic link", []string{"a->b c", "a/y"}, "a:0 b/:1 b/y:1 c:0"},
		{"dangling, filled twice", []string{"a->/b/", "a/y", "a/z"}, "a:0 b/:2<1 b/y:1 b/z:2"},
		{"dangling, made later", []string{"a->b", "a/y", "b/ b/z"}, "a:0 b/:2 b/y:1 b/z:2"},
		{"dangling, removed later", []string{"a->b", "a/y", ".wh.b"}, "a:0"},
		{"dangling, replaced later", []string{"a->b", "a/y", "b"}, "a:0 b:2"},
		{"dangling in another directory", []string{"a->d/b d/ d/c", "a/y/ a/y/z"}, "a:0 d/:0 d/b/:1 d/b/y/:1 d/b/y/z:1 d/c:0"},
		{"dangling by two names", []string{"a->b/c", "a/y"}, "a/:1 a/y:1"},
		{"symbolic link to itself", []string{"a->a", "a/y"}, "a/:1 a/y:1"},
		{"symbolic link to a file", []string{"a->b b", "a/y"}, "a/:1 a/y:1 b:0"},
		{"implicit below a symbolic link", []string{"b/ b/c/ b/c/x a->b", "a/c/y"}, "a:0 b/:1<0 b/c/:1<0 b/c/x:0 b/c/y:1"},
		{"explicit below a symbolic link", []string{"b/ b/c/ b/c/x a->b", "a/c/ a/c/y"}, "a:0 b/:1<0 b/c/:1 b/c/x:0 b/c/y:1"},
		{"whiteout below a symbolic link", []string{"b/ b/x b/y a->b", "a/.wh.x"}, "a:0 b/:1<0 b/y:0"},
		{"both ways in one layer", []string{"b/ b/x a->b", "a/y b/z"}, "a:0 b/:1<0 b/x:0 b/y:1 b/z:1"},
		{"own place first", []string{"b/ a->b", "a/y b/ b/y a/.wh.z b/z"}, "a:0 b/:1 b/y:1 b/z:1"},
		{"symbolic link to its directory", []string{"d/ d/a->.", "d/ d/a/x"}, "d/:1 d/a:0 d/x:1"},
		{"relocated, then replaced", []string{"b/ a->b", "a/y", "a/ a/z"}, "a/:2 a/z:2 b/:1<0 b/y:1"},
		{"renamed in a directory of one layer", []string{"a->p/q", "p/ p/q/ p/q/x", "a/y"}, "a:0 p/:1 p/q/:2<1 p/q/x:1 p/q/y:2"},
		{"usr merge", []string{"usr/ usr/bin/ usr/bin/a bin->usr/bin", "bin/ .wh.bin", "usr/ usr/bin/ usr/bin/b"}, "bin/:1 usr/:2 usr/bin/:2 usr/bin/a:0 usr/bin/b:2"},
		{"hard link to a lower file", []string{"a/ a/x", "b/ b/y=>a/x"}, "a/:0 a/x:0 b/:1 b/y:0"},
		{"hard link to a link", []string{"x", "y=>x", "z=>y"}, "x:0 y:0 z:0"},
		{"hard link to what is removed", []string{"x", ".wh.x y=>x"}, "y:0"},
		{"hard link through a symbolic link", []string{"b/ b/x a->b", "y=>a/x"}, "a:0 b/:0 b/x:0 y:0"},
		{"hard link in a directory of one layer", []string{"x", "d/ d/e/ d/e/f/ d/e/y=>x d/e/f/z"}, "d/:1 d/e/:1 d/e/f/:1 d/e/f/z:1 d/e/y:0 x:0"},
		{"hard link to what came through a symbolic link", []string{"b/ a->b", "a/x y=>b/x"}, "a:0 b/:1<0 b/x:1 y:1"},
		{"hard link covered later", []string{"x", "d/ d/y=>x", ".wh.d"}, "x:0"},
		{"the same layer twice", []string{"a/ a/x", "a/ a/x"}, "a/:1 a/x:1"},
	} {
		t.Run(strings.ReplaceAll(tt.name, " ", "-"), func(t *testing.T) {
			layers := memLayers(tt.layers...)
			tree, err := mergeTree(t, layers)
			if err != nil {
				t.Fatal(err)
			}
			if got := show(t, tree); got != tt.want {
				t.Errorf("merge of %q:\n got %s\nwant %s", tt.layers, got, tt.want)
			}
			compareNaive(t, layers)
			compareStack(t, tt.layers)
		})
	}
}

func TestMergeErrors(t *testing.T) {
	for _, tt := range []struct {
		name   string
		layers []string
		want   string
	}{
		{"nowhere", []string{"x", "d/y=>z"}, `unionfs: entry "d/y": target "z" of the hard link is not there`},
		{"lowest layer", []string{"y=>z"}, `unionfs: entry "y": target "z" of the hard link is not there`},
		{"directory", []string{"d/", "y=>d"}, `unionfs: entry "y": target "d" of the hard link is a directory`},
		{"removed before", []string{"x", ".wh.x", "y=>x"}, `unionfs: entry "y": target "x" of the hard link is not there`},
		{"itself", []string{"x", "y=>y"}, `unionfs: entry "y": target "y" of the hard link is not there`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := mergeTree(t, memLayers(tt.layers...))
			if !errors.Is(err, iofs.ErrInvalid) || err.Error() != tt.want {
				t.Errorf("merge of %q = %v, want %s", tt.layers, err, tt.want)
			}
		})
	}
	if _, err := mergeTree(t, nil); err == nil {
		t.Error("merge of no layers: no error")
	}
}

// compareNaive compares the tree with the naive merge.
func compareNaive(t testing.TB, layers []source) *Tree {
	t.Helper()
	want, werr := naive(layers)
	tree, err := mergeTree(t, layers)
	if (err == nil) != (werr == nil) {
		t.Fatalf("merge: %v, naive: %v", err, werr)
	}
	if err != nil {
		return nil
	}
	describe := func(ref, src Ref) string { return fmt.Sprint(ref, src) }
	got, exp := map[string]string{}, map[string]string{}
	src, err := tree.Source(tree.Root())
	if err != nil {
		t.Fatal(err)
	}
	got[""] = describe(tree.Root(), src)
	walkTree(t, tree, func(p string, ref Ref) {
		src, err := tree.Source(ref)
		if err != nil {
			t.Fatal(err)
		}
		got[p] = describe(ref, src)
	})
	for p, n := range want {
		if n.dirs == nil {
			exp[p] = describe(n.file, n.file)
		} else {
			exp[p] = describe(n.top(), n.source(layers))
		}
	}
	if diff := cmp.Diff(exp, got); diff != "" {
		t.Fatalf("-naive +merge:\n%s", diff)
	}
	return tree
}

// mergeTo merges layers into a file of dir.
func mergeTo(t testing.TB, dir string, layers []source) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "tree"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := mergeSources(f, layers); err != nil {
		t.Fatal(err)
	}
}
