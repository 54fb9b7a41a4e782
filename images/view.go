package images

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"maps"
	"slices"
	"sync/atomic"

	"github.com/imgfs/imgfs/unionfs"
)

// View is one image under one name: what a directory of the mount shows. The
// same image under two names has two views, because the kernel allows a
// directory one place only.
type View struct {
	seq   uint32
	name  atomic.Pointer[Name] // changes when the view is moved
	image *image
}

// Name returns the name under which the view is now, or was last.
func (v *View) Name() Name { return *v.name.Load() }

func (v *View) setName(n Name) { v.name.Store(&n) }

// Entry is what a directory of an image has under one name.
type Entry struct {
	Name string // valid until the function that it is given to returns
	Ino  Ino
}

// Root opens the image that is here under n and returns the inode of its root
// directory. The error is fs.ErrNotExist when none is.
//
// n may also be a dangling image or a chain.
func (s *Store) Root(ctx context.Context, n Name) (Ino, error) {
	seq, err := s.cat.viewAt(n)
	if err != nil {
		return 0, err
	}
	v, err := s.view(seq)
	if err != nil {
		return 0, err
	}
	if _, err := v.image.open(ctx); err != nil {
		return 0, err
	}
	return v.root(), nil
}

// root is the number of the view's root directory: that of the topmost layer,
// because every layer has a root.
func (v *View) root() Ino {
	n := len(v.image.layers)
	return dirIno(v.seq, n, unionfs.Ref{Layer: n - 1, ID: unionfs.RootID})
}

// view returns the view with this sequence. It stays usable when its name is
// removed, for those who have its files open.
func (s *Store) view(seq uint32) (*View, error) {
	for {
		s.mu.Lock()
		v, moves := s.views[seq], s.moves
		s.mu.Unlock()
		if v != nil {
			return v, nil
		}
		rec, ok, err := s.cat.view(seq)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, fmt.Errorf("images: opening view %d: %w", seq, ErrStale)
		}
		im, err := s.image(imageKey{rec.Image, rec.Depth})
		if errors.Is(err, iofs.ErrNotExist) {
			return nil, fmt.Errorf("images: opening %q: %w", rec.Name, ErrStale)
		}
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		if s.views == nil {
			s.mu.Unlock()
			return nil, iofs.ErrClosed
		}
		if s.moves == moves && s.views[seq] == nil { // else it may have another name now
			v = &View{seq: seq, image: im}
			v.setName(rec.Name)
			s.views[seq] = v
		}
		v = s.views[seq]
		s.mu.Unlock()
		if v != nil {
			return v, nil
		}
	}
}

// ErrStale reports an inode number of something that is no longer here.
var ErrStale = errors.New("removed")

// NameOf returns the name under which the directory dir is shown.
func (s *Store) NameOf(dir Ino) (Name, bool) {
	if dir.Kind() != KindDir {
		return Name{}, false
	}
	v, err := s.view(dir.seq())
	if err != nil {
		return Name{}, false
	}
	return v.Name(), true
}

// RootOf returns the name whose image has ino as its root directory, or had it
// before the name stood for another image; ok is false when ino is no image's
// root.
func (s *Store) RootOf(ino Ino) (n Name, ok bool) {
	if ino.Kind() != KindDir {
		return Name{}, false
	}
	v, err := s.view(ino.seq())
	if err != nil || v.root() != ino {
		return Name{}, false
	}
	return v.Name(), true
}

// maxRepairs bounds how often one call makes damaged files again.
const maxRepairs = 2

// withImage calls f with the open image of directory dir, again when its state
// has changed or had to be repaired meanwhile.
func (s *Store) withImage(ctx context.Context, dir Ino, f func(v *View, st *imageState) error) error {
	v, err := s.view(dir.seq())
	if err != nil {
		return err
	}
	for repairs := 0; ; {
		st, err := v.image.open(ctx)
		if err != nil {
			return err
		}
		err = f(v, st)
		switch {
		case errors.Is(err, unionfs.ErrDamaged) && repairs < maxRepairs:
			repairs++
			v.image.damaged(st, err)
		case err == errSettled || st.tree == nil && notYet(err):
			if st.settled != nil {
				if err := s.wait(ctx, st.settled, nil, st.progress); err != nil {
					return err
				}
				if st.err != nil {
					return st.err
				}
			}
		default:
			return err
		}
	}
}

