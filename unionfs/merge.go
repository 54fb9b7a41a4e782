package unionfs

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits of a merge. An image that exceeds one is refused, not cut short.
const (
	maxLayers       = 1 << 12 // a Ref's ordinal is stored in 16 bits; engines stop at 127
	maxMergeDepth   = 1 << 12 // nested directories; a path of 4,096 bytes has at most 2,048
	maxContributors = 1 << 21 // (layer, directory) pairs in merged directories; some 250 bytes of memory each
	maxCrossLinks   = 1 << 20 // hard links to files of lower layers
	maxMergeWork    = 1 << 27 // lookups in layers, about a quarter of a microsecond each
)

// source is what a merge asks of a layer's index.
type source interface {
	Layer
	// Children returns the range of dir's names among the layer's.
	Children(dir ID) (first, n uint32, err error)
	// ChildAt returns name number i of the layer. The names of a directory are sorted by their bytes.
	ChildAt(i uint32) (name string, c Child, err error)
	// Meta and Stats tell which layer it is.
	Meta() Meta
	Stats() Stats
	// LinkDirs returns the directories that have a hard link to another layer's file (ChildLink).
	LinkDirs() ([]ID, error)
}

// mergeDir is a directory of the merge to which more than one layer contributes.
// Every directory above one is a mergeDir too.
type mergeDir struct {
	parent *mergeDir // nil for the root
	name   string
	depth  int
	// from has the layers' directories that make it up, the topmost first. The
	// first one names the merged directory. Of one layer's, the one that has the
	// path itself comes before those that got here through a symbolic link.
	from []Ref
	kids map[string]*mergeDir
}

// has reports whether layer contributes to d.
func (d *mergeDir) has(layer int) bool {
	return slices.ContainsFunc(d.from, func(r Ref) bool { return r.Layer == layer })
}

// found is something that the merge has: a directory of several layers (dir), or
// an inode of one layer (ref).
type found struct {
	dir *mergeDir
	ref Ref
}

// isDir reports whether p is a directory.
func (p found) isDir() bool { return p.dir != nil || p.ref.ID.IsDir() }

// linkKey is a name in a layer's directory.
type linkKey struct {
	dir  Ref
	name string
}

// move is an implicit directory of a layer whose path is a symbolic link in the
// layers below. Its entries go where the link points.
type move struct {
	src  Ref       // the implicit directory
	at   *mergeDir // the directory that has the symbolic link
	name string    // of the symbolic link
}

// merger applies layers one after the other, the lowest first. It looks only at
// directories that the layer and those below it have in common: a directory that
// only one of them has is not entered.
type merger struct {
	layers []source
	root   *mergeDir
	moved  map[Ref]bool // sources of moves: not at their own place
	queue  []move
	links  map[linkKey]Ref // resolved hard links to files of lower layers
	dirs   []Ref           // directories with such links
	nfrom  int
	work   int
}

func newMerger(layers []source) (*merger, error) {
	if len(layers) == 0 || len(layers) > maxLayers {
		return nil, fmt.Errorf("unionfs: merging %d layers: want 1 to %d", len(layers), maxLayers)
	}
	root := &mergeDir{from: []Ref{{Layer: 0, ID: RootID}}}
	return &merger{layers: layers, root: root, moved: map[Ref]bool{}, links: map[linkKey]Ref{}, nfrom: 1}, nil
}

// run applies all layers.
func (m *merger) run() error {
	for k := range m.layers {
		if err := m.layer(k); err != nil {
			return err
		}
	}
	return nil
}

// layer applies layer k. First come the entries at their own places, then those
// of implicit directories that lie beyond symbolic links, in the order of the
// paths; where both have a name, the first stands.
func (m *merger) layer(k int) error {
	pending, err := m.resolveLinks(k)
	if err != nil {
		return err
	}
	if k > 0 {
		if err := m.apply(Ref{k, RootID}, m.root); err != nil {
			return err
		}
	}
	for len(m.queue) > 0 {
		mv := m.queue[0]
		m.queue = m.queue[1:]
		if err := m.relocate(mv); err != nil {
			return err
		}
	}
	for _, l := range pending { // a target may have come into being in this layer, through a symbolic link
		if err := m.resolveLink(l, true); err != nil {
			return err
		}
	}
	return nil
}

