package fs

import (
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// Operations that are counted. The names are the protocol's.
const (
	opLookup = iota
	opGetattr
	opSetattr
	opReadlink
	opOpen
	opRead
	opWrite
	opStatfs
	opGetxattr
	opListxattr
	opOpendir
	opReaddir
	opReaddirplus
	opMkdir
	opRmdir
	opSymlink
	opRename
	opForget
	opFlush
	opIoctl
	opOther
	opCount
)

// opNames are the names of the counted operations, in their order.
var opNames = [opCount]string{"LOOKUP", "GETATTR", "SETATTR", "READLINK", "OPEN", "READ", "WRITE", "STATFS", "GETXATTR",
	"LISTXATTR", "OPENDIR", "READDIR", "READDIRPLUS", "MKDIR", "RMDIR", "SYMLINK", "RENAME", "FORGET", "FLUSH", "IOCTL", "OTHER"}

// counts are the messages of the kernel by operation.
type counts [opCount]atomic.Int64

func setTime(sec *uint64, nsec *uint32, t time.Time) {
	*sec, *nsec = uint64(t.Unix()), uint32(t.Nanosecond())
}

func setTimeout(sec *uint64, nsec *uint32, d time.Duration) {
	*sec, *nsec = uint64(d/time.Second), uint32(d%time.Second)
}

// fill turns the attributes of an inode of an image into the kernel's.
func (f *fileSystem) fill(ino images.Ino, a *images.Attr, out *fuse.Attr) {
	mode := a.Mode
	out.Blocks = 0
	if mode&syscall.S_IFMT == syscall.S_IFREG {
		// The expanded size; nothing for directories and links, so that the
		// difference of two du is what the files differ by.
		out.Blocks = f.blocks(ino, a.Size)
		if f.o.AllowOther && !f.o.ExactModes {
			mode &^= 0o222 // nobody shall map it shared and writable
		}
	}
	out.Ino = uint64(ino)
	out.Size = uint64(a.Size)
	out.Mode = mode
	out.Nlink = a.Nlink
	out.Uid, out.Gid = a.UID, a.GID
	out.Rdev = a.Rdev
	out.Blksize = 4096
	out.Mtime, out.Mtimensec = uint64(a.Mtime), a.MtimeNsec
	out.Atime, out.Atimensec = out.Mtime, out.Mtimensec
	out.Ctime, out.Ctimensec = out.Mtime, out.Mtimensec
}

// fillEntry makes the entry of an inode of an image. Until its layer has passed
// whole its number stands, but its attributes may change.
func (f *fileSystem) fillEntry(ino images.Ino, a *images.Attr, final bool, out *fuse.EntryOut) {
	out.NodeId = uint64(ino)
	f.fill(ino, a, &out.Attr)
	setTimeout(&out.EntryValid, &out.EntryValidNsec, day)
	setTimeout(&out.AttrValid, &out.AttrValidNsec, f.attrTimeout(a, final))
}

// Lookup finds a name in a directory.
func (f *fileSystem) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	f.counts[opLookup].Add(1)
	if len(name) > syscall.NAME_MAX {
		return fuse.Status(syscall.ENAMETOOLONG)
	}
	dir := images.Ino(h.NodeId)
	switch dir.Kind() {
	case images.KindNode:
		switch {
		case f.control.has(dir):
			return f.control.lookup(dir, name, h.Pid, out)
		case dir == images.RootIno && name == controlDir:
			return f.control.self(out)
		}
		return f.space.lookup(dir, name, h.Caller, out)
	case images.KindFile:
		return fuse.ENOTDIR
	}
	var a images.Attr
	ino, final, err := f.store.Lookup(background(), dir, name, &a)
	if err != nil {
		return f.fail(dir, "lookup", err, dataErrno(err))
	}
	if ino == 0 {
		out.NodeId = 0
		setTimeout(&out.EntryValid, &out.EntryValidNsec, day)
		return fuse.OK
	}
	f.fillEntry(ino, &a, final, out)
	return fuse.OK
}

// fail logs why an inode of an image could not be used.
func (f *fileSystem) fail(ino images.Ino, op string, err error, errno syscall.Errno) fuse.Status {
	if errors.Is(err, images.ErrStale) {
		return fuse.Status(errno) // its image was removed; nothing is wrong
	}
	what := f.object(ino)
	if f.errors.add(what, op, errno, err) {
		f.log.Error(op+" failed", "object", what, "ino", uint64(ino), "err", err)
	}
	return fuse.Status(errno)
}

// GetAttr tells the attributes of a node.
func (f *fileSystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	f.counts[opGetattr].Add(1)
	ino := images.Ino(in.NodeId)
	if ino.Kind() == images.KindNode {
		if f.control.has(ino) {
			return f.control.getattr(ino, out)
		}
		return f.space.getattr(ino, out)
	}
	return f.getAttr(ino, out)
}