// notYet reports whether err, of a layer that is arriving, may be nothing but
// that: its Builder was closed because it has arrived, or the inode is known from
// an earlier time and has not passed in this one.
func notYet(err error) bool { return errors.Is(err, iofs.ErrClosed) || errors.Is(err, iofs.ErrInvalid) }

// errSettled asks withImage to wait until no layer is arriving any more.
var errSettled = errors.New("images: the image must be complete")

// ino is the inode number of ref in v.
func (v *View) ino(ref unionfs.Ref) (Ino, error) {
	if !ref.ID.IsDir() {
		return fileIno(v.image.rec.Layers[ref.Layer].Seq, ref.ID.Index()), nil
	}
	n := len(v.image.layers)
	if ref.ID.Index() >= maxDirs(n) {
		return 0, fmt.Errorf("images: %q: a layer has more than %d directories: %w", v.Name(), maxDirs(n), iofs.ErrInvalid)
	}
	return dirIno(v.seq, n, ref), nil
}

// ref is the inode of v that directory number dir addresses. The number comes
// from the kernel; it may be of an image with other layers if the cache
// directory was replaced, so it is checked.
func (v *View) ref(dir Ino) (unionfs.Ref, error) {
	ref := dirRef(dir, len(v.image.layers))
	if ref.Layer >= len(v.image.layers) {
		return ref, ErrStale
	}
	return ref, nil
}

// Lookup finds name in directory dir and fills a. ino is 0 when there is no such
// name. final is false while a may still change, because its layer has not
// passed whole.
func (s *Store) Lookup(ctx context.Context, dir Ino, name string, a *Attr) (Ino, bool, error) {
	// The way of nearly every lookup, without a closure that would be allocated.
	if v, st := s.merged(dir); st != nil {
		if parent, err := v.ref(dir); err == nil {
			ref, ok, err := st.tree.Lookup(parent, name)
			if err == nil && !ok {
				return 0, true, nil
			}
			if err == nil {
				_, err = st.stat(ref, a)
			}
			if err == nil {
				ino, err := v.ino(ref)
				return ino, true, err
			}
		}
	}
	return s.lookupSlow(ctx, dir, name, a)
}

// merged returns the view of dir and its image's state, when all layers are here
// and merged; else nil.
func (s *Store) merged(dir Ino) (*View, *imageState) {
	if dir.Kind() != KindDir {
		return nil, nil
	}
	s.mu.Lock()
	v := s.views[dir.seq()]
	s.mu.Unlock()
	if v == nil {
		return nil, nil
	}
	if st := v.image.state.Load(); st != nil && st.tree != nil {
		return v, st
	}
	return nil, nil
}

func (s *Store) lookupSlow(ctx context.Context, dir Ino, name string, a *Attr) (ino Ino, final bool, err error) {
	if dir.Kind() == KindLayer {
		ino, err = s.aloneLookup(ctx, dir, name, a)
		return ino, err == nil, err
	}
	err = s.withImage(ctx, dir, func(v *View, st *imageState) error {
		parent, err := v.ref(dir)
		if err != nil {
			return err
		}
		ino = 0
		var ref unionfs.Ref
		var ok bool
		if st.tree != nil {
			ref, ok, err = st.tree.Lookup(parent, name)
		} else {
			ref, ok, err = s.lookupLive(ctx, st, parent, name)
		}
		if err != nil || !ok {
			final = true
			return err
		}
		if ino, err = v.ino(ref); err != nil {
			return err
		}
		final, err = st.stat(ref, a)
		return err
	})
	if err != nil {
		return 0, false, err
	}
	return ino, final, nil
}

// stat fills a with the attributes of ref. A file counts one name more than its
// layer has: du counts it once, in however many images it is.
func (st *imageState) stat(ref unionfs.Ref, a *Attr) (final bool, err error) {
	if st.tree != nil {
		final, err = true, st.tree.Attr(ref, a)
	} else {
		final, err = st.stack.Attr(ref, a)
	}
	if !ref.ID.IsDir() {
		a.Nlink++
	}
	return final, err
}

