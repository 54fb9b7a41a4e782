package unionfs

import (
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// memLayer is a layer made from words: "d/" a directory, "f" a file, "l->t" a
// symbolic link, "h=>t" a hard link, "d/.wh.x" a whiteout, "d/.wh..wh..opq" an
// opaque directory. Missing parents are implicit.
type memLayer struct {
	dirs     []*memDir
	files    []memFile
	names    []string // of all directories, filled in by finish
	childs   []Child
	done     bool
	replaced bool // a name has got another inode
	visits   int  // Children calls
	lookups  int
}

type memDir struct {
	parent   ID
	name     string
	implicit bool
	opaque   bool
	kids     map[string]Child
	first    uint32
}

type memFile struct {
	target string // of a symbolic link
	nlink  uint32
}

func newMemLayer() *memLayer {
	return &memLayer{dirs: []*memDir{{parent: RootID, kids: map[string]Child{}}}}
}

func mem(words string) *memLayer {
	l := newMemLayer()
	for _, w := range strings.Fields(words) {
		l.add(w)
	}
	l.finish()
	return l
}

func (l *memLayer) d(id ID) *memDir { return l.dirs[id.Index()] }

func (l *memLayer) subdir(dir ID, name string) ID {
	c := l.d(dir).kids[name]
	if c.Kind == ChildInode && c.ID.IsDir() {
		return c.ID
	}
	l.replaced = l.replaced || c.Kind == ChildInode || c.Kind == ChildLink
	id := DirID(uint32(len(l.dirs)))
	l.dirs = append(l.dirs, &memDir{parent: dir, name: name, implicit: true, opaque: c.Kind == ChildWhiteout, kids: map[string]Child{}})
	l.d(dir).kids[name] = Child{Kind: ChildInode, ID: id}
	return id
}

func (l *memLayer) find(path string) (dir ID, base string, ok bool) {
	parts := strings.Split(path, "/")
	dir = RootID
	for _, p := range parts[:len(parts)-1] {
		c := l.d(dir).kids[p]
		if c.Kind != ChildInode || !c.ID.IsDir() {
			return 0, "", false
		}
		dir = c.ID
	}
	return dir, parts[len(parts)-1], true
}

// add adds one word, as a Builder does with an entry.
func (l *memLayer) add(word string) {
	word, target, symlink := strings.Cut(word, "->")
	var link bool
	if !symlink {
		word, target, link = strings.Cut(word, "=>")
	}
	isDir := strings.HasSuffix(word, "/")
	parts := strings.Split(strings.TrimSuffix(word, "/"), "/")
	dir, name := RootID, parts[len(parts)-1]
	for _, p := range parts[:len(parts)-1] {
		dir = l.subdir(dir, p)
	}
	d := l.d(dir)
	if name == ".wh..wh..opq" {
		d.opaque = true
		return
	}
	old := d.kids[strings.TrimPrefix(name, ".wh.")]
	if white, ok := strings.CutPrefix(name, ".wh."); ok {
		if old.Kind == ChildNone {
			d.kids[white] = Child{Kind: ChildWhiteout}
		} else if old.Kind == ChildInode && old.ID.IsDir() {
			l.d(old.ID).opaque = true
		}
		return
	}
	if isDir {
		l.d(l.subdir(dir, name)).implicit = false
		return
	}
	l.replaced = l.replaced || old.Kind == ChildInode || old.Kind == ChildLink
	c := Child{Kind: ChildInode, ID: FileID(uint32(len(l.files)))}
	if link {
		if td, base, ok := l.find(target); ok {
			if t := l.d(td).kids[base]; t.Kind == ChildInode && !t.ID.IsDir() {
				d.kids[name] = t
				l.files[t.ID.Index()].nlink++
				return
			}
		}
		d.kids[name] = Child{Kind: ChildLink, Target: target}
		return
	}
	l.files = append(l.files, memFile{target, 1})
	d.kids[name] = c
}

func (l *memLayer) finish() {
	for _, d := range l.dirs {
		d.first = uint32(len(l.names))
		for _, name := range slices.Sorted(maps.Keys(d.kids)) {
			l.names = append(l.names, name)
			l.childs = append(l.childs, d.kids[name])
		}
	}
	l.done = true
}

func (l *memLayer) Lookup(dir ID, name string) (Child, error) {
	l.lookups++
	return l.d(dir).kids[name], nil
}
func (l *memLayer) Opaque(dir ID) (bool, error)       { return l.d(dir).opaque, nil }
func (l *memLayer) Parent(dir ID) (ID, string, error) { return l.d(dir).parent, l.d(dir).name, nil }
func (l *memLayer) Readlink(id ID) (string, error)    { return l.files[id.Index()].target, nil }
func (l *memLayer) XattrNames(ID) ([]string, error)   { return nil, nil }
func (l *memLayer) Content(ID) (ContentInfo, error)   { return ContentInfo{}, nil }
func (l *memLayer) Done() bool                        { return l.done }
func (l *memLayer) Meta() Meta                        { return Meta{} }
func (l *memLayer) Stats() Stats {
	return Stats{Dirs: uint32(len(l.dirs)), Files: uint32(len(l.files)), Names: uint32(len(l.names))}
}

func (l *memLayer) Xattr(ID, string) (string, bool, error) { return "", false, nil }

func (l *memLayer) HasImplicit() bool {
	return slices.ContainsFunc(l.dirs, func(d *memDir) bool { return d.implicit })
}

func (l *memLayer) Attr(id ID, a *Attr) error {
	*a = Attr{Mtime: int64(id)}
	if id.IsDir() {
		d := l.d(id)
		a.Mode, a.Nlink, a.Implicit = unix.S_IFDIR|0o755, 2, d.implicit
		for _, c := range d.kids {
			if c.Kind == ChildInode && c.ID.IsDir() {
				a.Nlink++
			}
		}
		return nil
	}
	f := l.files[id.Index()]
	a.Mode, a.Nlink, a.Size = unix.S_IFREG|0o644, f.nlink, int64(len(f.target))
	if f.target != "" {
		a.Mode = unix.S_IFLNK | 0o777
	}
	return nil
}

func (l *memLayer) Children(dir ID) (first, n uint32, err error) {
	l.visits++
	d := l.d(dir)
	return d.first, uint32(len(d.kids)), nil
}

func (l *memLayer) ChildAt(i uint32) (string, Child, error) {
	if i >= uint32(len(l.names)) {
		return "", Child{}, fmt.Errorf("name %d: %w", i, fs.ErrNotExist)
	}
	return l.names[i], l.childs[i], nil
}

func (l *memLayer) LinkDirs() ([]ID, error) {
	var ids []ID
	for i, d := range l.dirs {
		for _, c := range d.kids {
			if c.Kind == ChildLink && l.reachable(DirID(uint32(i))) {
				ids = append(ids, DirID(uint32(i)))
				break
			}
		}
	}
	return ids, nil
}

// reachable is false for a directory that a later entry replaced.
func (l *memLayer) reachable(id ID) bool {
	for id != RootID {
		d := l.d(id)
		if l.d(d.parent).kids[d.name] != (Child{Kind: ChildInode, ID: id}) {
			return false
		}
		id = d.parent
	}
	return true
}
