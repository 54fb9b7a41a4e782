package unionfs

import (
	"errors"
	iofs "io/fs"
	"math"
	"os"
	"strings"
	"testing"
)

func TestBuilder(t *testing.T) {
	long := strings.Repeat("n", MaxName)
	for _, tt := range []struct {
		name    string
		entries []*Entry
		want    string
	}{
		{"empty", nil, "/ d0 n2 implicit\n"},
		{"root", []*Entry{dir("./")}, "/ d0 n2\n"},
		{"cleaned names", []*Entry{dir("./a/"), file("/a//./b", "x")}, "/ d0 n3 implicit\na/ d1 n2\na/b f0 n1 s1\n"},
		{"implicit parents", []*Entry{file("a/b/c", "x")}, "/ d0 n3 implicit\na/ d1 n3 implicit\na/b/ d2 n2 implicit\na/b/c f0 n1 s1\n"},
		{"parent comes later", []*Entry{file("a/c", "x"), dir("a")}, "/ d0 n3 implicit\na/ d1 n2\na/c f0 n1 s1\n"},
		{"sorted by bytes", []*Entry{file("b", ""), file("\xff", ""), file("a", ""), file("a.b", ""), file("B", "")},
			"/ d0 n2 implicit\nB f4 n1 s0\na f2 n1 s0\na.b f3 n1 s0\nb f0 n1 s0\n\xff f1 n1 s0\n"},
		{"long name", []*Entry{file(long, "")}, "/ d0 n2 implicit\n" + long + " f0 n1 s0\n"},
		{"last wins", []*Entry{file("a", "1"), file("a", "22")}, "/ d0 n2 implicit\na f1 n1 s2\n"},
		{"dir over dir", []*Entry{dir("a"), file("a/b", ""), dir("a")}, "/ d0 n3 implicit\na/ d1 n2\na/b f0 n1 s0\n"},
		{"file over dir", []*Entry{file("a/b/c", ""), whiteout("a/x"), file("a", "")}, "/ d0 n2 implicit\na f1 n1 s0\n"},
		{"dir over file", []*Entry{file("a", ""), dir("a"), file("a/b", "")}, "/ d0 n3 implicit\na/ d1 n2 opaque\na/b f1 n1 s0\n"},
		{"dir over file over dir", []*Entry{file("a/b", ""), file("a", ""), dir("a")}, "/ d0 n3 implicit\na/ d2 n2 opaque\n"},
		{"hard link", []*Entry{file("a", "x"), hardlink("d/b", "./a")}, "/ d0 n3 implicit\na f0 n2 s1\nd/ d1 n2 implicit\nd/b f0 n2 s1\n"},
		{"link again", []*Entry{file("a", "x"), hardlink("b", "a"), hardlink("b", "a")}, "/ d0 n2 implicit\na f0 n2 s1\nb f0 n2 s1\n"},
		{"link survives its target", []*Entry{file("a", "x"), hardlink("b", "a"), file("a", "yy")}, "/ d0 n2 implicit\na f1 n1 s2\nb f0 n1 s1\n"},
		{"link to a symlink", []*Entry{symlink("a", "t"), hardlink("b", "a")}, "/ d0 n2 implicit\na f0 n2 s1 -> t\nb f0 n2 s1 -> t\n"},
		{"link below", []*Entry{hardlink("b", "/x/./y"), hardlink("c", "b")}, "/ d0 n2 implicit\nb => x/y\nc => x/y\n"},
		{"link below through a symlink", []*Entry{symlink("lib", "usr/lib"), hardlink("b", "lib/y")},
			"/ d0 n2 implicit\nb => usr/lib/y\nlib f0 n1 s7 -> usr/lib\n"},
		{"link to a hidden name", []*Entry{whiteout("x"), hardlink("b", "x")}, "/ d0 n2 implicit\nb => x\n-x\n"},
		{"link over dir", []*Entry{file("a", "x"), file("d/e", ""), hardlink("d", "a")}, "/ d0 n2 implicit\na f0 n2 s1\nd f0 n2 s1\n"},
		{"whiteout", []*Entry{whiteout("a"), whiteout("d/b")}, "/ d0 n3 implicit\n-a\nd/ d1 n2 implicit\n-d/b\n"},
		{"opaque", []*Entry{opaque(""), opaque("d"), file("d/x", "")}, "/ d0 n3 implicit opaque\nd/ d1 n2 implicit opaque\nd/x f0 n1 s0\n"},
		{"whiteout then dir", []*Entry{whiteout("a"), dir("a")}, "/ d0 n3 implicit\na/ d1 n2 opaque\n"},
		{"dir then whiteout", []*Entry{dir("a"), whiteout("a")}, "/ d0 n3 implicit\na/ d1 n2 opaque\n"},
		{"whiteout then parent", []*Entry{whiteout("a"), file("a/b", "")}, "/ d0 n3 implicit\na/ d1 n2 implicit opaque\na/b f0 n1 s0\n"},
		{"whiteout and file", []*Entry{whiteout("a"), file("a", ""), file("b", ""), whiteout("b")}, "/ d0 n2 implicit\na f0 n1 s0\nb f1 n1 s0\n"},
		{"aufs leftovers", []*Entry{dir(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", ""), file("a/.wh..wh.aufs", "")}, "/ d0 n2 implicit\n"},
		{"symlinked parent", []*Entry{symlink("lib", "usr/lib"), file("lib/x", "")},
			"/ d0 n3 implicit\nlib f0 n1 s7 -> usr/lib\nusr/ d1 n3 implicit\nusr/lib/ d2 n2 implicit\nusr/lib/x f1 n1 s0\n"},
		{"symlinked parent, absolute, dots", []*Entry{dir("a"), symlink("a/l", "/./b/../../c"), file("a/l/x", "")},
			"/ d0 n5 implicit\na/ d1 n2\na/l f0 n1 s12 -> /./b/../../c\nb/ d2 n2 implicit\nc/ d3 n2 implicit\nc/x f1 n1 s0\n"},
		{"symlink is replaced", []*Entry{symlink("l", "t"), dir("l"), file("l/x", "")}, "/ d0 n3 implicit\nl/ d1 n2 opaque\nl/x f1 n1 s0\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := dump(t, index(t, tt.entries...)); got != tt.want {
				t.Errorf("got:\n%swant:\n%s", got, tt.want)
			}
		})
	}
}

func TestBuilderRefuses(t *testing.T) {
	with := func(e *Entry, change func(*Entry)) *Entry { change(e); return e }
	deep := strings.Repeat("d/", MaxDepth+1)
	for _, tt := range []struct {
		reason string
		entry  *Entry
		before []*Entry
	}{
		{`".."`, file("../a", ""), nil},
		{`".."`, file("a/../b", ""), nil},
		{"NUL", file("a\x00b", ""), nil},
		{"component", file(strings.Repeat("n", MaxName+1), ""), nil},
		{"path too long", file(strings.Repeat("nnn/", MaxPath/4)+"nnnnn", ""), nil},
		{"path too long", file(strings.Repeat("n", 1<<20), ""), nil},
		{"too deep", file(deep+"x", ""), nil},
		{"root is no directory", file("/", ""), nil},
		{"root is no directory", symlink(".", "x"), nil},
		{"root is no directory", hardlink("./", "x"), nil},
		{"whiteout of nothing", file(".wh.", ""), nil},
		{"whiteout of nothing", file(".wh..", ""), nil},
		{"whiteout of nothing", file("a/.wh...", ""), nil},
		{"size", with(file("a", ""), func(e *Entry) { e.Size = -1 }), nil},
		{"size", with(file("a", ""), func(e *Entry) { e.Size = math.MaxInt64 }), nil},
		{"together", with(file("b", ""), func(e *Entry) { e.Size, e.Content = MaxSize, nil }), []*Entry{file("a", "x")}},
		{"owner", with(file("a", ""), func(e *Entry) { e.UID = 1 << 32 }), nil},
		{"owner", with(file("a", ""), func(e *Entry) { e.GID = -1 }), nil},
		{"nanoseconds", with(file("a", ""), func(e *Entry) { e.MtimeNsec = 1e9 }), nil},
		{"device", with(file("a", ""), func(e *Entry) { e.Type, e.Major = typeChar, 4096 }), nil},
		{"device", with(file("a", ""), func(e *Entry) { e.Type, e.Minor = typeBlock, -1 }), nil},
		{"type", with(file("a", ""), func(e *Entry) { e.Type = 'x' }), nil},
		{"to nothing", symlink("a", ""), nil},
		{"too long", symlink("a", strings.Repeat("x", MaxTarget+1)), nil},
		{"NUL", symlink("a", "x\x00"), nil},
		{"itself", hardlink("a", "./a"), nil},
		{"itself", hardlink("usr/a", "l/a"), []*Entry{symlink("l", "usr")}},
		{"to a directory", hardlink("a", "/"), nil},
		{"to a directory", hardlink("a", "d"), []*Entry{dir("d")}},
		{`".."`, hardlink("a", "../b"), nil},
		{"no directory", file("a/b", ""), []*Entry{file("a", "")}},
		{"no directory", file("a/b", ""), []*Entry{hardlink("a", "below")}},
		{"too many symbolic links", file("a/b", ""), []*Entry{symlink("a", "b"), symlink("b", "a")}},
		{"too many symbolic links", hardlink("x", "a/b"), []*Entry{symlink("a", "a")}},
		{"name of an extended", with(file("a", ""), func(e *Entry) { e.Xattrs = map[string]string{"": "x"} }), nil},
		{"attribute too large", with(file("a", ""), func(e *Entry) { e.Xattrs = map[string]string{"user.a": strings.Repeat("x", MaxXattrValue+1)} }), nil},
		{"begin at 0", with(file("a", "x"), func(e *Entry) { e.Content.Chunks[0].Off = 1 }), nil},
		{"begin at 0", with(file("a", "x"), func(e *Entry) { e.Content.Chunks = nil }), nil},
		{"follow", with(file("a", "x"), func(e *Entry) { e.Content.Chunks = append(e.Content.Chunks, Chunk{Off: 1}) }), nil},
		{"chunk too large", with(file("a", "x"), func(e *Entry) { e.Size = 1 << 33 }), nil},
		{"out of range", with(file("a", "x"), func(e *Entry) { e.Content.Chunks[0].BlobOff = -1 }), nil},
		{"out of range", with(file("a", "x"), func(e *Entry) { e.Content.Chunks[0].BlobLen = math.MaxInt64 }), nil},
		{"empty file", with(file("a", "x"), func(e *Entry) { e.Size = 0 }), nil},
		{"two sizes", with(file("b", "x"), func(e *Entry) { e.Size = 2 }), []*Entry{file("a", "x")}},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			b := build(t, tt.before...)
			id, err := b.Add(tt.entry)
			var e *EntryError
			if !errors.As(err, &e) || !strings.Contains(e.Reason, tt.reason) || !errors.Is(err, iofs.ErrInvalid) {
				t.Fatalf("Add(%.40q) = %v, %v, want EntryError %q", tt.entry.Name, id, err, tt.reason)
			}
			if len(err.Error()) > 2000 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			if tt.reason != "two sizes" { // there the file is in, without its content
				sameLayer(t, b, openIndex(t, writeIndex(t, b)))
			}
		})
	}
}

