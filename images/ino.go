package images

import (
	"math/bits"

	"github.com/imgfs/imgfs/unionfs"
)

// Ino is an inode number of the mount, which is also its FUSE nodeid. It is an
// address, below 2^48 (overlayfs needs the bits above):
//
//	47 46 45                 26 25                          0
//	+----+---------------------+-----------------------------+
//	|kind|      sequence       |            index            |
//	+----+---------------------+-----------------------------+
//	  0     ---------------- number of a node ---------------   namespace: registries, repositories, control files
//	  1     layer's sequence      inode's index in the layer    anything but a directory, the same in every image
//	  2     view's sequence      layer's ordinal · directory    a directory of one image under one name
//	  3     layer's sequence      directory, or all ones         a directory, or a whiteout, of a layer alone
//
// The ordinal takes as many of the index's top bits as the number of the image's
// layers needs, the directory's number in that layer takes the rest; a directory
// that several layers have is named by the topmost of them. So a directory's
// number is known as soon as its topmost layer has passed it.
type Ino uint64

// Kinds of inodes.
const (
	KindNode  = 0 // of the namespace
	KindFile  = 1 // of a layer
	KindDir   = 2 // of a view
	KindLayer = 3 // of a layer alone, as overlayfs takes it
)

const (
	indexBits = 26
	seqBits   = 20
	maxSeq    = 1<<seqBits - 1
)

// RootIno is the root of the mount (FUSE_ROOT_ID).
const RootIno Ino = 1

// Kind tells what i is an address of.
func (i Ino) Kind() int { return int(i >> (indexBits + seqBits) & 3) }

func (i Ino) seq() uint32   { return uint32(i>>indexBits) & maxSeq }
func (i Ino) index() uint32 { return uint32(i) & (1<<indexBits - 1) }

func fileIno(layer, index uint32) Ino {
	return Ino(KindFile)<<(indexBits+seqBits) | Ino(layer)<<indexBits | Ino(index)
}

// layerIno is the number of directory dir of a layer alone.
func layerIno(layer, dir uint32) Ino {
	return Ino(KindLayer)<<(indexBits+seqBits) | Ino(layer)<<indexBits | Ino(dir)
}

// ordinalBits is how many bits of an index the ordinals of n layers take.
func ordinalBits(n int) int { return bits.Len(uint(max(n, 1) - 1)) }

// dirIno is the number of directory ref in a view of an image of n layers.
func dirIno(view uint32, n int, ref unionfs.Ref) Ino {
	shift := indexBits - ordinalBits(n)
	return Ino(KindDir)<<(indexBits+seqBits) | Ino(view)<<indexBits | Ino(ref.Layer)<<shift | Ino(ref.ID.Index())
}

// dirRef is the directory that a dirIno of an image of n layers addresses.
func dirRef(i Ino, n int) unionfs.Ref {
	shift := indexBits - ordinalBits(n)
	x := i.index()
	return unionfs.Ref{Layer: int(x >> shift), ID: unionfs.DirID(x & (1<<shift - 1))}
}

// maxDirs is how many directories a layer of an image of n layers may have.
func maxDirs(n int) uint32 { return 1 << (indexBits - ordinalBits(n)) }
