package unionfs

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
)

// The tree file; docs/format.md draws it.
const (
	treeMagic   = "imgfstre"
	treeVersion = 1

	treeLayers = 0 // section: a record for each layer, the lowest first
	treeDirs   = 1 // section: a record for each stored directory, sorted by its Ref
	treeFrom   = 2 // section: which stored directory a layer's directory is part of, sorted by the latter
	treeNames  = 3 // section: for each stored directory, its children's records, then their names

	layerRecord = 48 // blob digest, directories u32, files u32, first record in treeDirs u32, in treeFrom u32
	dirRecord   = 40 // see appendDir
	fromRecord  = 12 // layer u16, 0 u16, directory u32, record in treeDirs u32
	childRecord = 12 // name's offset u32, its length u8, 0 u8, layer u16, ID u32

	maxNameBuffer = 1 << 20 // bytes of names of a directory that are kept until its records are written
)

// Merge writes the tree of layers, the lowest first, to f, which must be empty,
// and does not sync it. It takes time for the directories that layers have in
// common, and memory for their number; other directories are not looked at.
//
// The result is what unpacking one layer after the other makes. Within a layer,
// what lies at its own place stands over what gets there through a symbolic link.
// A hard link to something that the layers below do not have, or to a directory,
// is an *EntryError.
func Merge(f *os.File, layers []*Index) error { return mergeSources(f, sources(layers)) }

func sources(layers []*Index) []source {
	s := make([]source, len(layers))
	for i, l := range layers {
		s[i] = l
	}
	return s
}

func mergeSources(f *os.File, layers []source) error {
	m, err := newMerger(layers)
	if err != nil {
		return err
	}
	if err := m.run(); err != nil {
		return err
	}
	w := &treeWriter{merger: m, sectionWriter: newSectionWriter(f, treeMagic, treeVersion)}
	if err := w.write(); err != nil {
		return err
	}
	return w.finish(nil)
}

// treeWriter writes what a merger has found.
type treeWriter struct {
	*merger
	*sectionWriter
	stored []*mergeDir // sorted by name: from[0]
	from   []fromDir   // sorted by ref
	recs   []byte      // of treeDirs
}

// fromDir says that the layer's directory ref is part of stored directory at.
type fromDir struct {
	ref Ref
	at  uint32
}

func compareRefs(a, b Ref) int {
	return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.ID, b.ID))
}

func (w *treeWriter) write() error {
	w.collect()
	w.begin(treeNames)
	for _, d := range w.stored {
		if err := w.dirBlock(d); err != nil {
			return err
		}
	}
	w.begin(treeDirs)
	w.append(w.recs)
	w.begin(treeFrom)
	var rec [fromRecord]byte
	for _, f := range w.from {
		binary.LittleEndian.PutUint16(rec[0:], uint16(f.ref.Layer))
		binary.LittleEndian.PutUint32(rec[4:], f.ref.ID.Index())
		binary.LittleEndian.PutUint32(rec[8:], f.at)
		w.append(rec[:])
	}
	w.begin(treeLayers)
	for k, l := range w.layers {
		w.append(w.layerRec(k, l))
	}
	return nil
}

// layerRec is the record of layer k.
func (w *treeWriter) layerRec(k int, l source) []byte {
	firstDir, _ := slices.BinarySearchFunc(w.stored, k, func(d *mergeDir, k int) int { return cmp.Compare(d.from[0].Layer, k) })
	firstFrom, _ := slices.BinarySearchFunc(w.from, k, func(f fromDir, k int) int { return cmp.Compare(f.ref.Layer, k) })
	meta, stats := l.Meta(), l.Stats()
	rec := slices.Clone(meta.Blob[:])
	for _, v := range []uint32{stats.Dirs, stats.Files, uint32(firstDir), uint32(firstFrom)} {
		rec = binary.LittleEndian.AppendUint32(rec, v)
	}
	return rec
}

// collect lists the directories to be stored: those that the merger has, and
// those of one layer with a hard link to a lower one.
func (w *treeWriter) collect() {
	known := map[Ref]bool{}
	list := []*mergeDir{w.root}
	if len(w.layers) == 1 {
		list = nil // one layer needs no tree
	}
	for i := 0; i < len(list); i++ {
		for _, kid := range list[i].kids {
			list = append(list, kid)
		}
	}
	if len(w.dirs) > 0 {
		for _, d := range list {
			for _, ref := range d.from {
				known[ref] = true
			}
		}
	}
	for _, ref := range w.dirs {
		if !known[ref] {
			list = append(list, &mergeDir{from: []Ref{ref}})
		}
	}
	slices.SortFunc(list, func(a, b *mergeDir) int { return compareRefs(a.from[0], b.from[0]) })
	w.stored = list
	for i, d := range list {
		for _, ref := range d.from {
			w.from = append(w.from, fromDir{ref, uint32(i)})
		}
	}
	slices.SortFunc(w.from, func(a, b fromDir) int { return compareRefs(a.ref, b.ref) })
}

// holder returns the stored directory that a layer's directory is part of, nil if none.
func (w *treeWriter) holder(ref Ref) *mergeDir {
	i, ok := slices.BinarySearchFunc(w.from, ref, func(f fromDir, ref Ref) int { return compareRefs(f.ref, ref) })
	if !ok {
		return nil
	}
	return w.stored[w.from[i].at]
}