func TestBuilderAttributes(t *testing.T) {
	x := index(t,
		&Entry{Name: "dev", Type: typeBlock, Mode: 0o170660, UID: maxID, GID: 7, Major: 0xabc, Minor: 0x12345, Mtime: -5, MtimeNsec: 999999999, Size: 9},
		&Entry{Name: "d/fifo", Type: typeFifo, Mode: 0o4755, Mtime: math.MinInt64},
		&Entry{Name: "x", Type: 'S', Mode: 0o1777, Xattrs: map[string]string{"user.b": "2", "security.capability": "\x00\x01", "user.a": ""}},
		&Entry{Name: "y", Type: 0, Xattrs: map[string]string{"user.a": "", "user.b": "2", "security.capability": "\x00\x01"}},
	)
	attr := func(id ID) (a Attr) { must(t, x.Attr(id, &a)); return a }
	for _, tt := range []struct{ got, want Attr }{
		{attr(FileID(0)), Attr{Mode: modeBlock | 0o660, UID: maxID, GID: 7, Rdev: 0x123abc45, Mtime: -5, MtimeNsec: 999999999, Nlink: 1}},
		{attr(FileID(1)), Attr{Mode: modeFifo | 0o4755, Mtime: math.MinInt64, Nlink: 1}},
		{attr(FileID(2)), Attr{Mode: modeReg | 0o1777, Nlink: 1}},
		{attr(DirID(1)), Attr{Mode: modeDir | 0o755, Mtime: math.MinInt64, Nlink: 2, Implicit: true}},
		{attr(RootID), Attr{Mode: modeDir | 0o755, Mtime: math.MinInt64, Nlink: 3, Implicit: true}},
	} {
		if tt.got != tt.want {
			t.Errorf("Attr() = %+v, want %+v", tt.got, tt.want)
		}
	}
	if v, ok, err := x.Xattr(FileID(3), "security.capability"); v != "\x00\x01" || !ok || err != nil {
		t.Errorf("Xattr() = %q, %v, %v", v, ok, err)
	}
	if got := strings.Join(x.XattrNameSet(), " "); got != "security.capability user.a user.b" {
		t.Errorf("XattrNameSet() = %q", got)
	}
	one := index(t, &Entry{Name: "x", Xattrs: map[string]string{"user.b": "2", "security.capability": "\x00\x01", "user.a": ""}})
	if a, b := x.s.len(secXattrs), one.s.len(secXattrs); a != b {
		t.Errorf("two equal sets take %d bytes, one %d", a, b)
	}
}

