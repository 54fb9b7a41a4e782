package unionfs

import (
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A layer as a naive tree: what the Builder must come to, without its tables.

type modelNode struct {
	up               *modelNode
	name             string
	kids             map[string]*modelNode // of a directory
	implicit, opaque bool
	white            bool
	link             string // of a ChildLink
	file             *modelFile
	num              int
}

type modelFile struct {
	num, size, links int
	target           string
}

type model struct {
	root        *modelNode
	dirs, files int
}

func newModel() *model {
	return &model{root: &modelNode{kids: map[string]*modelNode{}, implicit: true}, dirs: 1}
}

// walk follows a path; missing is what it did not find, "?" where no path can be.
func (m *model) walk(p string, create bool) (at *modelNode, missing string) {
	at = m.root
	todo := strings.Split(p, "/")
	for hops := 0; len(todo) > 0; {
		c := todo[0]
		todo = todo[1:]
		if c == "" || c == "." {
			continue
		}
		if c == ".." {
			if at.up != nil {
				at = at.up
			}
			continue
		}
		k := at.kids[c]
		switch {
		case k == nil || k.white:
			if !create {
				return at, path.Join(append([]string{c}, todo...)...)
			}
			at = m.mkdir(at, c, true)
		case k.kids != nil:
			at = k
		case k.file != nil && k.file.target != "":
			if hops++; hops > MaxHops {
				return nil, "?"
			}
			if strings.HasPrefix(k.file.target, "/") {
				at = m.root
			}
			todo = append(strings.Split(k.file.target, "/"), todo...)
		default:
			return nil, "?"
		}
	}
	return at, ""
}

func (m *model) mkdir(at *modelNode, name string, implicit bool) *modelNode {
	old := at.kids[name]
	n := &modelNode{up: at, name: name, kids: map[string]*modelNode{}, implicit: implicit, opaque: old != nil, num: m.dirs}
	m.dirs++
	m.put(at, name, n)
	return n
}

func (m *model) put(at *modelNode, name string, n *modelNode) {
	if old := at.kids[name]; old != nil {
		m.drop(old)
	}
	at.kids[name] = n
}

func (m *model) drop(n *modelNode) {
	if n.file != nil {
		n.file.links--
	}
	for _, k := range n.kids {
		m.drop(k)
	}
}

func (n *modelNode) path() string {
	if n.up == nil {
		return ""
	}
	return path.Join(n.up.path(), n.name)
}

// add reports whether the entry is taken.
func (m *model) add(e *Entry) bool {
	if slices.Contains(strings.Split(e.Name, "/"), "..") ||
		e.Type == typeLink && slices.Contains(strings.Split(e.Linkname, "/"), "..") || e.Type == typeSymlink && e.Linkname == "" {
		return false
	}
	p := strings.TrimPrefix(path.Clean("/"+e.Name), "/")
	if p == "" {
		m.root.implicit = m.root.implicit && e.Type != typeDir
		return e.Type == typeDir
	}
	parent, base := path.Split(p)
	for _, c := range strings.Split(p, "/") {
		if strings.HasPrefix(c, ".wh..wh.") && (c != ".wh..wh..opq" || strings.HasPrefix(parent, c+"/") || strings.Contains(parent, "/"+c+"/")) {
			return true
		}
	}
	white := strings.HasPrefix(base, ".wh.")
	var to *modelNode
	if e.Type == typeLink && !white {
		if to = m.linkTo(p, strings.TrimPrefix(path.Clean("/"+e.Linkname), "/")); to == nil {
			return false
		}
	}
	at, missing := m.walk(parent, true)
	if missing != "" {
		return false
	}
	old := at.kids[base]
	switch {
	case base == ".wh..wh..opq":
		at.opaque = true
	case white:
		name := base[4:]
		if name == "" || name == "." || name == ".." {
			return false
		}
		if old = at.kids[name]; old == nil {
			at.kids[name] = &modelNode{white: true}
		} else if old.kids != nil {
			old.opaque = true
		}
	case e.Type == typeDir:
		if old != nil && old.kids != nil {
			old.implicit = false
		} else {
			m.mkdir(at, base, false)
		}
	case to != nil && to.file != nil:
		if old == nil || old.file != to.file {
			to.file.links++
			m.put(at, base, &modelNode{file: to.file})
		}
	case to != nil:
		if path.Join(at.path(), base) == to.link {
			return false
		}
		m.put(at, base, &modelNode{link: to.link})
	default:
		f := &modelFile{num: m.files, size: int(e.Size), links: 1}
		if e.Type == typeSymlink {
			f.target, f.size = e.Linkname, len(e.Linkname)
		}
		m.files++
		m.put(at, base, &modelNode{file: f})
	}
	return true
}

// linkTo finds the target of a hard link from p: nil when it is refused.
func (m *model) linkTo(p, target string) *modelNode {
	if target == p || target == "" {
		return nil
	}
	dir, base := path.Split(target)
	at, missing := m.walk(dir, false)
	if missing == "?" {
		return nil
	}
	if k := at.kids[base]; missing == "" && k != nil && !k.white {
		if k.kids != nil {
			return nil
		}
		return k
	}
	t := strings.TrimPrefix(path.Join("/", at.path(), missing, base), "/")
	if t == "" {
		return nil
	}
	return &modelNode{link: t}
}

// dump lists the model as dump does an index.
func (m *model) dump() string {
	var b strings.Builder
	m.dumpDir(&b, m.root, "")
	return b.String()
}

func (m *model) dumpDir(b *strings.Builder, n *modelNode, p string) {
	var names []string
	links := 2
	for name, k := range n.kids {
		names = append(names, name)
		if k.kids != nil {
			links++
		}
	}
	slices.Sort(names)
	fmt.Fprintf(b, "%s/ d%d n%d", p, n.num, links)
	if n.implicit {
		b.WriteString(" implicit")
	}
	if n.opaque {
		b.WriteString(" opaque")
	}
	b.WriteString("\n")
	for _, name := range names {
		k, q := n.kids[name], strings.TrimPrefix(p+"/"+name, "/")
		switch {
		case k.white:
			fmt.Fprintf(b, "-%s\n", q)
		case k.link != "":
			fmt.Fprintf(b, "%s => %s\n", q, k.link)
		case k.kids != nil:
			m.dumpDir(b, k, q)
		default:
			fmt.Fprintf(b, "%s f%d n%d s%d", q, k.file.num, k.file.links, k.file.size)
			if k.file.target != "" {
				fmt.Fprintf(b, " -> %s", k.file.target)
			}
			b.WriteString("\n")
		}
	}
}

// entriesFrom makes entries of few names from bytes, so that they meet often.
func entriesFrom(data []byte) (entries []*Entry) {
	names := []string{"a", "b", "c", "d", "a", "b", "c", "/", ".", "..", "\xff\xfe", ".wh.a", ".wh.b", ".wh..wh..opq", ".wh..wh.x", ".wh."}
	next := func() int {
		if len(data) == 0 {
			return 0
		}
		n := int(data[0])
		data = data[1:]
		return n
	}
	some := func() string {
		n := next()
		p := names[n%16]
		for range n >> 4 & 3 {
			p += "/" + names[next()%16]
		}
		if n&0x80 != 0 {
			p = "/" + p
		}
		return p
	}
	for len(data) > 0 && len(entries) < 200 {
		op := next()
		switch name := some(); op % 8 {
		case 0, 1:
			entries = append(entries, dir(name))
		case 2:
			entries = append(entries, symlink(name, some()))
		case 3:
			entries = append(entries, symlink(name, "../"+some()))
		case 4, 5:
			entries = append(entries, hardlink(name, some()))
		default:
			e := file(name, strings.Repeat("x", op>>4))
			if op&8 != 0 {
				e.Xattrs = map[string]string{"user.x": name, "user.y": "y"}
			}
			entries = append(entries, e)
		}
	}
	return entries
}

// checkBuild builds entries, and compares the Builder with the model and with
// the Index that it writes.
func checkBuild(t *testing.T, entries []*Entry) {
	b, m := newBuilder(t), newModel()
	for _, e := range entries {
		_, err := b.Add(e)
		var refused *EntryError
		if err != nil && !errors.As(err, &refused) {
			t.Fatalf("Add(%q) = %v", e.Name, err)
		}
		if want := m.add(e); want != (err == nil) {
			t.Fatalf("Add(%+v) = %v, model: taken %v", e, err, want)
		}
	}
	x := openIndex(t, writeIndex(t, b))
	sameLayer(t, b, x)
	if got, want := dump(t, x), m.dump(); got != want {
		t.Fatalf("got:\n%swant:\n%s", got, want)
	}
	x.Close()
	b.Close()
}

func FuzzBuilder(f *testing.F) {
	f.Add([]byte("\x00\x10\x01\x06\x20\x00\x01\x02\x04\x03\x10\x00\x01"))
	f.Fuzz(func(t *testing.T, data []byte) { checkBuild(t, entriesFrom(data)) })
}

func TestBuilderRandom(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		data := make([]byte, 4+rnd.IntN(150))
		for i := range data {
			data[i] = byte(rnd.Uint32())
		}
		checkBuild(t, entriesFrom(data))
	}
}

