package integration

import (
	"archive/tar"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// An inode is what a directory tree shows of one name.
type inode struct {
	stat   unix.Stat_t
	target string
	xattrs map[string]string
}

func (n inode) typ() uint32   { return n.stat.Mode & unix.S_IFMT }
func (n inode) mtime() int64  { return n.stat.Mtim.Nano() }
func (n inode) isDir() bool   { return n.typ() == unix.S_IFDIR }
func (n inode) isFile() bool  { return n.typ() == unix.S_IFREG }
func (n inode) isLink() bool  { return n.typ() == unix.S_IFLNK }
func (n inode) special() bool { return n.typ() == unix.S_IFCHR || n.typ() == unix.S_IFBLK }

// A snapshot holds every name of a tree, relative to its root, which is ".".
type snapshot map[string]inode

// takeSnapshot walks the tree at root; skip prunes names (and what is below).
func takeSnapshot(root string, skip func(rel string) bool) (snapshot, error) {
	s := snapshot{}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		if skip != nil && skip(rel) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		n, err := readInode(p)
		if err != nil {
			return err
		}
		s[rel] = n
		return nil
	})
	return s, err
}

func readInode(p string) (n inode, err error) {
	if err := unix.Lstat(p, &n.stat); err != nil {
		return n, &fs.PathError{Op: "lstat", Path: p, Err: err}
	}
	if n.isLink() {
		if n.target, err = os.Readlink(p); err != nil {
			return n, err
		}
	}
	n.xattrs, err = readXattrs(p)
	return n, err
}

func readXattrs(p string) (map[string]string, error) {
	buf := make([]byte, 64<<10)
	size, err := unix.Llistxattr(p, buf)
	if err == unix.ENOTSUP || size == 0 && err == nil {
		return nil, nil
	} else if err != nil {
		return nil, &fs.PathError{Op: "llistxattr", Path: p, Err: err}
	}
	attrs := map[string]string{}
	value := make([]byte, 64<<10)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:size]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			return nil, &fs.PathError{Op: "lgetxattr " + name, Path: p, Err: err}
		}
		attrs[name] = string(value[:n])
	}
	return attrs, nil
}

// same reports whether a name has not changed between two snapshots.
func (n inode) same(m inode) bool {
	a, b := n.stat, m.stat
	return a.Mode == b.Mode && a.Uid == b.Uid && a.Gid == b.Gid && a.Rdev == b.Rdev && a.Ino == b.Ino && n.mtime() == m.mtime() &&
		(n.isDir() || a.Size == b.Size) && n.target == m.target && maps.Equal(n.xattrs, m.xattrs)
}

// writeLayer writes the layer that leads from snapshot old to snapshot now of the
// tree at root: what is new or changed, and whiteouts for what is gone.
func writeLayer(w io.Writer, root string, old, now snapshot) error {
	tw := tar.NewWriter(w)
	written := map[uint64]string{} // inode → the name it was written (or stands below) under
	for name, n := range old {
		if m, ok := now[name]; ok && !n.isDir() && n.same(m) {
			if first, ok := written[n.stat.Ino]; !ok || name < first {
				written[n.stat.Ino] = name
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(now)) {
		n := now[name]
		if o, ok := old[name]; ok && o.same(n) || name == "." {
			continue
		}
		if err := writeEntry(tw, root, name, n, written); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(old)) {
		if _, ok := now[name]; ok {
			continue
		}
		if parent, ok := now[filepath.Dir(name)]; !ok || !parent.isDir() {
			continue // gone with its parent
		}
		wh := whiteout(name)
		if err := tw.WriteHeader(&wh.head); err != nil {
			return err
		}
	}
	return tw.Close()
}

func writeEntry(tw *tar.Writer, root, name string, n inode, written map[uint64]string) error {
	h := tar.Header{
		Name: name, Mode: int64(n.stat.Mode & 0o7777), Uid: int(n.stat.Uid), Gid: int(n.stat.Gid),
		ModTime: time.Unix(0, n.mtime()), Format: tar.FormatPAX, PAXRecords: map[string]string{},
	}
	for k, v := range n.xattrs {
		h.PAXRecords["SCHILY.xattr."+k] = v
	}
	switch n.typ() {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, n.stat.Size
	case unix.S_IFLNK:
		h.Typeflag, h.Linkname = tar.TypeSymlink, n.target
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = map[uint32]byte{unix.S_IFCHR: tar.TypeChar, unix.S_IFBLK: tar.TypeBlock}[n.typ()]
		h.Devmajor, h.Devminor = int64(unix.Major(n.stat.Rdev)), int64(unix.Minor(n.stat.Rdev))
	default:
		return nil // a socket: no archive holds one
	}
	if n.stat.Nlink > 1 && !n.isDir() {
		if first, ok := written[n.stat.Ino]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			written[n.stat.Ino] = name
		}
	}
	if err := tw.WriteHeader(&h); err != nil || h.Size == 0 {
		return err
	}
	f, err := os.Open(filepath.Join(root, name))
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(tw, f)
	return err
}
