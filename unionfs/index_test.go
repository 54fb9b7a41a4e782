package unionfs

import (
	"bytes"
	"errors"
	"fmt"
	iofs "io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// someLayer has something of everything.
func someLayer() []*Entry {
	f := file("usr/bin/f", "content")
	f.Xattrs = map[string]string{"security.capability": "cap", "user.x": ""}
	two := file("two", "ab")
	two.Content.Chunks = []Chunk{{Digest: Digest{1}}, {Off: 1, Digest: Digest{2}}}
	return []*Entry{
		dir("./"), dir("usr"), f, hardlink("usr/bin/g", "usr/bin/f"), symlink("bin", "usr/bin"), file("bin/h", ""),
		hardlink("k", "below/k"), whiteout("gone"), opaque("var/lib"), two, file("twice", "content"), file("old", "old"), file("old", "new"),
		{Name: "dev/null", Type: typeChar, Major: 1, Minor: 3, Xattrs: map[string]string{"user.y": "z"}},
	}
}

// answers asks everything of an index and returns the answers one by one; for
// damage the answer is "damaged". Any other error fails the test.
func answers(t testing.TB, x *Index) (all []string) {
	say := func(v any, err error) {
		switch {
		case errors.Is(err, ErrDamaged):
			all = append(all, "damaged")
		case err != nil && !errors.Is(err, iofs.ErrInvalid):
			t.Fatalf("unexpected error %v", err)
		default:
			all = append(all, fmt.Sprint(v, err))
		}
	}
	inode := func(id ID) {
		var a Attr
		err := x.Attr(id, &a)
		say(a, err)
		for _, name := range []string{"user.x", "security.capability"} {
			v, ok, err := x.Xattr(id, name)
			say(fmt.Sprint(v, ok), err)
		}
		names, err := x.XattrNames(id)
		say(names, err)
		target, err := x.Readlink(id)
		say(target, err)
		c, err := x.Content(id)
		say(c, err)
	}
	s := x.Stats()
	for i := range min(s.Dirs, 64) {
		inode(DirID(i))
		for _, name := range []string{"usr", "bin", "f", "k", "gone", "zz"} {
			c, err := x.Lookup(DirID(i), name)
			say(c, err)
		}
		p, name, err := x.Parent(DirID(i))
		say(fmt.Sprint(p, strings.Clone(name)), err)
		op, err := x.Opaque(DirID(i))
		say(op, err)
		first, n, err := x.Children(DirID(i))
		say(fmt.Sprint(first, n), err)
		for k := first; k < first+min(n, 64) && err == nil; k++ {
			name, c, err := x.ChildAt(k)
			say(fmt.Sprint(strings.Clone(name), c), err)
		}
	}
	for i := range min(s.Files, 64) {
		inode(FileID(i))
	}
	for i := range min(s.Contents, 64) {
		c, err := x.ContentByNumber(i)
		say(c, err)
	}
	for i := range min(s.Chunks, 64) {
		c, n, err := x.Chunk(i)
		say(fmt.Sprint(c, n), err)
	}
	ids, err := x.LinkDirs()
	say(ids, err)
	return all
}

func TestIndexMeta(t *testing.T) {
	x := index(t, someLayer()...)
	if want := (Meta{Blob: Digest{1}, DiffID: Digest{2}, BlobSize: 3, Format: 4}); x.Meta() != want {
		t.Errorf("Meta() = %+v, want %+v", x.Meta(), want)
	}
	ids, err := x.LinkDirs()
	if err != nil || len(ids) != 1 || ids[0] != RootID {
		t.Errorf("LinkDirs() = %v, %v, want the root", ids, err)
	}
	x.ForgetPages()
	if c, err := x.Lookup(RootID, "usr"); err != nil || !c.ID.IsDir() {
		t.Errorf("Lookup() = %v, %v after ForgetPages", c, err)
	}
}

func TestIndexOutOfRange(t *testing.T) {
	x := index(t, someLayer()...)
	b := build(t, someLayer()...)
	for _, l := range []Layer{x, b} {
		for _, id := range []ID{DirID(1000), FileID(1000), NoID, ^ID(0)} {
			var a Attr
			if l.Attr(id, &a) == nil {
				t.Errorf("%T: Attr(%#x) = nil", l, id)
			}
			if _, err := l.Lookup(id, "a"); err == nil {
				t.Errorf("%T: Lookup(%#x) = nil", l, id)
			}
			if _, err := l.Content(id); err == nil {
				t.Errorf("%T: Content(%#x) = nil", l, id)
			}
		}
		if _, err := l.Lookup(FileID(0), "a"); !errors.Is(err, iofs.ErrInvalid) {
			t.Errorf("%T: Lookup in a file = %v", l, err)
		}
		if _, err := l.Readlink(RootID); !errors.Is(err, iofs.ErrInvalid) {
			t.Errorf("%T: Readlink of a directory = %v", l, err)
		}
	}
}

// TestIndexDamage flips every byte of an index and cuts it at every length: an
// answer is the right one or damage.
func TestIndexDamage(t *testing.T) {
	good, err := os.ReadFile(writeIndex(t, build(t, someLayer()...)))
	must(t, err)
	path := filepath.Join(t.TempDir(), "damaged.idx")
	must(t, os.WriteFile(path, good, 0o600))
	want := answers(t, openIndex(t, path))
	seen := 0
	check := func(what string, data []byte) {
		must(t, os.WriteFile(path, data, 0o600))
		x, err := Open(path)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("%s: Open() = %v", what, err)
			}
			return
		}
		defer x.Close()
		got := answers(t, x)
		hit := false
		for i, k := 0, 0; i < len(got) && !hit; i, k = i+1, k+1 {
			if hit = got[i] == "damaged"; !hit && got[i] != want[k] {
				t.Fatalf("%s: answer %d = %s, want %s", what, i, got[i], want[k])
			}
		}
		if hit {
			seen++
		}
		if err := x.Verify(); !errors.Is(err, ErrDamaged) {
			t.Fatalf("%s: Verify() = %v", what, err)
		}
	}
	for i := range good {
		if i > 1024 && i < sectionHeader-16 && i%64 != 0 {
			continue // empty part of the header
		}
		data := bytes.Clone(good)
		data[i] ^= 1 << (i % 8)
		check(fmt.Sprint("byte ", i), data)
	}
	for n := 0; n < len(good); n += 1 + n/64 {
		check(fmt.Sprint("length ", n), good[:n])
	}
	check("longer", append(bytes.Clone(good), 0))
	if seen == 0 {
		t.Error("no damage was met by an access")
	}
}

