package unionfs

import (
	"encoding/binary"
)

// A layer index is a file of sections (sections.go) of these kinds. The Builder
// keeps the same records in its scratch arrays, so that both answer by the same
// code. docs/format.md draws them.
const (
	indexMagic   = "imgfsidx"
	indexVersion = 1

	secDirs       = 0 // directory records, in the order of their numbers
	secFiles      = 1 // records of the other inodes, in the order of their numbers
	secChildren   = 2 // child records: for each directory a range sorted by name
	secNames      = 3 // names and link targets, without separators
	secXattrs     = 4 // sets of attributes
	secXattrNames = 5 // every attribute name of the layer, each after its length (u8), sorted
	secContents   = 6 // content records, in layer order
	secChunks     = 7 // chunk records; a content's are neighbours
	secDigests    = 8 // digests of contents and chunks
	secLinkDirs   = 9 // numbers (u32) of the directories that have a ChildLink, ascending

	dirSize     = 48
	fileSize    = 48
	childSize   = 12
	contentSize = 32
	chunkSize   = 40
	digestSize  = 32
)

// Fields of the records of both kinds of inode.
const (
	inoMode    = 0  // u16: st_mode
	inoUID     = 4  // u32
	inoGID     = 8  // u32
	inoNsec    = 12 // u32
	inoMtime   = 16 // i64
	inoNlink   = 32 // u32
	inoXattrs  = 44 // u32: 1 + offset of its set in secXattrs; 0 for none
	inoNameLen = 2  // u8, directories: length of its own name
	inoFlags   = 3  // u8, directories: flag*

	dirFirst  = 24 // u32: number of its first child record (in a Builder: 1 + the node last added)
	dirCount  = 28 // u32: children
	dirParent = 36 // u32: number of the directory that holds it
	dirName   = 40 // u32: offset of its own name in secNames

	fileLen  = 24 // i64: size
	fileRdev = 36 // u32
	fileAux  = 40 // u32: content number of a regular file, offset of a symbolic link's target in secNames

	flagImplicit = 1 // only named as a parent of something
	flagOpaque   = 2 // hides everything below
	flagDead     = 4 // no name leads here: a later entry superseded it
)

// Fields of the other records.
const (
	childName = 0 // u32: offset in secNames
	childLen  = 4 // u8
	childKind = 5 // u8: ChildKind
	childID   = 8 // u32: ID; of a ChildLink the offset in secNames of the target, after its length (u16)

	contSize   = 0  // i64: bytes
	contPack   = 8  // i64: bytes into the pack
	contFirst  = 16 // u32: number of its first chunk
	contChunks = 20 // u32
	contDigest = 24 // u32: number in secDigests

	chunkOff     = 0  // i64: bytes into the content
	chunkBlob    = 8  // i64: bytes into the blob
	chunkInner   = 16 // i64: bytes into the decompressed frame
	chunkBlobLen = 24 // i64
	chunkLen     = 32 // u32: bytes
	chunkDigest  = 36 // u32: number in secDigests
)

// none is the content number of a file that has no content, and the digest
// number of a content that is not complete.
const none = 1<<32 - 1

// Fields of the part of the header that a layer index defines.
const (
	metaBlob     = 0  // digest
	metaDiffID   = 32 // digest
	metaBlobSize = 64 // i64
	metaFormat   = 72 // u8
	metaImplicit = 73 // u8: 1 when HasImplicit
	metaNames    = 76 // u32: Stats.Names
	metaExpanded = 80 // i64
	metaPackSize = 88 // i64
	metaDirs     = 96 // u32, and then Files, Contents, Chunks: counts of the sections' records
	metaLen      = 112
)

const modeType = 0o170000

// File types of st_mode.
const (
	modeDir   = 0o040000
	modeReg   = 0o100000
	modeLink  = 0o120000
	modeChar  = 0o020000
	modeBlock = 0o060000
	modeFifo  = 0o010000
)

