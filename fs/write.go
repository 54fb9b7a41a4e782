package fs

import (
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// Images are read-only, but the superblock is not: mkdir, rmdir, rename, symlink
// and utimes manage them. So everything that would write is refused here, by name; ENOSYS would be
// remembered by the kernel for the whole mount.

// refuse is the answer to what would change node h: inside an image EROFS, in
// the namespace EPERM, because only directories are made and removed there.
func (f *fileSystem) refuse(nodeid uint64) fuse.Status {
	f.counts[opOther].Add(1)
	if images.Ino(nodeid).Kind() == images.KindNode {
		return fuse.EPERM
	}
	return fuse.EROFS
}

// Write refuses, and has the kernel drop the inode's pages: without OPEN nothing
// keeps root from mapping a file shared and writing to the page cache, which all
// images share. What reaches us is the write-back; after it the pages would
// count as clean.
func (f *fileSystem) Write(_ <-chan struct{}, in *fuse.WriteIn, _ []byte) (uint32, fuse.Status) {
	f.counts[opWrite].Add(1)
	f.notify.inode(in.NodeId)
	return 0, fuse.EROFS
}

// Writev is Write.
func (f *fileSystem) Writev(cancel <-chan struct{}, in *fuse.WriteIn, _ [][]byte) (uint32, fuse.Status) {
	return f.Write(cancel, in, nil)
}

// SetAttr asks an image's registry again, when it is touch on the image's root
// directory. Else it refuses; a change of the size may have touched pages.
func (f *fileSystem) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	f.counts[opSetattr].Add(1)
	ino := images.Ino(in.NodeId)
	switch ino.Kind() {
	case images.KindNode:
		return fuse.EPERM
	case images.KindDir:
		n, ok := f.store.RootOf(ino)
		if !ok || !touches(in.Valid) {
			return fuse.EROFS
		}
		if err := f.space.touch(n, in.Caller.Uid, resent(&in.InHeader)); err != nil {
			return f.space.refused("touch", n.String(), err)
		}
		return f.getAttr(ino, out)
	}
	if in.Valid&fuse.FATTR_SIZE != 0 {
		f.notify.inode(in.NodeId)
	}
	return fuse.EROFS
}

// resent reports whether the kernel asks once more, because the server that it
// asked first has died: what is asked for may have been done (FUSE_UNIQUE_RESEND).
// The operations on names then take for a success what they would have left.
func resent(h *fuse.InHeader) bool { return h.Unique&resendBit != 0 }

// resendBit is added to the number of a request that is sent again.
const resendBit = 1 << 63

// Mkdir pulls, in the namespace.
func (f *fileSystem) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	f.counts[opMkdir].Add(1)
	dir := images.Ino(in.NodeId)
	if dir.Kind() != images.KindNode {
		return fuse.EROFS
	}
	return f.space.mkdir(dir, name, resent(&in.InHeader), out)
}

// Rmdir untags, in the namespace.
func (f *fileSystem) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	f.counts[opRmdir].Add(1)
	dir := images.Ino(h.NodeId)
	if dir.Kind() != images.KindNode {
		return fuse.EROFS
	}
	if f.control.has(dir) {
		return f.control.rmdir(dir, name)
	}
	return f.space.rmdir(dir, name, resent(h))
}

// Rename retags, in the namespace. RENAME and RENAME2 come here alike, the first
// without flags.
func (f *fileSystem) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	f.counts[opRename].Add(1)
	return f.space.rename(in, oldName, newName)
}

// Symlink tags, in the namespace.
func (f *fileSystem) Symlink(_ <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	f.counts[opSymlink].Add(1)
	if images.Ino(h.NodeId).Kind() == images.KindDir {
		return f.space.retag(h, name, target, out)
	}
	return f.space.symlink(h, name, target, out)
}

// Mknod refuses.
func (f *fileSystem) Mknod(_ <-chan struct{}, in *fuse.MknodIn, _ string, _ *fuse.EntryOut) fuse.Status {
	return f.refuse(in.NodeId)
}

// Unlink refuses.
func (f *fileSystem) Unlink(_ <-chan struct{}, h *fuse.InHeader, _ string) fuse.Status {
	return f.refuse(h.NodeId)
}

// Link refuses.
func (f *fileSystem) Link(_ <-chan struct{}, in *fuse.LinkIn, _ string, _ *fuse.EntryOut) fuse.Status {
	return f.refuse(in.NodeId)
}

// Create refuses.
func (f *fileSystem) Create(_ <-chan struct{}, in *fuse.CreateIn, _ string, _ *fuse.CreateOut) fuse.Status {
	return f.refuse(in.NodeId)
}

// Tmpfile refuses.
func (f *fileSystem) Tmpfile(_ <-chan struct{}, in *fuse.CreateIn, _ *fuse.CreateOut) fuse.Status {
	return f.refuse(in.NodeId)
}

// SetXAttr refuses.
func (f *fileSystem) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, _ string, _ []byte) fuse.Status {
	return f.refuse(in.NodeId)
}

// RemoveXAttr refuses.
func (f *fileSystem) RemoveXAttr(_ <-chan struct{}, h *fuse.InHeader, _ string) fuse.Status {
	return f.refuse(h.NodeId)
}

// Fallocate refuses.
func (f *fileSystem) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	return f.refuse(in.NodeId)
}

// CopyFileRange refuses: its target is on this file system.
func (f *fileSystem) CopyFileRange(_ <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	return 0, f.refuse(in.NodeId)
}

// Access lets the kernel decide, by its own checks.
func (f *fileSystem) Access(_ <-chan struct{}, _ *fuse.AccessIn) fuse.Status {
	return fuse.Status(syscall.ENOSYS)
}
