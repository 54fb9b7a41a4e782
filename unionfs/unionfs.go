// Package unionfs compiles the layers of a container image and merges them.
//
// A layer is compiled once, by a [Builder], into an immutable layer index
// ([Index], a memory-mapped file). An image is a small merge over the indexes of
// its layers, a [Tree], which stores only the directories that more than one
// layer touches. While a layer is still arriving, its Builder answers the same
// questions as the Index that it will become ([Layer]), and a [Stack] answers
// lookups over layers of both kinds.
//
// The package reads and writes its own files and nothing else. Entry names of
// archives are cleaned here, and only here. The formats are described in
// docs/format.md; whiteouts and opaque directories are those of
// https://github.com/opencontainers/image-spec/blob/main/layer.md.
package unionfs

import "errors"

// Digest is a SHA-256.
type Digest [32]byte

// ErrDamaged reports an index or tree file whose bytes do not match their
// checksums or whose references leave their sections. The file must be made
// again; nothing read from it can be trusted.
var ErrDamaged = errors.New("unionfs: damaged file")

// ID names an inode of one layer. Directories and other inodes are numbered
// apart, each from 0 in the order of their first appearance in the layer. A
// number never changes, not even when the Builder becomes an Index.
type ID uint32

const dirBit = 1 << 31

// RootID is the layer's root directory: directory 0.
const RootID ID = dirBit

// MaxIndex is the largest number a layer gives to an inode (26 bits, because an
// inode number on the mount keeps 26 bits for it).
const MaxIndex = 1<<26 - 1

// DirID is the ID of a layer's directory number i.
func DirID(i uint32) ID { return ID(i) | dirBit }

// FileID is the ID of number i of a layer's inodes that are not directories.
func FileID(i uint32) ID { return ID(i) }

// IsDir reports whether id is a directory.
func (id ID) IsDir() bool { return id&dirBit != 0 }

// Index is id's number among the layer's directories, or among its other inodes.
func (id ID) Index() uint32 { return uint32(id &^ dirBit) }

// Attr is what stat tells of an inode.
type Attr struct {
	Mode      uint32 // st_mode: file type and permission bits
	UID, GID  uint32
	Size      int64 // bytes; the length of the target for a symbolic link, 0 for a directory
	Mtime     int64 // seconds since 1970, may be negative
	MtimeNsec uint32
	Nlink     uint32 // names in the layer; for a directory 2 + its subdirectories
	Rdev      uint32 // as the kernel encodes it for FUSE (new_encode_dev)
	Implicit  bool   // a directory that the layer names only as a parent of something
}

// ChildKind is what a layer says of a name in one of its directories.
type ChildKind uint8

// What a layer says of a name.
const (
	ChildNone     ChildKind = iota // nothing: lower layers decide
	ChildInode                     // the layer has it
	ChildWhiteout                  // the layer hides a lower one
	ChildLink                      // a hard link to a path that the layer itself does not have
)

// Child is what a layer says of one name.
type Child struct {
	Kind   ChildKind
	ID     ID     // for ChildInode
	Target string // for ChildLink: the cleaned path of the target, "a/b"
}

// Chunk is a verified piece of a content, and where the layer's blob has it.
type Chunk struct {
	Off     int64  // bytes into the content
	BlobOff int64  // bytes into the blob as it is stored, of the frame (gzip member, zstd frame, plain bytes) that holds it
	BlobLen int64  // length of that frame, compressed; 0: the chunk is a hole, all zeros
	Inner   int64  // bytes into the decompressed frame
	Digest  Digest // of the chunk's bytes
}

// Content is the content of a regular file as an archive's table tells it.
type Content struct {
	Digest Digest  // of all bytes
	Chunks []Chunk // in order, the first at 0, without gaps; at least one unless the size is 0
}

// Entry is one entry of a layer, as the archive has it: the name is not cleaned,
// nothing is checked.
type Entry struct {
	Name         string
	Type         byte   // a Type constant of archive/tar: TypeReg, TypeDir, TypeSymlink, TypeLink, TypeChar, TypeBlock, TypeFifo
	Mode         uint32 // permission bits with S_ISUID, S_ISGID, S_ISVTX
	UID, GID     int64
	Size         int64
	Mtime        int64 // seconds
	MtimeNsec    uint32
	Linkname     string
	Major, Minor int64
	Xattrs       map[string]string // full names, "security.capability"
	Content      *Content          // nil while the bytes of a regular file are still to come (Builder.SetContent)
}

// ContentInfo is where the content of a regular file is kept.
type ContentInfo struct {
	Digest     Digest
	Size       int64
	PackOff    int64  // bytes into the layer's pack
	FirstChunk uint32 // number of its first chunk among the layer's
	NChunks    uint32
}

// Meta says what blob an index was compiled from.
type Meta struct {
	Blob     Digest // digest of the blob as it is stored
	DiffID   Digest // digest of its uncompressed form; zero when nobody has computed it
	BlobSize int64
	Format   uint8 // a number of the fetch room: how the blob's frames are compressed and reached
}

// Stats are a layer's totals.
type Stats struct {
	Dirs, Files, Names uint32
	Contents, Chunks   uint32
	Expanded           int64 // bytes of all regular files, each inode once
	PackSize           int64 // bytes of the layer's pack when all of it is here
}

// Layer is one layer of a stack: an Index, or a Builder that is not finished.
// Names are single components. Methods are safe for concurrent use.
type Layer interface {
	// Lookup tells what the layer says of name in directory dir.
	Lookup(dir ID, name string) (Child, error)
	// Opaque reports whether dir hides everything that lower layers have in it.
	// A Builder's answer is final only when it is done.
	Opaque(dir ID) (bool, error)
	// Parent returns the directory that holds dir, and dir's name in it. The root is its own parent, with the name "".
	Parent(dir ID) (ID, string, error)
	// Attr fills a with the attributes of id.
	Attr(id ID, a *Attr) error
	// Readlink returns the target of a symbolic link.
	Readlink(id ID) (string, error)
	// Xattr returns the value of an extended attribute; ok is false when id has none of that name.
	Xattr(id ID, name string) (value string, ok bool, err error)
	// XattrNames returns the names of id's extended attributes, sorted.
	XattrNames(id ID) ([]string, error)
	// Content tells where the content of a regular file is. It is complete only when its bytes have passed.
	Content(id ID) (ContentInfo, error)
	// HasImplicit reports whether any directory of the layer is implicit so far.
	HasImplicit() bool
	// Done reports whether the layer is complete: an Index always is.
	Done() bool
}

// Ref names an inode of a stack of layers: the ordinal of a layer, lowest 0, and
// an inode of it. A directory that several layers have is named by the topmost
// layer that has it.
type Ref struct {
	Layer int
	ID    ID
}
