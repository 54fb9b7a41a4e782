package unionfs

import (
	"crypto/sha256"
	"fmt"
	"io"
	"strings"
)

// NoContent is the content number of a file that has none: it is empty.
const NoContent uint32 = none

// Index is a layer, compiled: a mapped file that a [Builder] wrote. Opening it
// verifies its header; each block of 64 KiB is verified when it is first touched,
// and every reference is checked against its bounds when it is followed. An
// access that meets damage returns an error that is [ErrDamaged]; the file must
// then be made again.
//
// All methods are safe for concurrent use, except Close, which must come after
// every other call has returned and nothing that aliases the mapping is used.
type Index struct {
	s     *sectionReader
	meta  Meta
	stats Stats

	children uint32 // records of each kind that Stats does not count
	digests  uint32
	links    uint32
	implicit bool
}

var _ Layer = (*Index)(nil)

// Open maps the layer index at path. The error is [ErrDamaged] when the file is
// no layer index of this version or is damaged where opening looks, else that
// of the operating system.
func Open(path string) (*Index, error) {
	s, err := openSections(path, indexMagic, indexVersion)
	if err != nil {
		return nil, err
	}
	x := &Index{s: s}
	if !x.readMeta() {
		s.close()
		return nil, s.damaged
	}
	return x, nil
}

// WriteTo writes the whole file to w, after checking it.
func (x *Index) WriteTo(w io.Writer) (int64, error) {
	if err := x.Verify(); err != nil {
		return 0, err
	}
	ok := true
	n, err := func() (int, error) {
		defer faultGuard(&ok)()
		return w.Write(x.s.data)
	}()
	if !ok {
		err = x.s.damaged
	}
	return int64(n), err
}

// readMeta fills x from the header, and reports whether header and sections agree.
func (x *Index) readMeta() bool {
	m := x.s.meta()
	x.meta = Meta{
		Blob:     Digest(m[metaBlob : metaBlob+32]),
		DiffID:   Digest(m[metaDiffID : metaDiffID+32]),
		BlobSize: get64(m, metaBlobSize),
		Format:   m[metaFormat],
	}
	x.implicit = m[metaImplicit] != 0
	x.stats = Stats{Names: get32(m, metaNames), Expanded: get64(m, metaExpanded), PackSize: get64(m, metaPackSize)}
	all := true
	count := func(sec int, size uint64, max uint32) uint32 {
		n, ok := x.s.count(sec, size)
		all = all && ok && n <= max
		return n
	}
	x.stats.Dirs = count(secDirs, dirSize, MaxIndex+1)
	x.stats.Files = count(secFiles, fileSize, MaxIndex+1)
	x.stats.Contents = count(secContents, contentSize, MaxIndex+1)
	x.stats.Chunks = count(secChunks, chunkSize, MaxChunks)
	x.children = count(secChildren, childSize, MaxEntries)
	x.digests = count(secDigests, digestSize, none-1)
	x.links = count(secLinkDirs, 4, MaxIndex+1)
	for i, n := range []uint32{x.stats.Dirs, x.stats.Files, x.stats.Contents, x.stats.Chunks} {
		all = all && n == get32(m, metaDirs+4*i)
	}
	return all && x.stats.Dirs > 0 && x.stats.PackSize >= 0 && x.stats.Expanded >= 0 &&
		x.s.len(secNames) <= MaxNameHeap && x.s.len(secXattrs) <= MaxXattrHeap
}

// Close unmaps the file. A second Close does nothing.
func (x *Index) Close() error { return x.s.close() }

// Touched is how many bytes of the file were read so far, to the block: what
// opening it and all that was asked of it since has cost. Size is all of them.
func (x *Index) Touched() (read, size int64) { return x.s.touched() }

// Meta says what blob the index was compiled from.
func (x *Index) Meta() Meta { return x.meta }

// Stats returns the layer's totals.
func (x *Index) Stats() Stats { return x.stats }

// HasImplicit reports whether the layer names a directory other than its root
// only as a parent of something.
func (x *Index) HasImplicit() bool { return x.implicit }

// Done is true: an Index is complete.
func (x *Index) Done() bool { return true }

// ForgetPages drops the resident pages of the mapping; they come back when they
// are used.
func (x *Index) ForgetPages() { x.s.forget() }

func (x *Index) dir(id ID) ([]byte, error) {
	if !id.IsDir() {
		return nil, notDir(id)
	}
	return x.s.record(secDirs, id.Index(), dirSize)
}

func (x *Index) inode(id ID) ([]byte, error) {
	if id.IsDir() {
		return x.s.record(secDirs, id.Index(), dirSize)
	}
	return x.s.record(secFiles, id.Index(), fileSize)
}

// Children returns which child records are those of dir: n of them from number
// first on, in the order of their names' bytes. The error is ErrDamaged, or
// io/fs.ErrInvalid when dir is no directory.
func (x *Index) Children(dir ID) (first, n uint32, err error) {
	r, err := x.dir(dir)
	if err != nil {
		return 0, 0, err
	}
	first, n = get32(r, dirFirst), get32(r, dirCount)
	if first > x.children || n > x.children-first {
		return 0, 0, x.s.damaged
	}
	return first, n, nil
}