// spend counts n lookups.
func (m *merger) spend(n int) error {
	if m.work += n; m.work > maxMergeWork {
		return fmt.Errorf("unionfs: merging layers: more than %d lookups", maxMergeWork)
	}
	return nil
}

// apply puts the directory src of a layer, with all that is in it, over to.
func (m *merger) apply(src Ref, to *mergeDir) error {
	layer := m.layers[src.Layer]
	opaque, err := layer.Opaque(src.ID)
	if err != nil {
		return err
	}
	if opaque {
		cut(to, src.Layer)
	}
	first, n, err := layer.Children(src.ID)
	if err != nil {
		return err
	}
	for i := first; i < first+n; i++ {
		name, c, err := layer.ChildAt(i)
		if err != nil {
			return err
		}
		if c.Kind == ChildInode && c.ID.IsDir() {
			err = m.applyDir(Ref{src.Layer, c.ID}, to, name)
		} else {
			hide(to, name, src.Layer, c.Kind)
		}
		if err != nil {
			return err
		}
	}
	i := 0
	for i < len(to.from) && to.from[i].Layer == src.Layer {
		i++
	}
	to.from = slices.Insert(to.from, i, src)
	if m.nfrom++; m.nfrom > maxContributors {
		return fmt.Errorf("unionfs: merging layers: more than %d directories in common", maxContributors)
	}
	return nil
}

// hide removes the merged directory that a whiteout, a file or a link of a layer
// covers. What the layer itself has at the place stays.
func hide(to *mergeDir, name string, layer int, kind ChildKind) {
	kid := to.kids[name]
	switch {
	case kid == nil:
	case !kid.has(layer):
		delete(to.kids, name)
	case kind == ChildWhiteout:
		cut(kid, layer)
	}
}

// cut removes from d what layers below have in it.
func cut(d *mergeDir, layer int) {
	d.from = slices.DeleteFunc(d.from, func(r Ref) bool { return r.Layer < layer })
	for name, kid := range d.kids {
		if cut(kid, layer); len(kid.from) == 0 {
			delete(d.kids, name)
		}
	}
}

// applyDir puts the directory src of a layer at name in to.
func (m *merger) applyDir(src Ref, to *mergeDir, name string) error {
	prev, ok, err := m.find(found{dir: to}, name)
	if err != nil || !ok {
		return err
	}
	layer := m.layers[src.Layer]
	opaque, err := layer.Opaque(src.ID)
	if err != nil {
		return err
	}
	if !prev.isDir() {
		if opaque {
			return nil
		}
		return m.overFile(move{src, to, name}, prev.ref)
	}
	own := prev.ref.Layer == src.Layer
	if prev.dir != nil {
		own = prev.dir.has(src.Layer)
	}
	if opaque && !own {
		delete(to.kids, name)
		return nil
	}
	kid, err := m.child(to, name, prev)
	if err != nil {
		return err
	}
	return m.apply(src, kid)
}

// overFile notes the move mv if its source is implicit and file, which is at the
// place, a symbolic link. Any other directory replaces a file.
func (m *merger) overFile(mv move, file Ref) error {
	var a Attr
	if err := m.layers[mv.src.Layer].Attr(mv.src.ID, &a); err != nil || !a.Implicit {
		return err
	}
	if err := m.layers[file.Layer].Attr(file.ID, &a); err != nil {
		return err
	}
	if a.Mode&unix.S_IFMT == unix.S_IFLNK {
		m.moved[mv.src] = true
		m.queue = append(m.queue, mv)
	}
	return nil
}

// child returns the merged directory at name in to, which is p so far; noRef is
// nothing so far.
func (m *merger) child(to *mergeDir, name string, p found) (*mergeDir, error) {
	if p.dir != nil {
		return p.dir, nil
	}
	d := &mergeDir{parent: to, name: name, depth: to.depth + 1}
	if p.ref != noRef {
		d.from = []Ref{p.ref}
	}
	if d.depth > maxMergeDepth {
		return nil, fmt.Errorf("unionfs: merging layers: directories nested deeper than %d", maxMergeDepth)
	}
	if to.kids == nil {
		to.kids = map[string]*mergeDir{}
	}
	to.kids[name] = d
	m.nfrom++
	return d, nil
}