// lookupLive finds name while layers are still arriving: it waits until the
// layer that can answer has passed the name.
func (s *Store) lookupLive(ctx context.Context, st *imageState, parent unionfs.Ref, name string) (unionfs.Ref, bool, error) {
	waited := -1
	var changed <-chan struct{}
	for {
		ref, ok, wait, err := st.stack.Lookup(parent, name)
		if err != nil || wait < 0 {
			return ref, ok, err
		}
		if wait == len(st.layers) { // only the merge can tell
			return ref, false, errSettled
		}
		ls := st.layers[wait]
		if ls.builder == nil {
			return ref, false, errSettled
		}
		if wait != waited || changed == nil {
			// Look again after asking to be told: the name may have passed between.
			waited, changed = wait, ls.builder.Changed()
			continue
		}
		select {
		case <-ls.settled:
			return ref, false, errSettled
		default:
		}
		if err := s.wait(ctx, changed, ls.settled, st.progress); err != nil {
			return ref, false, err
		}
		changed = nil
	}
}

// Stat fills a with the attributes of ino, a directory of a view or of a layer
// alone, or a file of a layer.
func (s *Store) Stat(ctx context.Context, ino Ino, a *Attr) (final bool, err error) {
	if ino.Kind() == KindFile {
		err = s.withLayer(ctx, ino, func(src unionfs.Layer, id unionfs.ID) error {
			final = src.Done()
			err := src.Attr(id, a)
			a.Nlink++
			return err
		})
		return final, err
	}
	if ino.Kind() == KindLayer {
		err = s.aloneStat(ctx, ino, a)
		return err == nil, err
	}
	err = s.withImage(ctx, ino, func(v *View, st *imageState) error {
		ref, err := v.ref(ino)
		if err != nil {
			return err
		}
		final, err = st.stat(ref, a)
		return err
	})
	return final, err
}

// Settle waits until no layer of dir's image is arriving any more.
func (s *Store) Settle(ctx context.Context, dir Ino) error {
	if dir.Kind() == KindLayer {
		return s.alone(ctx, dir, func(*layer, *unionfs.Index) error { return nil })
	}
	return s.withImage(ctx, dir, func(_ *View, st *imageState) error {
		if st.tree == nil {
			return errSettled
		}
		return nil
	})
}

// Parent returns the directory that holds dir; dir itself for the root of an
// image, or of a layer alone.
func (s *Store) Parent(ctx context.Context, dir Ino) (parent Ino, err error) {
	if dir.Kind() == KindLayer {
		return s.aloneParent(ctx, dir)
	}
	err = s.withImage(ctx, dir, func(v *View, st *imageState) error {
		if st.tree == nil {
			return errSettled
		}
		ref, err := v.ref(dir)
		if err != nil {
			return err
		}
		if ref, err = st.tree.Parent(ref); err != nil {
			return err
		}
		parent, err = v.ino(ref)
		return err
	})
	return parent, err
}

// ReadDir calls fn for the names in dir, from position pos on, in a stable order
// and with the position behind each, until fn returns false. It waits until no
// layer is arriving any more.
func (s *Store) ReadDir(ctx context.Context, dir Ino, pos int, fn func(next int, e Entry, a *Attr) bool) error {
	if dir.Kind() == KindLayer {
		return s.aloneReadDir(ctx, dir, pos, fn)
	}
	return s.withImage(ctx, dir, func(v *View, st *imageState) error {
		if st.tree == nil {
			return errSettled
		}
		ref, err := v.ref(dir)
		if err != nil {
			return err
		}
		var inner error
		var a Attr
		err = st.tree.ReadDir(ref, pos, func(next int, name string, ref unionfs.Ref) bool {
			e := Entry{Name: name}
			if e.Ino, inner = v.ino(ref); inner != nil {
				return false
			}
			if _, inner = st.stat(ref, &a); inner != nil {
				return false
			}
			more := fn(next, e, &a)
			if more {
				pos = next // a repair goes on from here
			}
			return more
		})
		return errors.Join(err, inner)
	})
}