// dirBlock writes the block of d in treeNames and makes its record for treeDirs.
func (w *treeWriter) dirBlock(d *mergeDir) error {
	at, n, nlink := w.written(), uint32(0), uint32(2)
	var off uint64
	var names []byte
	var rec [childRecord]byte
	err := w.eachChild(d, func(name string, ref Ref) {
		binary.LittleEndian.PutUint32(rec[0:], uint32(off))
		rec[4] = uint8(len(name))
		binary.LittleEndian.PutUint16(rec[6:], uint16(ref.Layer))
		binary.LittleEndian.PutUint32(rec[8:], uint32(ref.ID))
		w.append(rec[:])
		if off += uint64(len(name)); off <= maxNameBuffer {
			names = append(names, name...)
		}
		if n++; ref.ID.IsDir() {
			nlink++
		}
	})
	if err != nil {
		return err
	}
	if off > math.MaxUint32 {
		return fmt.Errorf("unionfs: merging layers: names of a directory exceed %d bytes", uint32(math.MaxUint32))
	}
	if off <= maxNameBuffer {
		w.append(names)
	} else if err := w.eachChild(d, func(name string, _ Ref) { w.append([]byte(name)) }); err != nil {
		return err
	}
	return w.appendDir(d, at, n, nlink)
}

// appendDir adds the record of d to those of treeDirs: the layers of its name, its
// source of attributes and its parent (u16 each), 0 u16, the directories in them
// (u32 each), links u32, where its block is (u64), children u32, 0 u32.
func (w *treeWriter) appendDir(d *mergeDir, at int64, n, nlink uint32) error {
	src, err := w.attrSource(d)
	if err != nil {
		return err
	}
	parent, err := w.parentOf(d)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	for _, r := range []Ref{d.from[0], src, parent, {}} {
		w.recs = le.AppendUint16(w.recs, uint16(r.Layer))
	}
	for _, r := range []Ref{d.from[0], src, parent} {
		w.recs = le.AppendUint32(w.recs, r.ID.Index())
	}
	w.recs = le.AppendUint32(w.recs, nlink)
	w.recs = le.AppendUint64(w.recs, uint64(at))
	w.recs = le.AppendUint32(w.recs, n)
	w.recs = le.AppendUint32(w.recs, 0)
	return nil
}

// attrSource is the topmost contributor to d that is not implicit, or else the
// lowest, which made the directory.
func (w *treeWriter) attrSource(d *mergeDir) (Ref, error) {
	for _, ref := range d.from {
		var a Attr
		if err := w.layers[ref.Layer].Attr(ref.ID, &a); err != nil {
			return Ref{}, err
		}
		if !a.Implicit {
			return ref, nil
		}
	}
	low := d.from[len(d.from)-1].Layer
	i := slices.IndexFunc(d.from, func(r Ref) bool { return r.Layer == low })
	return d.from[i], nil
}

func (w *treeWriter) parentOf(d *mergeDir) (Ref, error) {
	if d == w.root {
		return d.from[0], nil
	}
	if d.parent != nil {
		return d.parent.from[0], nil
	}
	dir := d.from[0]
	id, _, err := w.layers[dir.Layer].Parent(dir.ID)
	if err != nil {
		return Ref{}, err
	}
	parent := Ref{dir.Layer, id}
	if h := w.holder(parent); h != nil {
		parent = h.from[0]
	}
	return parent, nil
}

// cursor goes through the names of a contributor.
type cursor struct {
	dir       Ref
	next, end uint32
	name      string
	child     Child
}

// advance moves c to its next name; ok is false behind the last.
func (m *merger) advance(c *cursor) (ok bool, err error) {
	if c.next == c.end {
		return false, nil
	}
	c.name, c.child, err = m.layers[c.dir.Layer].ChildAt(c.next)
	c.next++
	return err == nil, err
}

// eachChild calls fn for every child of d, sorted by name.
func (m *merger) eachChild(d *mergeDir, fn func(name string, ref Ref)) error {
	open, err := m.cursors(d)
	if err != nil {
		return err
	}
	kids := slices.Sorted(maps.Keys(d.kids)) // some have a name that no contributor has: it came through a symbolic link
	for len(open) > 0 || len(kids) > 0 {
		if err := m.spend(1 + len(open)/16); err != nil { // a comparison is cheaper than a lookup
			return err
		}
		var name string
		if len(kids) > 0 {
			name = kids[0]
		} else {
			name = open[0].name
		}
		for _, c := range open {
			name = min(name, c.name)
		}
		best := newChoice()
		if open, err = m.choose(open, name, &best); err != nil {
			return err
		}
		if len(kids) > 0 && kids[0] == name {
			best.ref, kids = d.kids[name].from[0], kids[1:]
		}
		if best.ref != noRef {
			fn(name, best.ref)
		}
	}
	return nil
}

// cursors returns cursors at the first names of d's contributors, the topmost first.
func (m *merger) cursors(d *mergeDir) ([]*cursor, error) {
	var open []*cursor
	for _, dir := range d.from {
		first, n, err := m.layers[dir.Layer].Children(dir.ID)
		if err != nil {
			return nil, err
		}
		c := &cursor{dir: dir, next: first, end: first + n}
		if ok, err := m.advance(c); err != nil {
			return nil, err
		} else if ok {
			open = append(open, c)
		}
	}
	return open, nil
}

// choose tells best what the cursors say of name, and returns those that are left
// after it.
func (m *merger) choose(open []*cursor, name string, best *choice) ([]*cursor, error) {
	left := open[:0]
	for _, c := range open {
		if c.name == name {
			best.add(c.dir.Layer, m.inode(c.dir, name, c.child), c.child.Kind)
			if ok, err := m.advance(c); err != nil {
				return nil, err
			} else if !ok {
				continue
			}
		}
		left = append(left, c)
	}
	return left, nil
}