func get16(r []byte, f int) uint16    { return binary.LittleEndian.Uint16(r[f:]) }
func get32(r []byte, f int) uint32    { return binary.LittleEndian.Uint32(r[f:]) }
func get64(r []byte, f int) int64     { return int64(binary.LittleEndian.Uint64(r[f:])) }
func put16(r []byte, f int, v uint16) { binary.LittleEndian.PutUint16(r[f:], v) }
func put32(r []byte, f int, v uint32) { binary.LittleEndian.PutUint32(r[f:], v) }
func put64(r []byte, f int, v int64)  { binary.LittleEndian.PutUint64(r[f:], uint64(v)) }

// attrOf fills a from an inode's record.
func attrOf(r []byte, isDir bool, a *Attr) {
	*a = Attr{
		Mode:      uint32(get16(r, inoMode)),
		UID:       get32(r, inoUID),
		GID:       get32(r, inoGID),
		Mtime:     get64(r, inoMtime),
		MtimeNsec: get32(r, inoNsec),
		Nlink:     get32(r, inoNlink),
	}
	if isDir {
		a.Implicit = r[inoFlags]&flagImplicit != 0
		return
	}
	a.Size = get64(r, fileLen)
	a.Rdev = get32(r, fileRdev)
}

// putAttr is the reverse of attrOf, but for what is a flag.
func putAttr(r []byte, isDir bool, a *Attr) {
	put16(r, inoMode, uint16(a.Mode))
	put32(r, inoUID, a.UID)
	put32(r, inoGID, a.GID)
	put64(r, inoMtime, a.Mtime)
	put32(r, inoNsec, a.MtimeNsec)
	put32(r, inoNlink, a.Nlink)
	if !isDir {
		put64(r, fileLen, a.Size)
		put32(r, fileRdev, a.Rdev)
	}
}

// contentOf reads a content record; the digest is read apart.
func contentOf(r []byte) ContentInfo {
	return ContentInfo{
		Size:       get64(r, contSize),
		PackOff:    get64(r, contPack),
		FirstChunk: get32(r, contFirst),
		NChunks:    get32(r, contChunks),
	}
}

// A set of attributes is a count (u16), then for each attribute, sorted by name,
// the length of its name (u16) and of its value (u32), the name, the value.
const (
	xattrCount = 2
	xattrHead  = 6
)

// nextXattr cuts the first attribute off the rest of a set. ok is false when
// the set is not one.
func nextXattr(set []byte) (name, value, rest []byte, ok bool) {
	if len(set) < xattrHead {
		return nil, nil, nil, false
	}
	n, v := uint64(get16(set, 0)), uint64(get32(set, 2))
	set = set[xattrHead:]
	if n+v > uint64(len(set)) {
		return nil, nil, nil, false
	}
	return set[:n], set[n : n+v], set[n+v:], true
}

// xattrOf finds an attribute in a heap of sets that begins with the set wanted.
func xattrOf(heap []byte, name string) (value []byte, found, ok bool) {
	if len(heap) < xattrCount {
		return nil, false, false
	}
	left := get16(heap, 0)
	heap = heap[xattrCount:]
	for ; left > 0; left-- {
		n, v, rest, ok := nextXattr(heap)
		if !ok {
			return nil, false, false
		}
		if string(n) == name {
			return v, true, true
		}
		heap = rest
	}
	return nil, false, true
}

// xattrNamesOf lists the names in the set that heap begins with.
func xattrNamesOf(heap []byte) (names []string, ok bool) {
	if len(heap) < xattrCount {
		return nil, false
	}
	left := get16(heap, 0)
	heap = heap[xattrCount:]
	for ; left > 0; left-- {
		n, _, rest, ok := nextXattr(heap)
		if !ok {
			return nil, false
		}
		names = append(names, string(n))
		heap = rest
	}
	return names, true
}