// reseal makes the checksums of damaged bytes right again, as far as the header
// still says where they are.
func reseal(data []byte) {
	if len(data) < sectionHeader {
		return
	}
	body := uint64(get64(data, headData))
	blocks := (body + sectionBlock - 1) / sectionBlock
	if body <= uint64(len(data)) && sectionHeader+body+4*blocks == uint64(len(data)) {
		sums := data[sectionHeader+body:]
		for i := range blocks {
			end := min((i+1)*sectionBlock, body)
			put32(sums, int(4*i), crc32.Checksum(data[sectionHeader+i*sectionBlock:sectionHeader+end], castagnoli))
		}
		put32(data, headTableCRC, crc32.Checksum(sums, castagnoli))
	}
	sealHeader(data[:sectionHeader])
}

// FuzzOpen opens files whose checksums are right and whose contents are not:
// nothing may panic, loop for ever or fail but by ErrDamaged.
func FuzzOpen(f *testing.F) {
	good, err := os.ReadFile(writeIndex(f, build(f, someLayer()...)))
	must(f, err)
	f.Add(good, true)
	f.Add(good[:100], false)
	f.Add([]byte(indexMagic), false)
	for _, at := range []int{headData, headSections, headSections + 8, headMeta + metaDirs, sectionHeader, sectionHeader + dirFirst, sectionHeader + dirParent} {
		bad := slices.Clone(good)
		put32(bad, at, 0xfffffff0)
		f.Add(bad, true)
	}
	f.Fuzz(func(t *testing.T, data []byte, seal bool) {
		if seal {
			reseal(data)
		}
		checkOpen(t, filepath.Join(t.TempDir(), "x"), data)
	})
}

