package unionfs

import (
	"bytes"
	"io"
	iofs "io/fs"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// treeFS shows a Tree through the interfaces of io/fs.
type treeFS struct {
	t       *Tree
	content func(Ref) ([]byte, error)
}

// FS shows the tree as a file system: an [io/fs.ReadDirFS], [io/fs.StatFS] and
// [io/fs.ReadLinkFS]. Open and Stat follow symbolic links, inside the root. What a
// regular file holds comes from content, at every Open; the tree itself does not
// have it. A nil content makes such opens fail with io/fs.ErrInvalid. FileInfo.Sys
// is the file's *Attr.
func (t *Tree) FS(content func(Ref) ([]byte, error)) iofs.FS { return &treeFS{t, content} }

// Resolve finds the file or directory at name, which is as [io/fs.ValidPath] has
// it. Symbolic links are followed, inside the root. It allocates; the error is an
// *io/fs.PathError: io/fs.ErrNotExist, io/fs.ErrInvalid, ErrDamaged.
func (t *Tree) Resolve(name string) (Ref, error) {
	return (&treeFS{t: t}).resolve("resolve", name, true)
}

// lookup, dir and readlink make a Tree a namespace.
func (t *Tree) lookup(dir Ref, name string) (Ref, bool, error) { return t.Lookup(dir, name) }

func (t *Tree) dir(p Ref) bool { return p.ID.IsDir() }

func (t *Tree) readlink(p Ref) (string, error) { return readSymlink(t.layers[p.Layer], p.ID) }

// resolve finds name; follow says whether a symbolic link at its end is followed.
func (f *treeFS) resolve(op, name string, end bool) (Ref, error) {
	if !iofs.ValidPath(name) {
		return Ref{}, &iofs.PathError{Op: op, Path: name, Err: iofs.ErrInvalid}
	}
	ref, err := f.walk(name, end)
	if err != nil {
		return Ref{}, &iofs.PathError{Op: op, Path: name, Err: err}
	}
	return ref, nil
}

func (f *treeFS) walk(name string, end bool) (Ref, error) {
	at := []Ref{f.t.Root()}
	for hops := 0; hops <= MaxHops; hops++ {
		if strings.HasPrefix(name, "/") {
			at = at[:1]
		}
		name = strings.Trim(name, "/")
		if name == "" || name == "." {
			return at[len(at)-1], nil
		}
		dir, base := path.Split(name)
		if base == "." || base == ".." {
			dir, base = name, ""
		}
		way, ok, err := follow(f.t, at, dir)
		if err != nil || !ok {
			return Ref{}, absent(err)
		}
		if base == "" {
			return way[len(way)-1], nil
		}
		ref, ok, err := f.t.Lookup(way[len(way)-1], base)
		if err != nil || !ok {
			return Ref{}, absent(err)
		}
		if ref.ID.IsDir() || !end {
			return ref, nil
		}
		target, err := f.t.readlink(ref)
		if err != nil || target == "" {
			return ref, err
		}
		at, name = way, target
	}
	return Ref{}, iofs.ErrNotExist
}

// absent is err, or that something does not exist if there is none.
func absent(err error) error {
	if err == nil {
		return iofs.ErrNotExist
	}
	return err
}

func (f *treeFS) Open(name string) (iofs.File, error) {
	ref, err := f.resolve("open", name, true)
	if err != nil {
		return nil, err
	}
	info, err := f.info(ref, path.Base(name))
	if err != nil {
		return nil, &iofs.PathError{Op: "open", Path: name, Err: err}
	}
	if info.IsDir() {
		return &treeDir{f: f, ref: ref, info: info, name: name}, nil
	}
	var data []byte
	if info.Mode().IsRegular() {
		if f.content == nil {
			return nil, &iofs.PathError{Op: "open", Path: name, Err: iofs.ErrInvalid}
		}
		if data, err = f.content(ref); err != nil {
			return nil, &iofs.PathError{Op: "open", Path: name, Err: err}
		}
	}
	return &treeFile{bytes.NewReader(data), info}, nil
}

func (f *treeFS) Stat(name string) (iofs.FileInfo, error) { return f.stat("stat", name, true) }

func (f *treeFS) Lstat(name string) (iofs.FileInfo, error) { return f.stat("lstat", name, false) }

func (f *treeFS) stat(op, name string, end bool) (iofs.FileInfo, error) {
	ref, err := f.resolve(op, name, end)
	if err != nil {
		return nil, err
	}
	info, err := f.info(ref, path.Base(name))
	if err != nil {
		return nil, &iofs.PathError{Op: op, Path: name, Err: err}
	}
	return info, nil
}

func (f *treeFS) ReadLink(name string) (string, error) {
	ref, err := f.resolve("readlink", name, false)
	if err != nil {
		return "", err
	}
	target, err := "", error(nil)
	if !ref.ID.IsDir() {
		target, err = f.t.readlink(ref)
	}
	if err == nil && target == "" {
		err = iofs.ErrInvalid
	}
	if err != nil {
		return "", &iofs.PathError{Op: "readlink", Path: name, Err: err}
	}
	return strings.Clone(target), nil
}

func (f *treeFS) ReadDir(name string) ([]iofs.DirEntry, error) {
	ref, err := f.resolve("readdir", name, true)
	if err != nil {
		return nil, err
	}
	if !ref.ID.IsDir() {
		return nil, &iofs.PathError{Op: "readdir", Path: name, Err: iofs.ErrInvalid}
	}
	list, _, err := f.list(ref, 0, -1)
	if err != nil {
		return list, &iofs.PathError{Op: "readdir", Path: name, Err: err}
	}
	return list, nil
}

// list returns up to n entries of dir from pos on, all if n is not positive, and
// the position behind them.
func (f *treeFS) list(dir Ref, pos, n int) ([]iofs.DirEntry, int, error) {
	list := []iofs.DirEntry{}
	var failed error
	err := f.t.ReadDir(dir, pos, func(next int, name string, ref Ref) bool {
		info, err := f.info(ref, name)
		if err != nil {
			failed = err
			return false
		}
		list, pos = append(list, iofs.FileInfoToDirEntry(info)), next
		return len(list) != n
	})
	if err == nil {
		err = failed
	}
	return list, pos, err
}

func (f *treeFS) info(ref Ref, name string) (*treeInfo, error) {
	i := &treeInfo{name: strings.Clone(name)}
	return i, f.t.Attr(ref, &i.attr)
}

// treeInfo is an io/fs.FileInfo.
type treeInfo struct {
	name string
	attr Attr
}

func (i *treeInfo) Name() string       { return i.name }
func (i *treeInfo) Size() int64        { return i.attr.Size }
func (i *treeInfo) IsDir() bool        { return i.Mode().IsDir() }
func (i *treeInfo) Sys() any           { return &i.attr }
func (i *treeInfo) ModTime() time.Time { return time.Unix(i.attr.Mtime, int64(i.attr.MtimeNsec)) }

func (i *treeInfo) Mode() iofs.FileMode {
	mode := iofs.FileMode(i.attr.Mode & 0o777)
	switch i.attr.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		mode |= iofs.ModeDir
	case unix.S_IFLNK:
		mode |= iofs.ModeSymlink
	case unix.S_IFCHR:
		mode |= iofs.ModeDevice | iofs.ModeCharDevice
	case unix.S_IFBLK:
		mode |= iofs.ModeDevice
	case unix.S_IFIFO:
		mode |= iofs.ModeNamedPipe
	}
	if i.attr.Mode&unix.S_ISUID != 0 {
		mode |= iofs.ModeSetuid
	}
	if i.attr.Mode&unix.S_ISGID != 0 {
		mode |= iofs.ModeSetgid
	}
	if i.attr.Mode&unix.S_ISVTX != 0 {
		mode |= iofs.ModeSticky
	}
	return mode
}

// treeFile is an open file that is no directory.
type treeFile struct {
	*bytes.Reader
	info *treeInfo
}

func (f *treeFile) Stat() (iofs.FileInfo, error) { return f.info, nil }
func (f *treeFile) Close() error                 { return nil }

// treeDir is an open directory.
type treeDir struct {
	f    *treeFS
	ref  Ref
	info *treeInfo
	name string
	pos  int
}

func (d *treeDir) Stat() (iofs.FileInfo, error) { return d.info, nil }
func (d *treeDir) Close() error                 { return nil }

func (d *treeDir) Read([]byte) (int, error) {
	return 0, &iofs.PathError{Op: "read", Path: d.name, Err: iofs.ErrInvalid}
}

func (d *treeDir) ReadDir(n int) ([]iofs.DirEntry, error) {
	list, pos, err := d.f.list(d.ref, d.pos, n)
	d.pos = pos
	if err == nil && n > 0 && len(list) == 0 {
		err = io.EOF
	}
	if err != nil && err != io.EOF {
		err = &iofs.PathError{Op: "readdir", Path: d.name, Err: err}
	}
	return list, err
}
