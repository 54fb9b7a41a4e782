package unionfs

import (
	"encoding/binary"
	"fmt"
	iofs "io/fs"
	"sort"
)

// Tree is the merge of an image's layers. It is a mapped file, which has only the
// directories that the merge changed; every other directory is that of one layer
// and answered from the layer's index. A directory is named by the topmost layer
// that has it, the root by {layers-1, RootID}.
//
// A Tree is safe for concurrent use, but for Close. Its methods return ErrDamaged
// for a damaged tree or index, and io/fs.ErrInvalid for a Ref that is none of the
// tree's.
type Tree struct {
	layers []source
	s      *sectionReader
	ndirs  uint32 // records in treeDirs
	nfrom  uint32 // records in treeFrom
}

// OpenTree opens the tree that Merge wrote for layers. The layers must stay open
// as long as the tree. A tree of other layers, or of another version of this
// package, is ErrDamaged.
func OpenTree(path string, layers []*Index) (*Tree, error) { return openTree(path, sources(layers)) }

func openTree(path string, layers []source) (*Tree, error) {
	s, err := openSections(path, treeMagic, treeVersion)
	if err != nil {
		return nil, err
	}
	t := &Tree{layers: layers, s: s}
	if err := t.check(); err != nil {
		s.close()
		return nil, err
	}
	return t, nil
}

// check compares the tree with its layers and its sections with each other.
func (t *Tree) check() error {
	var ok [3]bool
	var n uint32
	n, ok[0] = t.s.count(treeLayers, layerRecord)
	t.ndirs, ok[1] = t.s.count(treeDirs, dirRecord)
	t.nfrom, ok[2] = t.s.count(treeFrom, fromRecord)
	if !ok[0] || !ok[1] || !ok[2] || int(n) != len(t.layers) || n == 0 {
		return t.s.damaged
	}
	var dirs, from uint32
	for k, l := range t.layers {
		rec, err := t.s.record(treeLayers, uint32(k), layerRecord)
		if err != nil {
			return err
		}
		meta, stats := l.Meta(), l.Stats()
		d, f := binary.LittleEndian.Uint32(rec[40:]), binary.LittleEndian.Uint32(rec[44:])
		if Digest(rec[:32]) != meta.Blob || binary.LittleEndian.Uint32(rec[32:]) != stats.Dirs ||
			binary.LittleEndian.Uint32(rec[36:]) != stats.Files || d < dirs || f < from || d > t.ndirs || f > t.nfrom {
			return t.s.damaged
		}
		dirs, from = d, f
	}
	return nil
}

// Close unmaps the tree, not its layers.
func (t *Tree) Close() error { return t.s.close() }

// Touched is how many bytes of the tree's file were read so far, to the block.
func (t *Tree) Touched() (read, size int64) { return t.s.touched() }

// ForgetPages drops the tree's resident pages. They come back when they are needed.
func (t *Tree) ForgetPages() { t.s.forget() }

// Verify checks the whole file against its checksums.
func (t *Tree) Verify() error { return t.s.verify() }

// VerifyTree checks the whole file at path as Verify does, without its layers. The
// error is ErrDamaged, or that of the operating system.
func VerifyTree(path string) error {
	s, err := openSections(path, treeMagic, treeVersion)
	if err != nil {
		return err
	}
	defer s.close()
	return s.verify()
}

// Root is the root directory.
func (t *Tree) Root() Ref { return Ref{len(t.layers) - 1, RootID} }

// storedDir is a record of treeDirs.
type storedDir struct {
	source, parent Ref
	nlink          uint32
	at             uint64 // of its block in treeNames
	n              uint32 // children
}

// layerRange returns the records of a layer in a section that is sorted by layer:
// col is where the layers' records have the first one, end the section's count.
func (t *Tree) layerRange(layer, col int, end uint32) (lo, hi uint32, err error) {
	rec, err := t.s.record(treeLayers, uint32(layer), layerRecord)
	if err != nil {
		return 0, 0, err
	}
	lo, hi = binary.LittleEndian.Uint32(rec[col:]), end
	if layer+1 < len(t.layers) {
		if rec, err = t.s.record(treeLayers, uint32(layer+1), layerRecord); err != nil {
			return 0, 0, err
		}
		hi = binary.LittleEndian.Uint32(rec[col:])
	}
	return lo, hi, nil
}