func checkOpen(t *testing.T, path string, data []byte) {
	must(t, os.WriteFile(path, data, 0o600))
	x, err := Open(path)
	if err != nil {
		if !errors.Is(err, ErrDamaged) {
			t.Fatalf("Open() = %v", err)
		}
		return
	}
	defer x.Close()
	answers(t, x)
	x.XattrNameSet()
	if err := x.Verify(); err != nil && !errors.Is(err, ErrDamaged) {
		t.Fatalf("Verify() = %v", err)
	}
}

// TestOpenRandom changes random fields of an index and makes the checksums right.
func TestOpenRandom(t *testing.T) {
	good, err := os.ReadFile(writeIndex(t, build(t, someLayer()...)))
	must(t, err)
	rnd := rand.New(rand.NewPCG(3, 4))
	values := []uint32{0, 1, 7, 0xff, 0x7fffffff, 0x80000000, 0x80000001, 0xfffffff0, 0xffffffff}
	path := filepath.Join(t.TempDir(), "x")
	for range 5000 {
		bad := slices.Clone(good)
		for range 1 + rnd.IntN(3) {
			at := rnd.IntN(len(bad) - 4)
			if rnd.IntN(4) == 0 {
				at = rnd.IntN(headMeta + metaLen)
			}
			put32(bad, at, values[rnd.IntN(len(values))])
		}
		reseal(bad)
		checkOpen(t, path, bad)
	}
}