// withLayer calls f with the open layer of file ino, again when its state has
// changed or had to be repaired meanwhile.
func (s *Store) withLayer(ctx context.Context, ino Ino, f func(src unionfs.Layer, id unionfs.ID) error) error {
	l, err := s.layer(ino.seq())
	if errors.Is(err, iofs.ErrNotExist) {
		return ErrStale
	}
	if err != nil {
		return err
	}
	for repairs := 0; ; {
		st, err := l.open(ctx)
		if err != nil {
			return err
		}
		err = f(st.source(), unionfs.FileID(ino.index()))
		switch {
		case errors.Is(err, unionfs.ErrDamaged) && repairs < maxRepairs:
			repairs++
			l.damaged(st, err)
		case st.idx == nil && notYet(err):
			if err := s.wait(ctx, st.settled, nil, st.progress); err != nil {
				return err
			}
			if st.err != nil {
				return st.err
			}
		default:
			return err
		}
	}
}

// withInode calls f with the layer and the inode that have the attributes of
// ino.
func (s *Store) withInode(ctx context.Context, ino Ino, f func(src unionfs.Layer, id unionfs.ID) error) error {
	if ino.Kind() == KindFile {
		return s.withLayer(ctx, ino, f)
	}
	return s.withImage(ctx, ino, func(v *View, st *imageState) error {
		ref, err := v.ref(ino)
		if err != nil {
			return err
		}
		if st.tree != nil {
			if ref, err = st.tree.Source(ref); err != nil {
				return err
			}
			l := v.image.layers[ref.Layer].state.Load()
			if l == nil || l.idx == nil {
				return unionfs.ErrDamaged // closed for repair under us
			}
			return f(l.idx, ref.ID)
		}
		final, err := st.stack.Attr(ref, &Attr{})
		if err != nil {
			return err
		}
		if !final {
			return errSettled
		}
		return f(st.stack[ref.Layer], ref.ID)
	})
}

// Readlink returns the target of a symbolic link.
func (s *Store) Readlink(ctx context.Context, ino Ino) (target string, err error) {
	err = s.withLayer(ctx, ino, func(src unionfs.Layer, id unionfs.ID) error {
		target, err = src.Readlink(id)
		return err
	})
	return target, err
}

// Xattr returns the value of an extended attribute of ino; ok is false when it
// has none of that name.
func (s *Store) Xattr(ctx context.Context, ino Ino, name string) (value string, ok bool, err error) {
	if ino.Kind() == KindLayer {
		return s.aloneXattr(ctx, ino, name)
	}
	err = s.withInode(ctx, ino, func(src unionfs.Layer, id unionfs.ID) error {
		value, ok, err = src.Xattr(id, name)
		return err
	})
	return value, ok, err
}

// XattrNames returns the names of ino's extended attributes, sorted.
func (s *Store) XattrNames(ctx context.Context, ino Ino) (names []string, err error) {
	if ino.Kind() == KindLayer {
		return s.aloneXattrNames(ctx, ino)
	}
	err = s.withInode(ctx, ino, func(src unionfs.Layer, id unionfs.ID) error {
		names, err = src.XattrNames(id)
		return err
	})
	return names, err
}

// CarriesXattr reports whether any layer that is open has an extended attribute
// of this name, as far as it has arrived.
func (s *Store) CarriesXattr(name string) bool {
	s.mu.Lock()
	carried := s.xattrs[name]
	var arriving []*unionfs.Builder
	if !carried {
		arriving = slices.Collect(maps.Keys(s.arriving))
	}
	s.mu.Unlock()
	for _, b := range arriving {
		carried = carried || slices.Contains(b.XattrNameSet(), name)
	}
	return carried
}

// FileOf describes where a file, or a directory of a layer alone, is from, for messages: its layer, and an image
// that has it.
func (s *Store) FileOf(ino Ino) (string, bool) {
	if ino.Kind() != KindFile && ino.Kind() != KindLayer {
		return "", false
	}
	l, err := s.layer(ino.seq())
	if err != nil {
		return "", false
	}
	what := "layer " + l.rec.Desc.Digest.String()
	if names := s.namesOf(func(im *image) bool { return slices.Contains(im.layers, l) }); len(names) > 0 {
		what = names[0].String() + ", " + what
	}
	return what, true
}
