package unionfs

import (
	"path"
	"strings"
)

// addition is an entry that was cleaned and checked.
type addition struct {
	path   string // cleaned
	typ    byte   // one of tar's types; each kind of regular file is '0'
	attr   Attr   // Nlink 1
	target string // of a symbolic link as it is, of a hard link cleaned
	xattrs xattrSet
}

// Add adds one entry and returns the number of its inode, which is final. For a
// whiteout, an opaque mark, a hard link to a file that the layer does not have,
// and names that layers ignore (those that begin with ".wh..wh.") it returns
// NoID. The inode of a hard link is that of its target.
//
// A later entry of the same name wins: a directory over a directory keeps its
// number and what is in it and takes the new attributes; any other pair gives
// the name a new inode. Parents that are missing become implicit directories;
// those that are symbolic links in this layer are followed inside it.
//
// The error is an [EntryError] when the entry is refused, io/fs.ErrClosed, the
// layer's own error after Fail, or that of the scratch file's disk.
func (b *Builder) Add(e *Entry) (ID, error) {
	a, err := prepare(e)
	if err != nil {
		return NoID, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.writable(); err != nil {
		return NoID, err
	}
	if b.done {
		return NoID, &EntryError{Name: e.Name, Reason: "the layer is complete"}
	}
	defer b.bell.ring()
	id, err := b.add(a)
	if err == nil && id != NoID && e.Content != nil && a.typ == typeReg {
		_, _, err = b.setContent(id, *e.Content)
	}
	if r, ok := err.(refusal); ok {
		err = &EntryError{Name: e.Name, Reason: string(r)}
	}
	return id, err
}

// writable tells why nothing can be added. The lock is held.
func (b *Builder) writable() error {
	if b.closed {
		return errClosed
	}
	return b.bell.failure()
}

// refusal is the reason of an EntryError to be.
type refusal string

func (r refusal) Error() string { return string(r) }

func (b *Builder) add(a *addition) (ID, error) {
	if a.path == "" {
		if a.typ != typeDir {
			return NoID, refusal("the root is no directory")
		}
		return RootID, b.updateDir(0, a)
	}
	dirPath, base := splitBase(a.path)
	if ignored(dirPath) || strings.HasPrefix(base, whiteoutMeta) && base != opaqueName {
		return NoID, nil
	}
	var link Child
	if a.typ == typeLink && !strings.HasPrefix(base, whiteoutMark) {
		var err error
		if link, err = b.linkTarget(a); err != nil {
			return NoID, err
		}
	}
	at, err := b.walk(dirPath, true)
	if err != nil {
		return NoID, err
	}
	if base == opaqueName {
		b.dirs.at(at.dir, dirSize)[inoFlags] |= flagOpaque
		return NoID, nil
	}
	if name, ok := strings.CutPrefix(base, whiteoutMark); ok {
		if name == "" || name == "." || name == ".." {
			return NoID, refusal("whiteout of nothing")
		}
		return NoID, b.putWhiteout(at.dir, name)
	}
	switch a.typ {
	case typeDir:
		return b.putDir(at.dir, base, a)
	case typeLink:
		return b.putLink(at.dir, base, link)
	}
	return b.putFile(at.dir, base, a)
}

// ignored reports whether a directory on the way is one that layers ignore.
func ignored(dir string) bool {
	return strings.HasPrefix(dir, whiteoutMeta) || strings.Contains(dir, "/"+whiteoutMeta)
}

// position is where a walk has come to.
type position struct {
	dir   uint32
	depth int
	rest  string // what it did not find, when it may not make directories
}

// walk follows a cleaned path from the root, through symbolic links of this
// layer as if its root were the root of everything. Directories that are missing
// are made, when create is set, as implicit ones.
func (b *Builder) walk(p string, create bool) (position, error) {
	var at position
	for hops, followed := 0, 0; p != ""; {
		var c string
		c, p = splitPath(p)
		switch c {
		case "", ".":
			continue
		case "..":
			if at.dir != 0 {
				at.dir = get32(b.dirs.at(at.dir, dirSize), dirParent)
				at.depth--
			}
			continue
		}
		n := b.find(at.dir, c)
		child := Child{}
		if n != 0 {
			child = b.child(b.nodes.at(n-1, nodeSize))
		}
		switch {
		case child.Kind == ChildNone || child.Kind == ChildWhiteout:
			if !create {
				at.rest = path.Join(c, p)
				return at, nil
			}
			if len(c) > MaxName {
				return at, refusal("component of a symbolic link on the way too long")
			}
			id, err := b.newDir(at.dir, c, nil)
			if err != nil {
				return at, err
			}
			at.dir = id.Index()
		case child.Kind == ChildInode && child.ID.IsDir():
			at.dir = child.ID.Index()
		default:
			target := b.linkOnTheWay(child)
			if target == "" {
				return at, refusal("a parent is no directory")
			}
			hops, followed = hops+1, followed+len(target)
			if hops > MaxHops || followed > maxFollowed {
				return at, refusal("too many symbolic links on the way")
			}
			if target[0] == '/' {
				at = position{}
			}
			p = target + "/" + p
			continue
		}
		if at.depth++; at.depth > MaxDepth {
			return at, refusal("too deep")
		}
	}
	return at, nil
}

// linkOnTheWay is the target of a child that is a symbolic link, else "".
func (b *Builder) linkOnTheWay(c Child) string {
	if c.Kind != ChildInode {
		return ""
	}
	r := b.files.at(c.ID.Index(), fileSize)
	if get16(r, inoMode)&modeType != modeLink {
		return ""
	}
	return string(b.target(r))
}

// linkTarget finds what a hard link is to: an inode of this layer, or a path of
// a lower one.
func (b *Builder) linkTarget(a *addition) (Child, error) {
	if a.target == "" {
		return Child{}, refusal("hard link to a directory")
	}
	if a.target == a.path {
		return Child{}, refusal("hard link to itself")
	}
	dir, base := splitBase(a.target)
	at, err := b.walk(dir, false)
	if err != nil {
		return Child{}, err
	}
	if at.rest == "" {
		if n := b.find(at.dir, base); n != 0 {
			switch c := b.child(b.nodes.at(n-1, nodeSize)); {
			case c.Kind == ChildInode && c.ID.IsDir():
				return Child{}, refusal("hard link to a directory")
			case c.Kind != ChildWhiteout:
				return c, nil
			}
		}
	}
	t := strings.TrimPrefix(path.Join("/", b.pathOf(at.dir), at.rest, base), "/")
	if len(t) > MaxPath {
		return Child{}, refusal("target of the link too long")
	}
	if t == "" {
		return Child{}, refusal("hard link to a directory")
	}
	return Child{Kind: ChildLink, Target: t}, nil
}

// pathOf is the path of a directory of the layer.
func (b *Builder) pathOf(dir uint32) string {
	p := ""
	for dir != 0 {
		r := b.dirs.at(dir, dirSize)
		p = path.Join(string(b.name(get32(r, dirName), uint32(r[inoNameLen]))), p)
		dir = get32(r, dirParent)
	}
	return p
}

// put makes the name a child of the given kind, whatever it was before. hid
// reports whether it was something that hides lower layers: a whiteout or
// anything that is no directory.
func (b *Builder) put(dir uint32, name string, c Child) (hid bool, err error) {
	id := uint32(c.ID)
	if c.Kind == ChildLink {
		off, err := b.addName(string([]byte{byte(len(c.Target)), byte(len(c.Target) >> 8)}) + c.Target)
		if err != nil {
			return false, err
		}
		id = off
	}
	n := b.find(dir, name)
	if n == 0 {
		if n, err = b.newNode(dir, name); err != nil {
			return false, err
		}
	} else {
		old := b.child(b.nodes.at(n-1, nodeSize))
		hid = old.Kind != ChildInode || !old.ID.IsDir()
		b.supersede(dir, old)
	}
	r := b.nodes.at(n-1, nodeSize)
	r[childKind] = byte(c.Kind)
	put32(r, childID, id)
	return hid, nil
}

func (b *Builder) putWhiteout(dir uint32, name string) error {
	n := b.find(dir, name)
	if n == 0 {
		_, err := b.put(dir, name, Child{Kind: ChildWhiteout})
		return err
	}
	if c := b.child(b.nodes.at(n-1, nodeSize)); c.Kind == ChildInode && c.ID.IsDir() {
		b.dirs.at(c.ID.Index(), dirSize)[inoFlags] |= flagOpaque
	}
	return nil
}

func (b *Builder) putDir(dir uint32, name string, a *addition) (ID, error) {
	if n := b.find(dir, name); n != 0 {
		if c := b.child(b.nodes.at(n-1, nodeSize)); c.Kind == ChildInode && c.ID.IsDir() {
			return c.ID, b.updateDir(c.ID.Index(), a)
		}
	}
	return b.newDir(dir, name, a)
}

// updateDir gives a directory that is there the attributes of a later entry.
func (b *Builder) updateDir(i uint32, a *addition) error {
	set, err := b.addXattrs(&a.xattrs)
	if err != nil {
		return err
	}
	r := b.dirs.at(i, dirSize)
	switch {
	case r[inoFlags]&flagImplicit == 0:
		b.replaced++
	case i != 0:
		b.implicit--
	}
	r[inoFlags] &^= flagImplicit
	a.attr.Nlink = get32(r, inoNlink)
	putAttr(r, true, &a.attr)
	put32(r, inoXattrs, set)
	b.seen(&a.attr)
	return nil
}

// newDir makes a directory under a name that is none; an implicit one when a is nil.
func (b *Builder) newDir(dir uint32, name string, a *addition) (ID, error) {
	i := b.dirs.count(dirSize)
	if i > MaxEntries {
		return NoID, refusal("too many directories")
	}
	var set uint32
	if a != nil {
		var err error
		if set, err = b.addXattrs(&a.xattrs); err != nil {
			return NoID, err
		}
	}
	if err := b.dirs.reserve(dirSize); err != nil {
		return NoID, err
	}
	hid, err := b.put(dir, name, Child{Kind: ChildInode, ID: DirID(i)})
	if err != nil {
		return NoID, err
	}
	node := b.nodes.at(b.find(dir, name)-1, nodeSize)
	r, err := b.dirs.grow(dirSize)
	if err != nil {
		return NoID, err
	}
	attr, flags := &Attr{Mode: modeDir | 0o755, Mtime: b.earliest.sec, MtimeNsec: b.earliest.nsec}, byte(0)
	if a != nil {
		attr = &a.attr
		b.seen(attr)
	} else {
		flags = flagImplicit
		b.implicit++
	}
	if hid {
		flags |= flagOpaque
	}
	attr.Nlink = 2
	putAttr(r, true, attr)
	r[inoFlags], r[inoNameLen] = flags, node[childLen]
	put32(r, dirName, get32(node, childName))
	put32(r, dirParent, dir)
	put32(r, inoXattrs, set)
	up := b.dirs.at(dir, dirSize)
	put32(up, inoNlink, get32(up, inoNlink)+1)
	return DirID(i), nil
}

func (b *Builder) putFile(dir uint32, name string, a *addition) (ID, error) {
	i := b.files.count(fileSize)
	if i > MaxEntries {
		return NoID, refusal("too many files")
	}
	reg := a.typ == typeReg
	if reg && a.attr.Size > MaxSize-b.expanded {
		return NoID, refusal("files too large together")
	}
	set, err := b.addXattrs(&a.xattrs)
	if err != nil {
		return NoID, err
	}
	aux := uint32(none)
	if a.typ == typeSymlink {
		if aux, err = b.addName(a.target); err != nil {
			return NoID, err
		}
	}
	if err := b.files.reserve(fileSize); err != nil {
		return NoID, err
	}
	if _, err := b.put(dir, name, Child{Kind: ChildInode, ID: FileID(i)}); err != nil {
		return NoID, err
	}
	r, err := b.files.grow(fileSize)
	if err != nil {
		return NoID, err
	}
	if reg {
		b.expanded += a.attr.Size
	}
	putAttr(r, false, &a.attr)
	put32(r, inoXattrs, set)
	put32(r, fileAux, aux)
	b.seen(&a.attr)
	return FileID(i), nil
}

func (b *Builder) putLink(dir uint32, name string, to Child) (ID, error) {
	if to.Kind == ChildLink {
		if path.Join(b.pathOf(dir), name) == to.Target {
			return NoID, refusal("hard link to itself")
		}
		_, err := b.put(dir, name, to)
		return NoID, err
	}
	if n := b.find(dir, name); n != 0 {
		if c := b.child(b.nodes.at(n-1, nodeSize)); c.Kind == ChildInode && c.ID == to.ID {
			return to.ID, nil // the same file already
		}
	}
	b.link(to.ID, 1)
	if _, err := b.put(dir, name, to); err != nil {
		b.link(to.ID, -1)
		return NoID, err
	}
	return to.ID, nil
}

// link counts a name of a file more or less.
func (b *Builder) link(id ID, n int32) {
	r := b.files.at(id.Index(), fileSize)
	links := get32(r, inoNlink) + uint32(n)
	put32(r, inoNlink, links)
	if links == 0 && get16(r, inoMode)&modeType == modeReg {
		b.expanded -= get64(r, fileLen)
	}
}

// seen notes the earliest time of the layer.
func (b *Builder) seen(a *Attr) {
	e := &b.earliest
	if !e.set || a.Mtime < e.sec || a.Mtime == e.sec && a.MtimeNsec < e.nsec {
		e.sec, e.nsec, e.set = a.Mtime, a.MtimeNsec, true
	}
}

// supersede takes back what a name in dir was; a directory's whole subtree goes.
func (b *Builder) supersede(dir uint32, old Child) {
	switch old.Kind {
	case ChildWhiteout, ChildNone:
		return
	case ChildInode:
		if !old.ID.IsDir() {
			b.link(old.ID, -1)
			break
		}
		b.dropDir(old.ID.Index())
		up := b.dirs.at(dir, dirSize)
		put32(up, inoNlink, get32(up, inoNlink)-1)
	}
	b.replaced++
}

// dropDir makes every name below a directory none, and the directory dead. It
// recurses at most MaxDepth deep.
func (b *Builder) dropDir(i uint32) {
	r := b.dirs.at(i, dirSize)
	for n := get32(r, dirFirst); n != 0; {
		node := b.nodes.at(n-1, nodeSize)
		b.supersede(i, b.child(node))
		b.unchain(n)
		node[childKind] = byte(ChildNone)
		b.live--
		n = get32(node, nodeSib)
	}
	if r[inoFlags]&flagImplicit != 0 {
		b.implicit--
	}
	r[inoFlags] |= flagDead
	put32(r, dirFirst, 0)
	put32(r, dirCount, 0)
}
