package fs

import (
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// factPrefix begins the names of the attributes that tell of an image and of each
// of its files. They are never listed, so that copies do not carry them.
const factPrefix = "user.imgfs."

// fact answers a GETXATTR for one of them. Tools that ask every file for some
// attribute do not ask for these, so that ENODATA, which makes nobody stop
// asking, costs nothing.
func (f *fileSystem) fact(ino images.Ino, name string, dest []byte) (uint32, fuse.Status) {
	name = strings.TrimPrefix(name, factPrefix)
	value, ok, err := f.store.Fact(background(), ino, name)
	if err != nil {
		return 0, f.fail(ino, "getxattr", err, dataErrno(err))
	}
	if name == "error" && !ok {
		value, ok = f.errors.latest(f.object(ino))
	}
	if !ok {
		return 0, fuse.ENODATA
	}
	return xattrValue(value, dest)
}

// object is what an inode of an image is called in .imgfs/errors.
func (f *fileSystem) object(ino images.Ino) string {
	if n, ok := f.store.NameOf(ino); ok {
		return n.String()
	}
	if n, ok := f.store.FileOf(ino); ok {
		return n
	}
	return "a layer"
}

// xattrValue answers a GETXATTR with a value, or with its size when dest is too
// small.
func xattrValue(value string, dest []byte) (uint32, fuse.Status) {
	if len(dest) < len(value) {
		return uint32(len(value)), fuse.ERANGE
	}
	return uint32(copy(dest, value)), fuse.OK
}

// layerXattr reports whether a directory of a layer alone may tell the kernel's
// overlayfs that it is opaque. Nothing else of overlayfs' own passes: a layer
// could name any other directory by a redirect.
func layerXattr(ino images.Ino, name string) bool {
	return ino.Kind() == images.KindLayer && (name == "trusted.overlay.opaque" || name == "user.overlay.opaque")
}

// blocks is a regular file's st_blocks: its size, or what of it is on this disk.
func (f *fileSystem) blocks(ino images.Ino, size int64) uint64 {
	if f.o.Du == DuCached {
		// What cannot be told is nothing: a stat is not to fail for it.
		size, _ = f.store.CachedBytes(background(), ino)
	}
	return uint64(size+511) / 512
}