// ChildAt returns child record i of the layer ([Index.Children] says which are a
// directory's). The name aliases the mapping: it is valid until Close.
func (x *Index) ChildAt(i uint32) (name string, c Child, err error) {
	r, err := x.s.record(secChildren, i, childSize)
	if err != nil {
		return "", Child{}, err
	}
	if name, err = x.s.str(secNames, uint64(get32(r, childName)), uint64(r[childLen])); err != nil {
		return "", Child{}, err
	}
	c, err = x.child(r)
	return name, c, err
}

// child reads what a child record says.
func (x *Index) child(r []byte) (Child, error) {
	c := Child{Kind: ChildKind(r[childKind])}
	switch c.Kind {
	case ChildInode:
		c.ID = ID(get32(r, childID))
		if !x.has(c.ID) {
			return Child{}, x.s.damaged
		}
	case ChildWhiteout:
	case ChildLink:
		off := uint64(get32(r, childID))
		l, err := x.s.bytes(secNames, off, 2)
		if err != nil {
			return Child{}, err
		}
		t, err := x.s.str(secNames, off+2, uint64(get16(l, 0)))
		if err != nil {
			return Child{}, err
		}
		c.Target = strings.Clone(t)
	default:
		return Child{}, x.s.damaged
	}
	return c, nil
}

// LinkDirs returns the directories that have a hard link to a file of another
// layer (ChildLink), in the order of their numbers.
func (x *Index) LinkDirs() ([]ID, error) {
	b, err := x.s.bytes(secLinkDirs, 0, 4*uint64(x.links))
	if err != nil {
		return nil, err
	}
	ids := make([]ID, x.links)
	for i := range ids {
		ids[i] = DirID(get32(b, 4*i))
		if !x.has(ids[i]) {
			return nil, x.s.damaged
		}
	}
	return ids, nil
}

func (x *Index) has(id ID) bool {
	if id.IsDir() {
		return id.Index() < x.stats.Dirs
	}
	return id.Index() < x.stats.Files
}

// Lookup tells what the layer says of name in dir. It allocates only for a ChildLink.
func (x *Index) Lookup(dir ID, name string) (Child, error) {
	first, n, err := x.Children(dir)
	if err != nil {
		return Child{}, err
	}
	end := first + n
	for lo, hi := first, end; lo < hi; {
		mid := lo + (hi-lo)/2
		r, err := x.s.record(secChildren, mid, childSize)
		if err != nil {
			return Child{}, err
		}
		s, err := x.s.str(secNames, uint64(get32(r, childName)), uint64(r[childLen]))
		if err != nil {
			return Child{}, err
		}
		switch {
		case s < name:
			lo = mid + 1
		case s > name:
			hi = mid
		default:
			return x.child(r)
		}
	}
	return Child{}, nil
}

// Opaque reports whether dir hides what lower layers have in it.
func (x *Index) Opaque(dir ID) (bool, error) {
	r, err := x.dir(dir)
	if err != nil {
		return false, err
	}
	return r[inoFlags]&flagOpaque != 0, nil
}

// Parent returns the directory that holds dir, and dir's name in it, which
// aliases the mapping: it is valid until Close. The root is its own parent, "".
func (x *Index) Parent(dir ID) (ID, string, error) {
	r, err := x.dir(dir)
	if err != nil {
		return 0, "", err
	}
	parent := DirID(get32(r, dirParent))
	if parent >= dir && dir != RootID { // a parent is always numbered first, so that no chain of parents is endless
		return 0, "", x.s.damaged
	}
	name, err := x.s.str(secNames, uint64(get32(r, dirName)), uint64(r[inoNameLen]))
	return parent, name, err
}

// Attr fills a with the attributes of id. An inode that no name leads to any
// more has no links.
func (x *Index) Attr(id ID, a *Attr) error {
	r, err := x.inode(id)
	if err != nil {
		return err
	}
	attrOf(r, id.IsDir(), a)
	return nil
}

// Readlink returns the target of a symbolic link, or io/fs.ErrInvalid when id is
// something else.
func (x *Index) Readlink(id ID) (string, error) {
	r, err := x.inode(id)
	if err != nil {
		return "", err
	}
	if id.IsDir() || get16(r, inoMode)&modeType != modeLink {
		return "", notKind(id, "symbolic link")
	}
	t, err := x.s.str(secNames, uint64(get32(r, fileAux)), uint64(get64(r, fileLen)))
	return strings.Clone(t), err
}

