package unionfs

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Constructors of entries. Every file has its content, in one chunk.

func dir(name string) *Entry {
	return &Entry{Name: name, Type: typeDir, Mode: 0o755, Mtime: 100}
}

func file(name, content string) *Entry {
	e := &Entry{Name: name, Type: typeReg, Mode: 0o644, Mtime: 100, Size: int64(len(content)), Content: &Content{Digest: sha256.Sum256([]byte(content))}}
	if content != "" {
		e.Content.Chunks = []Chunk{{BlobOff: 7, BlobLen: 9, Digest: e.Content.Digest}}
	}
	return e
}

func symlink(name, target string) *Entry {
	return &Entry{Name: name, Type: typeSymlink, Mode: 0o777, Mtime: 100, Linkname: target}
}

func hardlink(name, target string) *Entry {
	return &Entry{Name: name, Type: typeLink, Mtime: 100, Linkname: target}
}

func whiteout(name string) *Entry {
	d, b := splitBase(name)
	return file(strings.TrimPrefix(d+"/"+whiteoutMark+b, "/"), "")
}

func opaque(name string) *Entry { return file(strings.TrimPrefix(name+"/"+opaqueName, "/"), "") }

func newBuilder(t testing.TB) *Builder {
	t.Helper()
	b, err := NewBuilder(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func build(t testing.TB, entries ...*Entry) *Builder {
	t.Helper()
	b := newBuilder(t)
	for _, e := range entries {
		if _, err := b.Add(e); err != nil {
			t.Fatalf("Add(%q) = %v", e.Name, err)
		}
	}
	return b
}

// writeIndex writes what b has built to a file and returns its path.
func writeIndex(t testing.TB, b *Builder) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "layer.idx"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := b.Write(f, Meta{Blob: Digest{1}, DiffID: Digest{2}, BlobSize: 3, Format: 4}); err != nil {
		t.Fatalf("Write() = %v", err)
	}
	return f.Name()
}

func openIndex(t testing.TB, path string) *Index {
	t.Helper()
	x, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close() })
	return x
}

// index compiles entries.
func index(t testing.TB, entries ...*Entry) *Index {
	t.Helper()
	b := build(t, entries...)
	x := openIndex(t, writeIndex(t, b))
	sameLayer(t, b, x)
	return x
}

// dump lists a layer, a name on each line: directories "a/", with the number and
// marks, files with number, links and size, "l -> target", "h => target", "-x"
// for a whiteout.
func dump(t testing.TB, x *Index) string {
	t.Helper()
	var b strings.Builder
	dumpDir(t, x, &b, RootID, "")
	return b.String()
}

func dumpDir(t testing.TB, x *Index, b *strings.Builder, d ID, path string) {
	var a Attr
	must(t, x.Attr(d, &a))
	op, err := x.Opaque(d)
	must(t, err)
	fmt.Fprintf(b, "%s/ d%d n%d", path, d.Index(), a.Nlink)
	if a.Implicit {
		b.WriteString(" implicit")
	}
	if op {
		b.WriteString(" opaque")
	}
	b.WriteString("\n")
	first, n, err := x.Children(d)
	must(t, err)
	for i := first; i < first+n; i++ {
		name, c, err := x.ChildAt(i)
		must(t, err)
		p := strings.TrimPrefix(path+"/"+name, "/")
		switch {
		case c.Kind == ChildWhiteout:
			fmt.Fprintf(b, "-%s\n", p)
		case c.Kind == ChildLink:
			fmt.Fprintf(b, "%s => %s\n", p, c.Target)
		case c.ID.IsDir():
			dumpDir(t, x, b, c.ID, p)
		default:
			must(t, x.Attr(c.ID, &a))
			fmt.Fprintf(b, "%s f%d n%d s%d", p, c.ID.Index(), a.Nlink, a.Size)
			if target, err := x.Readlink(c.ID); err == nil {
				fmt.Fprintf(b, " -> %s", target)
			}
			b.WriteString("\n")
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sameLayer compares everything that a Builder which is done answers with what
// the Index that it wrote answers.
func sameLayer(t testing.TB, b *Builder, x *Index) {
	t.Helper()
	must(t, x.Verify())
	if b.Stats() != x.Stats() || b.HasImplicit() != x.HasImplicit() || b.Done() != x.Done() {
		t.Fatalf("Stats: builder %+v, index %+v", b.Stats(), x.Stats())
	}
	if g, w := fmt.Sprint(x.XattrNameSet()), fmt.Sprint(b.XattrNameSet()); g != w {
		t.Fatalf("XattrNameSet() = %v, builder %v", g, w)
	}
	s := x.Stats()
	for i := range s.Dirs {
		sameInode(t, b, x, DirID(i))
		for _, name := range []string{"", "a", "zz", "\xff"} {
			sameAnswer(t, "Lookup", func(l Layer) (any, error) { return l.Lookup(DirID(i), name) }, b, x)
		}
		first, n, err := x.Children(DirID(i))
		must(t, err)
		for k := first; k < first+n; k++ {
			name, c, err := x.ChildAt(k)
			must(t, err)
			if got, err := x.Lookup(DirID(i), name); err != nil || got != c {
				t.Fatalf("Lookup(%d, %q) = %v, %v, want %v", i, name, got, err, c)
			}
			if got, err := b.Lookup(DirID(i), name); err != nil || got != c {
				t.Fatalf("builder: Lookup(%d, %q) = %v, %v, want %v", i, name, got, err, c)
			}
		}
	}
	for i := range s.Files {
		sameInode(t, b, x, FileID(i))
	}
	for i := range s.Chunks {
		bc, bn, berr := b.Chunk(i)
		xc, xn, xerr := x.Chunk(i)
		if bc != xc || bn != xn || berr != nil || xerr != nil {
			t.Fatalf("Chunk(%d) = %v, %d, %v, builder %v, %d, %v", i, xc, xn, xerr, bc, bn, berr)
		}
	}
}

func sameInode(t testing.TB, b *Builder, x *Index, id ID) {
	t.Helper()
	sameAnswer(t, "Attr", func(l Layer) (any, error) { var a Attr; err := l.Attr(id, &a); return a, err }, b, x)
	sameAnswer(t, "Readlink", func(l Layer) (any, error) { return l.Readlink(id) }, b, x)
	sameAnswer(t, "Opaque", func(l Layer) (any, error) { return l.Opaque(id) }, b, x)
	sameAnswer(t, "Parent", func(l Layer) (any, error) { p, n, err := l.Parent(id); return fmt.Sprint(p, n), err }, b, x)
	sameAnswer(t, "XattrNames", func(l Layer) (any, error) { n, err := l.XattrNames(id); return fmt.Sprintf("%q", n), err }, b, x)
	names, _ := x.XattrNames(id)
	for _, name := range append(names, "user.no") {
		sameAnswer(t, "Xattr", func(l Layer) (any, error) { v, ok, err := l.Xattr(id, name); return fmt.Sprintf("%q %v", v, ok), err }, b, x)
	}
	var a Attr
	if x.Attr(id, &a); a.Nlink > 0 { // a superseded file's content need not be there
		sameAnswer(t, "Content", func(l Layer) (any, error) { return l.Content(id) }, b, x)
	}
}

func sameAnswer(t testing.TB, what string, ask func(Layer) (any, error), b, x Layer) {
	t.Helper()
	bv, berr := ask(b)
	xv, xerr := ask(x)
	if bv != xv || fmt.Sprint(berr) != fmt.Sprint(xerr) {
		t.Fatalf("%s: index %v, %v, builder %v, %v", what, xv, xerr, bv, berr)
	}
}