func TestBuilderContents(t *testing.T) {
	b := newBuilder(t)
	add := func(e *Entry) (ID, *Content) {
		c := e.Content
		e.Content = nil
		id, err := b.Add(e)
		must(t, err)
		return id, c
	}
	big, bigC := add(file("big", "0123456789"))
	if c, err := b.Content(big); err != nil || c.PackOff != -1 || c.Size != 10 {
		t.Errorf("Content() = %+v, %v before it began", c, err)
	}
	off, err := b.BeginContent(big)
	if off != 0 || err != nil {
		t.Errorf("BeginContent() = %d, %v", off, err)
	}
	small, smallC := add(file("small", "abc"))
	if off, dup, err := b.SetContent(small, *smallC); off != 10 || dup || err != nil {
		t.Errorf("SetContent(small) = %d, %v, %v, want 10", off, dup, err)
	}
	bigC.Chunks = []Chunk{{Digest: Digest{1}}, {Off: 4, Digest: Digest{2}}}
	changed := b.Changed()
	if off, dup, err := b.SetContent(big, *bigC); off != 0 || dup || err != nil {
		t.Errorf("SetContent(big) = %d, %v, %v, want 0", off, dup, err)
	}
	select {
	case <-changed:
	default:
		t.Error("SetContent does not close Changed()")
	}
	if _, _, err := b.SetContent(big, *bigC); !errors.Is(err, iofs.ErrInvalid) {
		t.Errorf("second SetContent() = %v", err)
	}
	again, againC := add(file("again", "abc"))
	if off, err := b.BeginContent(again); off != 13 || err != nil {
		t.Errorf("BeginContent(again) = %d, %v, want 13", off, err)
	}
	if off, dup, err := b.SetContent(again, *againC); off != 10 || !dup || err != nil {
		t.Errorf("SetContent(again) = %d, %v, %v, want 10, dup", off, dup, err)
	}
	gone, _ := add(file("gone", "gone"))
	if _, err := b.BeginContent(gone); err != nil {
		t.Error(err)
	}
	empty, emptyC := add(file("gone", ""))
	if off, dup, err := b.SetContent(empty, *emptyC); off != 0 || dup || err != nil {
		t.Errorf("SetContent(empty) = %d, %v, %v", off, dup, err)
	}
	if off, dup, err := b.SetContent(NoID, *emptyC); off != 0 || dup || err != nil {
		t.Errorf("SetContent(NoID) = %d, %v, %v", off, dup, err)
	}
	x := openIndex(t, writeIndex(t, b))
	sameLayer(t, b, x)
	if s := x.Stats(); s.PackSize != 20 || s.Expanded != 16 || s.Contents != 4 || s.Chunks != 3 {
		t.Errorf("Stats() = %+v", s)
	}
	c, err := x.Content(big)
	if err != nil || c.NChunks != 2 {
		t.Fatalf("Content(big) = %+v, %v", c, err)
	}
	if k, n, err := x.Chunk(c.FirstChunk + 1); k != (Chunk{Off: 4, Digest: Digest{2}}) || n != 6 || err != nil {
		t.Errorf("Chunk() = %+v, %d, %v", k, n, err)
	}
	if n, err := x.ContentNumber(again); n != 1 || err != nil {
		t.Errorf("ContentNumber(again) = %d, %v, want that of small", n, err)
	}
	if n, err := x.ContentNumber(empty); n != NoContent || err != nil {
		t.Errorf("ContentNumber(empty) = %d, %v", n, err)
	}
}

