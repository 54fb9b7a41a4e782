package fs

import (
	"errors"
	"fmt"
	iofs "io/fs"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/images"
)

// rename retags: what the old name stands for has the new one from then on. The
// caller holds the locks of both directories.
func (s *namespace) rename(in *fuse.RenameIn, oldName, newName string) fuse.Status {
	from, to := images.Ino(in.NodeId), images.Ino(in.Newdir)
	what := s.where(from, oldName)
	src, dst, err := s.renamed(in, oldName, newName)
	if resent(&in.InHeader) && errors.Is(err, iofs.ErrNotExist) && s.hasMoved(in, newName) {
		s.moved(in, oldName, newName)
		return fuse.OK
	}
	if err != nil {
		return s.refused("rename", what, err)
	}
	var c images.Change
	if in.Flags&unix.RENAME_EXCHANGE != 0 {
		var done bool
		if c, done, err = s.f.store.ExchangeOnce(src, dst, in.Unique&^resendBit); done {
			s.moved(in, oldName, newName)
			return fuse.OK
		}
	} else {
		c, err = s.f.store.Move(src, dst, in.Flags&unix.RENAME_NOREPLACE == 0)
	}
	if err != nil {
		return s.refused("rename", what, err)
	}
	if src == dst {
		return fuse.OK // one image by two spellings
	}
	op := "move"
	if in.Flags&unix.RENAME_EXCHANGE != 0 {
		op = "exchange"
		s.f.events.add(op, src, s.imageID(src))
	}
	s.f.log.Info("renamed", "op", op, "from", src.String(), "to", dst.String())
	s.happened(op, dst, s.imageID(dst), without(c, src, dst))

	// The kernel moves the names that it was called with. Where these were
	// docker's spellings, it has not moved the directories, and what it has moved
	// does not belong where it is now.
	own := []images.Name{src, dst}
	c = without(c, src, dst)
	if s.where(from, oldName) != join(src.Repo, src.Tag) || s.where(to, newName) != join(dst.Repo, dst.Tag) {
		c.Untagged = append(c.Untagged, src, dst)
		s.spelled(from, oldName)
		s.spelled(to, newName)
		own = nil
	}
	stale := s.touching.Load() > 0 || s.f.notify.names.busy(uint64(from)) || s.f.notify.names.busy(uint64(to))
	s.tell(c, own, from, to)
	if stale {
		// What the kernel moves may be old: somebody has made src stand for another
		// image, and can tell of that name only when this call has let it. So the
		// new name is looked up again, as is the other one of an exchange.
		s.f.notify.entry(uint64(to), newName)
		s.f.notify.entry(uint64(from), oldName)
	}
	return fuse.OK
}

// moved has the kernel ask again for the names of a rename that was done by a server
// which may not have told all that followed from it.
func (s *namespace) moved(in *fuse.RenameIn, oldName, newName string) {
	var names []images.Name
	for i, name := range []string{oldName, newName} {
		dir := [2]images.Ino{images.Ino(in.NodeId), images.Ino(in.Newdir)}[i]
		if path, err := s.place(dir); err == nil {
			if n, ok := meant(path, name); ok {
				names = append(names, n)
			}
		}
		s.spelled(dir, name)
	}
	s.tell(images.Change{Untagged: names}, nil, images.Ino(in.NodeId), images.Ino(in.Newdir))
}

// hasMoved reports whether a RENAME whose source is gone has been done: its
// destination is there. An exchange looks the same before and after; the store
// knows of it.
func (s *namespace) hasMoved(in *fuse.RenameIn, newName string) bool {
	if in.Flags&unix.RENAME_EXCHANGE != 0 {
		return false
	}
	path, err := s.place(images.Ino(in.Newdir))
	if err != nil {
		return false
	}
	_, err = s.movable(path, newName)
	return err == nil
}

// without is c without two names that are told of otherwise.
func without(c images.Change, a, b images.Name) images.Change {
	var rest []images.Name
	for _, n := range c.Untagged {
		if n != a && n != b {
			rest = append(rest, n)
		}
	}
	c.Untagged = rest
	return c
}

// where is the path of a name in a directory, for messages.
func (s *namespace) where(dir images.Ino, name string) string {
	if dir.Kind() == images.KindNode {
		if path, ok := s.f.store.NodePath(dir); ok {
			return join(path, name)
		}
		return controlDir + "/…/" + name
	} else if n, ok := s.f.store.NameOf(dir); ok {
		return n.String() + "/…/" + name
	}
	return name
}

// spelled has the kernel forget a name that is docker's spelling of another.
func (s *namespace) spelled(dir images.Ino, name string) { s.f.notify.entry(uint64(dir), name) }

// renamed are the two names that a RENAME is about.
func (s *namespace) renamed(in *fuse.RenameIn, oldName, newName string) (src, dst images.Name, err error) {
	const known = unix.RENAME_NOREPLACE | unix.RENAME_EXCHANGE
	if in.Flags&^uint32(known) != 0 || in.Flags == known {
		return src, dst, fmt.Errorf("rename with flags %#x: %w", in.Flags, iofs.ErrInvalid)
	}
	from, err := s.place(images.Ino(in.NodeId))
	if err != nil {
		return src, dst, err
	}
	to, err := s.place(images.Ino(in.Newdir))
	if err != nil {
		return src, dst, err
	}
	if src, err = s.movable(from, oldName); err != nil {
		return src, dst, err
	}
	if in.Flags&unix.RENAME_EXCHANGE != 0 {
		dst, err = s.movable(to, newName)
		return src, dst, err
	}
	x, err := s.here(to, newName)
	switch {
	case err != nil:
		return src, dst, err
	case x.kind == foundDir:
		return src, dst, fmt.Errorf("%q is a directory of images, not one of them: %w", x.path, errNotEmpty)
	}
	dst, err = nameFor(to, newName)
	return src, dst, err
}

// movable is the image that name in the directory at path stands for. Only images
// are moved: a registry, a namespace or a repository is where it is.
func (s *namespace) movable(path, name string) (images.Name, error) {
	x, err := s.here(path, name)
	switch {
	case err != nil:
		return images.Name{}, err
	case x.kind == foundImage:
		return x.image, nil
	case x.kind == foundDir, join(path, name) == controlDir:
		return images.Name{}, fmt.Errorf("only images are renamed, and %q is none: %w", join(path, name), errNotAllowed)
	}
	n, ok := meant(path, name)
	if !ok {
		if _, isLink := spelling(path, name); isLink {
			return n, fmt.Errorf("only images are renamed, and %q is none: %w", join(path, name), errNotAllowed)
		}
		return n, iofs.ErrNotExist
	}
	here, _, err := s.f.store.Here(n)
	if err == nil && !here {
		err = iofs.ErrNotExist
	}
	return n, err
}