// TestIndexLazy shows that opening does not verify blocks, and that damage in
// one leaves the others' answers.
func TestIndexLazy(t *testing.T) {
	var entries []*Entry
	for i := range 5000 {
		entries = append(entries, file(fmt.Sprintf("d%d/f%d", i%50, i), fmt.Sprint(i)))
	}
	path := writeIndex(t, build(t, entries...))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	st, err := f.Stat()
	must(t, err)
	_, err = f.WriteAt([]byte("damage"), st.Size()-2*sectionBlock)
	must(t, err)
	x := openIndex(t, path)
	c, err := x.Lookup(RootID, "d7")
	if err != nil {
		t.Fatalf("Lookup() = %v beside the damage", err)
	}
	if _, err := x.Lookup(c.ID, "f7"); err != nil {
		t.Fatalf("Lookup() = %v beside the damage", err)
	}
	damaged := 0
	for i := range x.Stats().Chunks {
		if _, _, err := x.Chunk(i); errors.Is(err, ErrDamaged) {
			damaged++
		}
	}
	if damaged == 0 || damaged == int(x.Stats().Chunks) {
		t.Errorf("%d chunks of %d damaged, want some", damaged, x.Stats().Chunks)
	}
}

func TestIndexTruncatedWhileMapped(t *testing.T) {
	var entries []*Entry
	for i := range 5000 {
		entries = append(entries, file(fmt.Sprint("f", i), fmt.Sprint(i)))
	}
	path := writeIndex(t, build(t, entries...))
	x := openIndex(t, path)
	must(t, os.Truncate(path, sectionHeader))
	if err := x.Verify(); !errors.Is(err, ErrDamaged) {
		t.Errorf("Verify() = %v", err)
	}
	if _, err := x.Lookup(RootID, "f1"); !errors.Is(err, ErrDamaged) {
		t.Errorf("Lookup() = %v", err)
	}
}

func TestIndexAllocations(t *testing.T) {
	var entries []*Entry
	for i := range 1000 {
		entries = append(entries, file(fmt.Sprint("d/f", i), fmt.Sprint(i)))
	}
	x := index(t, entries...)
	d, err := x.Lookup(RootID, "d")
	must(t, err)
	first, _, err := x.Children(d.ID)
	must(t, err)
	var a Attr
	for what, fn := range map[string]func(){
		"hit":     func() { _, err = x.Lookup(d.ID, "f77") },
		"miss":    func() { _, err = x.Lookup(d.ID, "nothing") },
		"Attr":    func() { err = x.Attr(FileID(7), &a) },
		"ChildAt": func() { _, _, err = x.ChildAt(first + 5) },
		"Parent":  func() { _, _, err = x.Parent(d.ID) },
		"Content": func() { _, err = x.Content(FileID(7)) },
		"Chunk":   func() { _, _, err = x.Chunk(7) },
		"Xattr":   func() { _, _, err = x.Xattr(FileID(7), "security.selinux") },
	} {
		if n := testing.AllocsPerRun(100, fn); n != 0 || err != nil {
			t.Errorf("%s: %v allocations, error %v", what, n, err)
		}
	}
}