// getAttr tells the attributes of an inode of an image.
func (f *fileSystem) getAttr(ino images.Ino, out *fuse.AttrOut) fuse.Status {
	var a images.Attr
	final, err := f.store.Stat(background(), ino, &a)
	if err == nil && !final && a.Implicit {
		// No layer has named this directory so far, so that its times are not
		// known. A walk does not ask for them (Lookup); who does waits, and never
		// sees them change.
		if err = f.store.Settle(background(), ino); err == nil {
			final, err = f.store.Stat(background(), ino, &a)
		}
	}
	if err != nil {
		return f.fail(ino, "stat", err, dataErrno(err))
	}
	f.fill(ino, &a, &out.Attr)
	setTimeout(&out.AttrValid, &out.AttrValidNsec, f.attrTimeout(&a, final))
	return fuse.OK
}

// attrTimeout is how long the kernel may keep attributes. Those of a layer that
// has not passed whole are asked for again; where the kernel checks permissions
// it asks at every step of a walk, and is spared that for a second. How much of a
// file is cached changes.
func (f *fileSystem) attrTimeout(a *images.Attr, final bool) time.Duration {
	switch {
	case f.o.Du == DuCached && a.Mode&syscall.S_IFMT == syscall.S_IFREG:
		return 0
	case final:
		return day
	case f.o.AllowOther:
		return time.Second
	}
	return 0
}

// Readlink returns the target of a symbolic link.
func (f *fileSystem) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	f.counts[opReadlink].Add(1)
	ino := images.Ino(h.NodeId)
	if ino.Kind() == images.KindNode {
		if f.control.has(ino) {
			return f.control.readlink(ino)
		}
		return f.space.readlink(ino)
	}
	target, err := f.store.Readlink(background(), ino)
	if err != nil {
		return nil, f.fail(ino, "readlink", err, dataErrno(err))
	}
	return []byte(target), fuse.OK
}

// Open answers ENOSYS, after which the kernel asks no more, keeps the page cache
// across opens, and a server without state can follow this one. Kernels that do
// not know this get a handle that means nothing.
func (f *fileSystem) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	f.counts[opOpen].Add(1)
	if !f.handles {
		return fuse.ENOSYS
	}
	if in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return fuse.EROFS
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

// OpenDir is as Open.
func (f *fileSystem) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	f.counts[opOpendir].Add(1)
	if !f.handles {
		return fuse.ENOSYS
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_CACHE_DIR
	return fuse.OK
}

// Read reads a file.
func (f *fileSystem) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	f.counts[opRead].Add(1)
	ino := images.Ino(in.NodeId)
	p := buf[:min(len(buf), int(in.Size))]
	switch ino.Kind() {
	case images.KindNode:
		if !f.control.has(ino) {
			return nil, fuse.EISDIR
		}
		return f.control.read(ino, p, int64(in.Offset))
	case images.KindDir, images.KindLayer:
		return nil, fuse.EISDIR
	}
	n, err := f.store.ReadAt(background(), ino, p, int64(in.Offset))
	if err != nil {
		return nil, f.fail(ino, "read", err, dataErrno(err))
	}
	return fuse.ReadResultData(p[:n]), fuse.OK
}

// StatFs tells of the cache: its limit, and what of it is free.
func (f *fileSystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	f.counts[opStatfs].Add(1)
	const block = 4096
	u := f.store.Usage()
	out.Bsize, out.Frsize, out.NameLen = block, block, syscall.NAME_MAX
	out.Blocks = uint64(u.Limit) / block
	free := max(min(u.Limit-u.Used, u.Free), 0)
	out.Bfree = uint64(free) / block
	out.Bavail = out.Bfree
	out.Files, out.Ffree = 1<<46, 1<<46-1 // numbers do not run out
	return fuse.OK
}

// GetXAttr answers so that programs stop asking: ls remembers for a device that
// an attribute is not supported. A name that no layer here has is not supported;
// one that some layer has is missing on this inode.
func (f *fileSystem) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	f.counts[opGetxattr].Add(1)
	ino := images.Ino(h.NodeId)
	opaque := layerXattr(ino, name)
	if hiddenXattr(name) && !opaque {
		return 0, fuse.ENODATA // overlayfs above us refuses directories on any other answer
	}
	if ino.Kind() != images.KindNode && strings.HasPrefix(name, factPrefix) {
		return f.fact(ino, name, dest)
	}
	if ino.Kind() == images.KindNode || !opaque && !f.store.CarriesXattr(name) {
		return 0, fuse.Status(syscall.EOPNOTSUPP)
	}
	value, ok, err := f.store.Xattr(background(), ino, name)
	if err != nil {
		return 0, f.fail(ino, "getxattr", err, dataErrno(err))
	}
	if !ok {
		return 0, fuse.ENODATA
	}
	return xattrValue(value, dest)
}