// xattrs returns the heap of sets from id's set on; nil when it has none.
func (x *Index) xattrs(id ID) ([]byte, error) {
	r, err := x.inode(id)
	if err != nil {
		return nil, err
	}
	at := uint64(get32(r, inoXattrs))
	if at == 0 {
		return nil, nil
	}
	at--
	head, err := x.s.bytes(secXattrs, at, xattrCount)
	if err != nil {
		return nil, err
	}
	end := at + xattrCount
	for left := get16(head, 0); left > 0; left-- {
		h, err := x.s.bytes(secXattrs, end, xattrHead)
		if err != nil {
			return nil, err
		}
		end += xattrHead + uint64(get16(h, 0)) + uint64(get32(h, 2))
	}
	return x.s.bytes(secXattrs, at, end-at)
}

// Xattr returns the value of an extended attribute of id; ok is false when it
// has none of that name.
func (x *Index) Xattr(id ID, name string) (value string, ok bool, err error) {
	set, err := x.xattrs(id)
	if err != nil || set == nil {
		return "", false, err
	}
	v, found, valid := xattrOf(set, name)
	if !valid {
		return "", false, x.s.damaged
	}
	return string(v), found, nil
}

// XattrNames returns the names of id's extended attributes, sorted.
func (x *Index) XattrNames(id ID) ([]string, error) {
	set, err := x.xattrs(id)
	if err != nil || set == nil {
		return nil, err
	}
	names, valid := xattrNamesOf(set)
	if !valid {
		return nil, x.s.damaged
	}
	return names, nil
}

// XattrNameSet returns every attribute name that an inode of the layer has,
// sorted. When the file is damaged there, it returns what could be read.
func (x *Index) XattrNameSet() []string {
	b, err := x.s.bytes(secXattrNames, 0, x.s.len(secXattrNames))
	if err != nil {
		return nil
	}
	var names []string
	for len(b) > 0 && len(b) > int(b[0]) {
		names = append(names, string(b[1:1+b[0]]))
		b = b[1+int(b[0]):]
	}
	return names
}

// ContentNumber returns the number of a regular file's content, which counts
// contents in layer order, or NoContent for an empty file. The error is
// ErrDamaged, or io/fs.ErrInvalid when id is no regular file.
func (x *Index) ContentNumber(id ID) (uint32, error) {
	r, err := x.inode(id)
	if err != nil {
		return 0, err
	}
	if id.IsDir() || get16(r, inoMode)&modeType != modeReg {
		return 0, notKind(id, "regular file")
	}
	n := get32(r, fileAux)
	if n >= x.stats.Contents && n != none {
		return 0, x.s.damaged
	}
	return n, nil
}

// ContentByNumber returns content n, for n below Stats().Contents. A content
// that turned out to be a duplicate of another has NChunks 0 and Size 0.
func (x *Index) ContentByNumber(n uint32) (ContentInfo, error) {
	r, err := x.s.record(secContents, n, contentSize)
	if err != nil {
		return ContentInfo{}, err
	}
	c := contentOf(r)
	if c.FirstChunk > x.stats.Chunks || c.NChunks > x.stats.Chunks-c.FirstChunk ||
		c.Size < 0 || c.PackOff < 0 || c.Size > x.stats.PackSize-c.PackOff {
		return ContentInfo{}, x.s.damaged
	}
	if d := get32(r, contDigest); d != none {
		if c.Digest, err = x.digest(d); err != nil {
			return ContentInfo{}, err
		}
	}
	return c, nil
}

func (x *Index) digest(n uint32) (Digest, error) {
	d, err := x.s.record(secDigests, n, digestSize)
	if err != nil {
		return Digest{}, err
	}
	return Digest(d), nil
}

// Content tells where the content of a regular file is. An empty file has no
// chunks and the digest of nothing.
func (x *Index) Content(id ID) (ContentInfo, error) {
	n, err := x.ContentNumber(id)
	if err != nil {
		return ContentInfo{}, err
	}
	if n == none {
		return ContentInfo{Digest: sha256.Sum256(nil)}, nil
	}
	return x.ContentByNumber(n)
}

// Chunk returns chunk n of the layer, for n below Stats().Chunks, and its size
// in bytes.
func (x *Index) Chunk(n uint32) (c Chunk, size int64, err error) {
	r, err := x.s.record(secChunks, n, chunkSize)
	if err != nil {
		return Chunk{}, 0, err
	}
	c = chunkOf(r)
	size = int64(get32(r, chunkLen))
	if c.Off < 0 || c.BlobOff < 0 || c.BlobLen < 0 || c.Inner < 0 || size == 0 {
		return Chunk{}, 0, x.s.damaged
	}
	c.Digest, err = x.digest(get32(r, chunkDigest))
	return c, size, err
}

// chunkOf reads a chunk record; the digest is read apart.
func chunkOf(r []byte) Chunk {
	return Chunk{
		Off:     get64(r, chunkOff),
		BlobOff: get64(r, chunkBlob),
		BlobLen: get64(r, chunkBlobLen),
		Inner:   get64(r, chunkInner),
	}
}

func notDir(id ID) error { return notKind(id, "directory") }

func notKind(id ID, kind string) error {
	return &EntryError{Name: fmt.Sprintf("inode %#x", uint32(id)), Reason: "not a " + kind}
}
