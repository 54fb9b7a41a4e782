package images

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"slices"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/unionfs"
)

// A layer alone is shown in the form that overlayfs takes as a lower directory
// (https://docs.kernel.org/filesystems/overlayfs.html): what it hides is a
// character device 0:0, and a directory that hides all that is below has the
// attribute opaque. Its directories are inodes of their own, of KindLayer; what
// else it has are the inodes that images show, of KindFile. All names that hide
// something are one inode.
//
// Overlayfs cannot say that a name is a hard link to a file of another layer:
// such a name is left out. A directory that the layer names only as a parent of
// something has the attributes that unpacking the layer alone gives.

// opaqueXattrs are the names of the attribute by which overlayfs knows an opaque
// directory, in a mount by root and in one with userxattr.
var opaqueXattrs = []string{"trusted.overlay.opaque", "user.overlay.opaque"}

// overlayXattr reports whether name is overlayfs's own. What a layer itself says
// under such a name is never shown.
func overlayXattr(name string) bool {
	return strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.")
}

// isWhiteout reports whether i is what a layer alone has at a name that it hides.
func (i Ino) isWhiteout() bool { return i.Kind() == KindLayer && i.index() == unionfs.MaxIndex }

// LayerRoot opens the layer alone and returns the inode of its root directory, of
// KindLayer. It waits for a layer that is still arriving. The error is
// fs.ErrNotExist when the layer is not here.
func (s *Store) LayerRoot(ctx context.Context, key v1.Hash) (Ino, error) {
	rec, ok, err := s.cat.layerHere(key)
	if err == nil && !ok {
		err = fmt.Errorf("images: opening layer %s: %w", key, iofs.ErrNotExist)
	}
	if err != nil {
		return 0, err
	}
	root := layerIno(rec.Seq, 0)
	return root, s.alone(ctx, root, func(*layer, *unionfs.Index) error { return nil })
}

// alone calls f with the layer of ino, which is of KindLayer, and its index, again
// when it had to be repaired meanwhile.
func (s *Store) alone(ctx context.Context, ino Ino, f func(l *layer, idx *unionfs.Index) error) error {
	l, err := s.layer(ino.seq())
	if errors.Is(err, iofs.ErrNotExist) {
		return ErrStale
	}
	if err != nil {
		return err
	}
	for repairs := 0; ; {
		st, err := l.compiled(ctx)
		if err != nil {
			return err
		}
		err = f(l, st.idx)
		if !errors.Is(err, unionfs.ErrDamaged) || repairs == maxRepairs {
			return err
		}
		repairs++
		l.damaged(st, err)
	}
}

// compiled returns the layer's state once it has an index.
func (l *layer) compiled(ctx context.Context) (*layerState, error) {
	for {
		st, err := l.open(ctx)
		if err != nil || st.idx != nil {
			return st, err
		}
		if err := l.s.wait(ctx, st.settled, nil, st.progress); err != nil {
			return nil, err
		}
		if st.err != nil {
			return nil, st.err
		}
	}
}

// aloneChild is the inode that c is in the layer alone, and fills a; 0 when it is
// not shown there.
func (l *layer) aloneChild(idx *unionfs.Index, c *unionfs.Child, a *Attr) (Ino, error) {
	switch c.Kind {
	case unionfs.ChildWhiteout:
		return layerIno(l.rec.Seq, unionfs.MaxIndex), whiteoutAttr(idx, a)
	case unionfs.ChildInode:
		if c.ID.IsDir() {
			return layerIno(l.rec.Seq, c.ID.Index()), idx.Attr(c.ID, a)
		}
		err := idx.Attr(c.ID, a)
		a.Nlink++ // as Stat of it says
		return fileIno(l.rec.Seq, c.ID.Index()), err
	}
	return 0, nil
}

// whiteoutAttr fills a with what a whiteout is. Its many names do not count as
// links: a copy makes a device of each.
func whiteoutAttr(idx *unionfs.Index, a *Attr) error {
	err := idx.Attr(unionfs.RootID, a)
	*a = Attr{Mode: syscall.S_IFCHR, Mtime: a.Mtime, MtimeNsec: a.MtimeNsec, Nlink: 1}
	return err
}

func (s *Store) aloneLookup(ctx context.Context, dir Ino, name string, a *Attr) (ino Ino, err error) {
	err = s.alone(ctx, dir, func(l *layer, idx *unionfs.Index) error {
		c, err := idx.Lookup(unionfs.DirID(dir.index()), name)
		if err == nil {
			ino, err = l.aloneChild(idx, &c, a)
		}
		return err
	})
	return ino, err
}

func (s *Store) aloneStat(ctx context.Context, ino Ino, a *Attr) error {
	return s.alone(ctx, ino, func(_ *layer, idx *unionfs.Index) error {
		if ino.isWhiteout() {
			return whiteoutAttr(idx, a)
		}
		return idx.Attr(unionfs.DirID(ino.index()), a)
	})
}

func (s *Store) aloneReadDir(ctx context.Context, dir Ino, pos int, fn func(next int, e Entry, a *Attr) bool) error {
	return s.alone(ctx, dir, func(l *layer, idx *unionfs.Index) error {
		first, n, err := idx.Children(unionfs.DirID(dir.index()))
		if err != nil {
			return err
		}
		var a Attr
		for pos = max(pos, 0); pos < int(n); pos++ {
			name, c, err := idx.ChildAt(first + uint32(pos))
			if err != nil {
				return err
			}
			ino, err := l.aloneChild(idx, &c, &a)
			if err != nil {
				return err
			}
			if ino != 0 && !fn(pos+1, Entry{Name: name, Ino: ino}, &a) {
				return nil
			}
		}
		return nil
	})
}

func (s *Store) aloneParent(ctx context.Context, dir Ino) (parent Ino, err error) {
	err = s.alone(ctx, dir, func(l *layer, idx *unionfs.Index) error {
		id, _, err := idx.Parent(unionfs.DirID(dir.index()))
		parent = layerIno(l.rec.Seq, id.Index())
		return err
	})
	return parent, err
}

func (s *Store) aloneXattr(ctx context.Context, ino Ino, name string) (value string, ok bool, err error) {
	if ino.isWhiteout() {
		return "", false, nil
	}
	err = s.alone(ctx, ino, func(_ *layer, idx *unionfs.Index) error {
		dir := unionfs.DirID(ino.index())
		switch {
		case slices.Contains(opaqueXattrs, name):
			value, ok, err = "y", true, nil
			if opaque, oerr := idx.Opaque(dir); oerr != nil || !opaque {
				value, ok, err = "", false, oerr
			}
		case overlayXattr(name):
			ok, err = false, nil
		default:
			value, ok, err = idx.Xattr(dir, name)
		}
		return err
	})
	return value, ok, err
}

func (s *Store) aloneXattrNames(ctx context.Context, ino Ino) (names []string, err error) {
	if ino.isWhiteout() {
		return nil, nil
	}
	err = s.alone(ctx, ino, func(_ *layer, idx *unionfs.Index) error {
		dir := unionfs.DirID(ino.index())
		all, err := idx.XattrNames(dir)
		if err != nil {
			return err
		}
		names = slices.DeleteFunc(slices.Clone(all), overlayXattr)
		opaque, err := idx.Opaque(dir)
		if opaque {
			// Listed under its first name alone: overlayfs asks by name, and
			// would show the other one to whoever lists its merged directory.
			names = append(names, opaqueXattrs[0])
			slices.Sort(names)
		}
		return err
	})
	return names, err
}