// ListXAttr lists an inode's extended attributes.
func (f *fileSystem) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	f.counts[opListxattr].Add(1)
	ino := images.Ino(h.NodeId)
	if ino.Kind() == images.KindNode {
		return 0, fuse.OK
	}
	names, err := f.store.XattrNames(background(), ino)
	if err != nil {
		return 0, f.fail(ino, "listxattr", err, dataErrno(err))
	}
	size, n := 0, 0
	for _, name := range names {
		if hiddenXattr(name) && !layerXattr(ino, name) || strings.HasPrefix(name, factPrefix) {
			continue
		}
		size += len(name) + 1
		if size <= len(dest) {
			n += copy(dest[n:], name)
			dest[n] = 0
			n++
		}
	}
	if size > len(dest) {
		return uint32(size), fuse.ERANGE
	}
	return uint32(size), fuse.OK
}

// hiddenXattr reports whether an attribute of a layer is overlayfs' own: it
// would tell an overlayfs above us what the layer has already told us.
func hiddenXattr(name string) bool {
	return strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.")
}

// ReadDir lists a directory.
func (f *fileSystem) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	f.counts[opReaddir].Add(1)
	return f.readDir(in, out, false)
}

// ReadDirPlus lists a directory with the attributes of what it holds, which the
// kernel then need not ask for.
func (f *fileSystem) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	f.counts[opReaddirplus].Add(1)
	return f.readDir(in, out, true)
}

func (f *fileSystem) readDir(in *fuse.ReadIn, out *fuse.DirEntryList, plus bool) fuse.Status {
	dir := images.Ino(in.NodeId)
	switch dir.Kind() {
	case images.KindNode:
		if f.control.has(dir) {
			return f.control.readDir(dir, in.Offset, out, plus)
		}
		return f.space.readDir(dir, in.Offset, out, plus)
	case images.KindFile:
		return fuse.ENOTDIR
	}
	pos := int(in.Offset)
	if pos < 2 {
		parent, err := f.store.Parent(background(), dir)
		if err != nil {
			return f.fail(dir, "readdir", err, dataErrno(err))
		}
		if !addDots(out, pos, dir, parent, plus) {
			return fuse.OK
		}
		pos = 2
	}
	err := f.store.ReadDir(background(), dir, pos-2, func(next int, e images.Entry, a *images.Attr) bool {
		d := fuse.DirEntry{Name: e.Name, Mode: a.Mode, Ino: uint64(e.Ino), Off: uint64(next + 2)}
		if !plus {
			return out.AddDirEntry(d)
		}
		entry := out.AddDirLookupEntry(d)
		if entry == nil {
			return false
		}
		f.fillEntry(e.Ino, a, true, entry)
		return true
	})
	if err != nil {
		return f.fail(dir, "readdir", err, dataErrno(err))
	}
	return fuse.OK
}

// addDots adds "." and "..", from position pos on. It returns false when out is
// full. They carry no attributes: the kernel ignores them there.
func addDots(out *fuse.DirEntryList, pos int, dir, parent images.Ino, plus bool) bool {
	dots := [2]fuse.DirEntry{{Name: ".", Ino: uint64(dir)}, {Name: "..", Ino: uint64(parent)}}
	for i := pos; i < 2; i++ {
		d := dots[i]
		d.Mode, d.Off = syscall.S_IFDIR, uint64(i+1)
		if plus && out.AddDirLookupEntry(d) == nil || !plus && !out.AddDirEntry(d) {
			return false
		}
	}
	return true
}

// Flush answers ENOSYS, after which a close is no message.
func (f *fileSystem) Flush(_ <-chan struct{}, _ *fuse.FlushIn) fuse.Status {
	f.counts[opFlush].Add(1)
	return fuse.ENOSYS
}

// Forget is nothing but for the nodes of .imgfs: nodeids are addresses.
func (f *fileSystem) Forget(nodeid, lookups uint64) {
	f.counts[opForget].Add(1)
	if ino := images.Ino(nodeid); f.control.has(ino) {
		f.control.forget(ino, lookups)
	}
}

// Ioctl answers ENOTTY: python asks every file whether it is a terminal.
func (f *fileSystem) Ioctl(_ <-chan struct{}, _ *fuse.IoctlIn, _ []byte, _ *fuse.IoctlOut, _ []byte) fuse.Status {
	f.counts[opIoctl].Add(1)
	return fuse.Status(syscall.ENOTTY)
}