// relocate puts what is in an implicit directory where the symbolic link at its
// path points. If nothing is there, the implicit directory is; if something else
// than a directory is there, the implicit directory replaces the link.
func (m *merger) relocate(mv move) error {
	p, ok, err := m.find(found{dir: mv.at}, mv.name)
	if err != nil {
		return err
	}
	var way []step
	for d := mv.at; d != nil; d = d.parent {
		way = append(way, step{found{dir: d}, d.name})
	}
	slices.Reverse(way)
	missing := ""
	switch {
	case !ok:
		return m.stay(mv)
	case p.isDir(): // an earlier move has replaced the link
		way = append(way, step{p, mv.name})
	default:
		target, err := m.readlink(step{found: p})
		if err != nil {
			return err
		}
		if target == "" {
			return m.stay(mv)
		}
		if way, missing, err = reach(m, way, target); err != nil {
			return err
		}
	}
	if way == nil || len(missing) > MaxName || strings.ContainsRune(missing, 0) { // a target may be longer than a name
		return m.stay(mv)
	}
	if missing != "" {
		way = append(way, step{found{ref: noRef}, missing})
	}
	to := m.root
	for _, s := range way[1:] {
		if to, err = m.child(to, s.name, s.found); err != nil {
			return err
		}
	}
	return m.apply(mv.src, to)
}

// stay leaves the source of mv at its own place, unless another entry of its
// layer is there by now.
func (m *merger) stay(mv move) error {
	for _, dir := range mv.at.from {
		if dir.Layer != mv.src.Layer {
			break
		}
		if ref, _, err := m.says(dir, mv.name); err != nil || ref != noRef {
			return err
		}
	}
	delete(m.moved, mv.src)
	return nil
}

// find returns what the merge so far has at name in the directory p.
func (m *merger) find(p found, name string) (found, bool, error) {
	if p.dir == nil {
		ref, _, err := m.says(p.ref, name)
		return found{ref: ref}, err == nil && ref != noRef, err
	}
	if kid := p.dir.kids[name]; kid != nil {
		return found{dir: kid}, true, nil
	}
	c := newChoice()
	for _, dir := range p.dir.from {
		if c.settled(dir.Layer) {
			break
		}
		ref, kind, err := m.says(dir, name)
		if err != nil {
			return found{}, false, err
		}
		c.add(dir.Layer, ref, kind)
	}
	return found{ref: c.ref}, c.ref != noRef, nil
}

// noRef is no inode.
var noRef = Ref{Layer: -1}

// choice decides what stands at a name that several contributors to a directory
// have. They are added the topmost first.
type choice struct {
	ref    Ref
	hidden int // layers below this ordinal are covered
}

func newChoice() choice { return choice{ref: noRef} }

// settled reports whether contributors of layer and below cannot matter any more.
func (c *choice) settled(layer int) bool { return c.ref != noRef || layer < c.hidden }

// add tells what a contributor says, as merger.says.
func (c *choice) add(layer int, ref Ref, kind ChildKind) {
	if c.settled(layer) {
		return
	}
	c.ref = ref
	switch {
	case kind == ChildWhiteout:
		c.hidden = layer // of its own layer, the entry stands
	case kind == ChildLink && ref == noRef:
		c.hidden = layer + 1 // not resolved yet: nothing is there
	}
}

// says returns the inode at name in a layer's directory, noRef if there is none.
func (m *merger) says(dir Ref, name string) (Ref, ChildKind, error) {
	if err := m.spend(1); err != nil {
		return noRef, ChildNone, err
	}
	c, err := m.layers[dir.Layer].Lookup(dir.ID, name)
	if err != nil {
		return noRef, ChildNone, err
	}
	return m.inode(dir, name, c), c.Kind, nil
}

// inode returns the inode of a child of a layer's directory, noRef if it has none
// at this place.
func (m *merger) inode(dir Ref, name string, c Child) Ref {
	switch c.Kind {
	case ChildInode:
		if ref := (Ref{dir.Layer, c.ID}); !m.moved[ref] {
			return ref
		}
	case ChildLink:
		if ref, ok := m.links[linkKey{dir, name}]; ok {
			return ref
		}
	}
	return noRef
}

// step is a place on a path, and its name in the place before it.
type step struct {
	found
	name string
}

// lookup, dir and readlink make the merge so far a namespace.
func (m *merger) lookup(at step, name string) (step, bool, error) {
	p, ok, err := m.find(at.found, name)
	return step{p, name}, ok, err
}

func (m *merger) dir(p step) bool { return p.isDir() }

func (m *merger) readlink(p step) (string, error) {
	return readSymlink(m.layers[p.ref.Layer], p.ref.ID)
}