// TestBuilderConcurrent has readers ask while a writer adds: what they were told
// of a name stays true.
func TestBuilderConcurrent(t *testing.T) {
	const n = 3000
	b := newBuilder(t)
	var wg sync.WaitGroup
	for r := range 4 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(r), 1))
			known := map[string]ID{}
			for {
				changed := b.Changed()
				done := b.Done()
				for range 50 {
					i := rnd.IntN(n)
					name := fmt.Sprint("f", i)
					d, err := b.Lookup(RootID, fmt.Sprint("d", i%17))
					if err != nil || d.Kind != ChildInode {
						continue
					}
					c, err := b.Lookup(d.ID, name)
					if err != nil {
						t.Errorf("Lookup() = %v", err)
						return
					}
					if c.Kind == ChildNone {
						if _, ok := known[name]; ok || done {
							t.Errorf("%s is gone", name)
						}
						continue
					}
					if id, ok := known[name]; ok && id != c.ID {
						t.Errorf("%s: number %d, was %d", name, c.ID, id)
					}
					known[name] = c.ID
					var a Attr
					if err := b.Attr(c.ID, &a); err != nil || a.Size != int64(len(name)) {
						t.Errorf("Attr() = %+v, %v", a, err)
					}
					b.Content(c.ID)
				}
				if done {
					return
				}
				<-changed
			}
		})
	}
	for i := range n {
		name := fmt.Sprint("f", i)
		if _, err := b.Add(file(fmt.Sprintf("d%d/%s", i%17, name), name)); err != nil {
			t.Fatal(err)
		}
	}
	b.Complete()
	x := openIndex(t, writeIndex(t, b))
	wg.Wait()
	sameLayer(t, b, x)
}

func TestIndexConcurrent(t *testing.T) {
	x := index(t, someLayer()...)
	want := strings.Join(answers(t, x), "\n")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if got := strings.Join(answers(t, x), "\n"); got != want {
				t.Error("answers differ")
			}
			x.ForgetPages()
		})
	}
	wg.Wait()
}

// TestBuilderHeap shows that what is built is not in the Go heap.
func TestBuilderHeap(t *testing.T) {
	b := newBuilder(t)
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for i := range 100_000 {
		if _, err := b.Add(file(fmt.Sprintf("usr/share/d%d/file-%d", i/100, i), fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	if grown := int64(heap()) - int64(before); grown > 1<<20 {
		t.Errorf("heap grew by %d bytes", grown)
	}
	sameLayer(t, b, openIndex(t, writeIndex(t, b)))
}

func benchmarkEntries(n int) []*Entry {
	entries := make([]*Entry, n)
	for i := range entries {
		entries[i] = file(fmt.Sprintf("usr/share/package-%d/file-%d.dat", i/20, i), fmt.Sprint(i))
	}
	return entries
}

func BenchmarkBuilder(b *testing.B) {
	const n = 100_000
	entries := benchmarkEntries(n)
	path := filepath.Join(b.TempDir(), "bench.idx")
	var size int64
	b.ReportAllocs()
	for b.Loop() {
		l := build(b, entries...)
		f, err := os.Create(path)
		must(b, err)
		must(b, l.Write(f, Meta{}))
		st, err := f.Stat()
		must(b, err)
		size = st.Size()
		f.Close()
		l.Close()
	}
	b.ReportMetric(float64(size)/n, "file-bytes/entry")
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/entry")
}

func BenchmarkLookup(b *testing.B) {
	l := build(b, benchmarkEntries(100_000)...)
	x := openIndex(b, writeIndex(b, l))
	d, err := x.Lookup(RootID, "usr")
	must(b, err)
	if d, err = x.Lookup(d.ID, "share"); err != nil {
		b.Fatal(err)
	}
	for name, layer := range map[string]Layer{"index": x, "builder": l} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if c, err := layer.Lookup(d.ID, "package-3333"); err != nil || c.Kind != ChildInode {
					b.Fatal(c, err)
				}
			}
		})
	}
}