func TestBuilderNeedsContents(t *testing.T) {
	b := build(t, &Entry{Name: "a", Type: typeReg, Size: 1})
	f, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	defer f.Close()
	if err := b.Write(f, Meta{}); !errors.Is(err, iofs.ErrInvalid) {
		t.Errorf("Write() = %v, want an EntryError", err)
	}
}

func TestBuilderEnds(t *testing.T) {
	failure := errors.New("cut off")
	b := newBuilder(t)
	changed := b.Changed()
	b.Fail(failure)
	b.Fail(errors.New("second"))
	<-changed
	<-b.Changed()
	if _, err := b.Add(file("a", "")); err != failure || b.Err() != failure {
		t.Errorf("Add() = %v, Err() = %v after Fail", err, b.Err())
	}
	if b.Complete(); b.Done() {
		t.Error("done after Fail")
	}
	if err := b.Write(nil, Meta{}); err != failure {
		t.Errorf("Write() = %v after Fail", err)
	}
	b = build(t, file("a", ""))
	b.Complete()
	if _, err := b.Add(file("b", "")); !errors.Is(err, iofs.ErrInvalid) || !b.Done() {
		t.Errorf("Add() = %v after Complete", err)
	}
	must(t, b.Close())
	must(t, b.Close())
	<-b.Changed()
	if _, err := b.Lookup(RootID, "a"); !errors.Is(err, iofs.ErrClosed) {
		t.Errorf("Lookup() = %v after Close", err)
	}
	if _, err := b.Add(file("b", "")); !errors.Is(err, iofs.ErrClosed) {
		t.Errorf("Add() = %v after Close", err)
	}
	if _, err := b.Content(FileID(0)); !errors.Is(err, iofs.ErrClosed) {
		t.Errorf("Content() = %v after Close", err)
	}
}

func TestBuilderReplaced(t *testing.T) {
	for _, tt := range []struct {
		entries []*Entry
		want    int
	}{
		{[]*Entry{dir("a"), file("a/b", ""), whiteout("a"), hardlink("c", "a/b"), hardlink("c", "a/b")}, 0},
		{[]*Entry{file("a/b", ""), dir("a")}, 0}, // what is implicit was never final
		{[]*Entry{dir("a"), dir("a")}, 1},
		{[]*Entry{file("a", ""), file("a", "")}, 1},
		{[]*Entry{file("a/b/c", ""), file("a", "")}, 3},
		{[]*Entry{hardlink("a", "x"), hardlink("a", "y")}, 1},
	} {
		if got := build(t, tt.entries...).Replaced(); got != tt.want {
			t.Errorf("Replaced() = %d, want %d", got, tt.want)
		}
	}
}