// search finds the record for a layer's directory in a sorted section with
// records of size bytes, which have the directory at key.
func (t *Tree) search(section int, lo, hi uint32, size uint64, key int, dir uint32) ([]byte, error) {
	for lo < hi {
		mid := lo + (hi-lo)/2
		rec, err := t.s.record(section, mid, size)
		if err != nil {
			return nil, err
		}
		switch d := binary.LittleEndian.Uint32(rec[key:]); {
		case d == dir:
			return rec, nil
		case d < dir:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return nil, nil
}

// stored returns the record of dir; ok is false if the tree does not have dir,
// because it is as its layer has it.
func (t *Tree) stored(dir Ref) (d storedDir, ok bool, err error) {
	if dir.Layer < 0 || dir.Layer >= len(t.layers) || !dir.ID.IsDir() {
		return d, false, fmt.Errorf("unionfs: directory %#x of layer %d: %w", uint32(dir.ID), dir.Layer, iofs.ErrInvalid)
	}
	lo, hi, err := t.layerRange(dir.Layer, 40, t.ndirs)
	if err != nil {
		return d, false, err
	}
	rec, err := t.search(treeDirs, lo, hi, dirRecord, 8, dir.ID.Index())
	if err != nil || rec == nil {
		return d, false, err
	}
	return t.decodeDir(rec)
}

func (t *Tree) decodeDir(rec []byte) (d storedDir, ok bool, err error) {
	le := binary.LittleEndian
	d = storedDir{
		source: Ref{int(le.Uint16(rec[2:])), DirID(le.Uint32(rec[12:]))},
		parent: Ref{int(le.Uint16(rec[4:])), DirID(le.Uint32(rec[16:]))},
		nlink:  le.Uint32(rec[20:]),
		at:     le.Uint64(rec[24:]),
		n:      le.Uint32(rec[32:]),
	}
	if d.source.Layer >= len(t.layers) || d.parent.Layer >= len(t.layers) ||
		d.at > t.s.len(treeNames) || uint64(d.n)*childRecord > t.s.len(treeNames)-d.at {
		return d, false, t.s.damaged
	}
	return d, true, nil
}

// child returns child i of d. The name aliases the mapping.
func (t *Tree) child(d *storedDir, i uint32) (name string, ref Ref, err error) {
	rec, err := t.s.bytes(treeNames, d.at+uint64(i)*childRecord, childRecord)
	if err != nil {
		return "", Ref{}, err
	}
	le := binary.LittleEndian
	ref = Ref{int(le.Uint16(rec[6:])), ID(le.Uint32(rec[8:]))}
	if ref.Layer >= len(t.layers) {
		return "", Ref{}, t.s.damaged
	}
	name, err = t.s.str(treeNames, d.at+uint64(d.n)*childRecord+uint64(le.Uint32(rec[0:])), uint64(rec[4]))
	return name, ref, err
}

// seek returns the number of the first child of d whose name is not less than name.
func (t *Tree) seek(d *storedDir, name string) (uint32, error) {
	var failed error
	i := sort.Search(int(d.n), func(i int) bool {
		have, _, err := t.child(d, uint32(i))
		if err != nil {
			failed = err
		}
		return have >= name
	})
	return uint32(i), failed
}

// Lookup finds name in directory dir. It does not allocate.
func (t *Tree) Lookup(dir Ref, name string) (ref Ref, ok bool, err error) {
	d, stored, err := t.stored(dir)
	if err != nil {
		return Ref{}, false, err
	}
	if stored {
		i, err := t.seek(&d, name)
		if err != nil || i == d.n {
			return Ref{}, false, err
		}
		have, ref, err := t.child(&d, i)
		if err != nil || have != name {
			return Ref{}, false, err
		}
		return ref, true, nil
	}
	c, err := t.layers[dir.Layer].Lookup(dir.ID, name)
	if err != nil || c.Kind != ChildInode {
		return Ref{}, false, t.linkDamage(c, err)
	}
	return Ref{dir.Layer, c.ID}, true, nil
}

// linkDamage turns a hard link to another layer in a directory that the tree does
// not have into an error: Merge stores all of them.
func (t *Tree) linkDamage(c Child, err error) error {
	if err == nil && c.Kind == ChildLink {
		return t.s.damaged
	}
	return err
}

// Attr fills a with the attributes of ref. It does not allocate. Nlink of a
// directory counts the subdirectories of all layers; that of a file, its names in
// its own layer.
func (t *Tree) Attr(ref Ref, a *Attr) error {
	if !ref.ID.IsDir() && ref.Layer >= 0 && ref.Layer < len(t.layers) {
		return t.layers[ref.Layer].Attr(ref.ID, a)
	}
	d, ok, err := t.stored(ref)
	if err != nil {
		return err
	}
	if !ok {
		return t.layers[ref.Layer].Attr(ref.ID, a)
	}
	if err := t.layers[d.source.Layer].Attr(d.source.ID, a); err != nil {
		return err
	}
	a.Nlink = d.nlink
	return nil
}

// Source returns the inode of a layer that ref has its attributes and extended
// attributes from: ref itself, but for some directories.
func (t *Tree) Source(ref Ref) (Ref, error) {
	if !ref.ID.IsDir() {
		return ref, nil
	}
	d, ok, err := t.stored(ref)
	if err != nil || !ok {
		return ref, err
	}
	return d.source, nil
}

// Parent returns the directory that holds dir. The root's is the root.
func (t *Tree) Parent(dir Ref) (Ref, error) {
	d, ok, err := t.stored(dir)
	if err != nil || ok {
		return d.parent, err
	}
	id, _, err := t.layers[dir.Layer].Parent(dir.ID)
	if err != nil {
		return Ref{}, err
	}
	return t.merged(Ref{dir.Layer, id})
}

// merged returns the directory of the tree that a layer's directory is part of.
func (t *Tree) merged(dir Ref) (Ref, error) {
	lo, hi, err := t.layerRange(dir.Layer, 44, t.nfrom)
	if err != nil {
		return Ref{}, err
	}
	rec, err := t.search(treeFrom, lo, hi, fromRecord, 4, dir.ID.Index())
	if err != nil || rec == nil {
		return dir, err
	}
	if rec, err = t.s.record(treeDirs, binary.LittleEndian.Uint32(rec[8:]), dirRecord); err != nil {
		return Ref{}, err
	}
	r := Ref{int(binary.LittleEndian.Uint16(rec[0:])), DirID(binary.LittleEndian.Uint32(rec[8:]))}
	if r.Layer >= len(t.layers) {
		return Ref{}, t.s.damaged
	}
	return r, nil
}

// ReadDir calls fn for the children of dir from position pos on, in an order that
// never changes, until fn returns false. 0 is the first position. fn gets the
// position behind the child, to go on from; name is valid until the tree and its
// layers are closed.
func (t *Tree) ReadDir(dir Ref, pos int, fn func(pos int, name string, ref Ref) bool) error {
	if pos < 0 {
		return fmt.Errorf("unionfs: reading a directory from position %d: %w", pos, iofs.ErrInvalid)
	}
	d, ok, err := t.stored(dir)
	if err != nil {
		return err
	}
	if !ok {
		return t.readLayerDir(dir, pos, fn)
	}
	for i := pos; i < int(d.n); i++ {
		name, ref, err := t.child(&d, uint32(i))
		if err != nil {
			return err
		}
		if !fn(i+1, name, ref) {
			return nil
		}
	}
	return nil
}

// readLayerDir is ReadDir for a directory that is as its layer has it.
func (t *Tree) readLayerDir(dir Ref, pos int, fn func(int, string, Ref) bool) error {
	l := t.layers[dir.Layer]
	first, n, err := l.Children(dir.ID)
	if err != nil {
		return err
	}
	for i := pos; i < int(n); i++ {
		name, c, err := l.ChildAt(first + uint32(i))
		if err = t.linkDamage(c, err); err != nil {
			return err
		}
		if c.Kind == ChildInode && !fn(i+1, name, Ref{dir.Layer, c.ID}) {
			return nil
		}
	}
	return nil
}
