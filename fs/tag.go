package fs

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"path"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// transientIno is the inode of the symbolic links that SYMLINK answers with. The
// kernel insists on a link; since its name has no timeout, the next walk to it
// finds the image's directory.
const transientIno images.Ino = 3

func (s *namespace) transient(out *fuse.EntryOut) fuse.Status {
	out.NodeId = uint64(transientIno)
	s.transientAttr(&out.Attr)
	return fuse.OK
}

func (s *namespace) transientAttr(out *fuse.Attr) {
	out.Ino = uint64(transientIno)
	out.Mode, out.Nlink, out.Size = syscall.S_IFLNK|0o777, 1, 1
	out.Uid, out.Gid = s.f.uid, s.f.gid
	setTime(&out.Mtime, &out.Mtimensec, s.f.started)
	setTime(&out.Ctime, &out.Ctimensec, s.f.started)
	setTime(&out.Atime, &out.Atimensec, s.f.started)
}

// symlink tags: name is a tag of its own from then on, for the image that target
// leads to.
func (s *namespace) symlink(h *fuse.InHeader, name, target string, out *fuse.EntryOut) fuse.Status {
	dir := images.Ino(h.NodeId)
	what := s.where(dir, name)
	at, err := s.place(dir)
	if err != nil {
		return s.refused("symlink", what, err)
	}
	x, err := s.here(at, name)
	if err != nil {
		return s.refused("symlink", what, err)
	}
	if x.kind == foundImage && resent(h) {
		if manifest, err := s.resolve(target, at, name); err == nil && s.standsFor(x.image, manifest) {
			return s.transient(out)
		}
	}
	if x.kind != foundNothing {
		return fuse.Status(syscall.EEXIST)
	}
	dst, err := nameFor(at, name)
	if err != nil {
		return s.refused("symlink", what, err)
	}
	here, _, err := s.f.store.Here(dst)
	if err == nil && here {
		return fuse.Status(syscall.EEXIST)
	}
	if err == nil {
		err = s.tag(target, at, name, dst, dir)
	}
	if err != nil {
		return s.refused("symlink", what, err)
	}
	return s.transient(out)
}

// standsFor reports whether n stands for the image with that manifest.
func (s *namespace) standsFor(n images.Name, manifest v1.Hash) bool {
	now, ok, err := s.f.store.Manifest(n)
	return err == nil && ok && now == manifest
}

// retag is `ln -sfn SRC DST` with a DST that is here: coreutils takes it for a
// directory to make the link in. So a link of the target's own name in the root
// directory of an image, to an image, tags DST, as docker tag overwrites. The
// caller holds the lock of DST's root, not of the directory that has
// its name.
func (s *namespace) retag(h *fuse.InHeader, name, target string, out *fuse.EntryOut) fuse.Status {
	n, ok := s.f.store.RootOf(images.Ino(h.NodeId))
	if !ok || isControl(n.Repo) || name != path.Base(target) {
		return fuse.EROFS
	}
	what := n.String()
	here, _, err := s.f.store.Here(n)
	switch {
	case err != nil:
	case !here:
		err = iofs.ErrNotExist
	case !s.manages(h.Uid):
		err = errNotOwner
	case n.IsDigest():
		err = fmt.Errorf("a digest names one image for ever: %w", errReadOnly)
	default:
		err = s.tag(target, n.Repo, n.Tag, n)
		switch {
		case errors.Is(err, errNoImage), errors.Is(err, images.ErrAmbiguous): // an image is meant
		case errors.Is(err, iofs.ErrNotExist), errors.Is(err, iofs.ErrInvalid):
			err = fmt.Errorf("an image cannot be changed, and as a tag: %v: %w", err, errReadOnly)
		}
	}
	if err != nil {
		return s.refused("symlink", what, err)
	}
	if resent(h) { // the server that died may have done it, and not told
		s.tell(images.Change{Untagged: []images.Name{n}}, nil)
	}
	return s.transient(out)
}

// tag makes dst stand for what target is, seen from name in the directory at.
func (s *namespace) tag(target, at, name string, dst images.Name, held ...images.Ino) error {
	manifest, err := s.resolve(target, at, name)
	if err != nil {
		return err
	}
	old, was, err := s.f.store.Manifest(dst)
	if err != nil {
		return err
	}
	s.touching.Add(1)
	defer s.touching.Add(-1)
	c, err := s.f.store.Tag(manifest, dst)
	if err != nil {
		return err
	}
	s.f.log.Info("tagged", "image", dst.String(), "target", target, "manifest", manifest.String())
	s.happened("tag", dst, s.imageID(dst), without(c, dst, dst))
	c = without(c, dst, dst)
	own := []images.Name{dst}
	if was && old != manifest {
		c.Untagged, own = append(c.Untagged, dst), nil
	}
	s.tell(c, own, held...)
	return nil
}

// errNoImage is what is said of a path that an image could have, and none has.
var errNoImage = fmt.Errorf("no such image is here: %w", iofs.ErrNotExist)

// resolve finds the image that the target of a link at/name means. It may be
// written as a link's is, relative to the link's directory, or absolute; relative
// to the mount's root, as docker's names are; or relative to the directory that
// the link becomes. The error is fs.ErrNotExist when nothing is there, errNoImage
// if an image could be, else fs.ErrInvalid when what is there is no image. Nothing
// is pulled.
func (s *namespace) resolve(target, at, name string) (v1.Hash, error) {
	var candidates []string
	if path.IsAbs(target) {
		below, ok := s.f.below(target)
		if !ok {
			return v1.Hash{}, fmt.Errorf("%q is not in this mount, so it is no image of it: %w", target, iofs.ErrInvalid)
		}
		candidates = []string{below}
	} else {
		root, _ := base(at)
		candidates = []string{path.Join(at, target), path.Clean(target), path.Join(at, name, target)}
		if root != "" {
			candidates = append(candidates, path.Join(root, target))
		}
	}
	errs := fmt.Errorf("%q: %w", target, iofs.ErrNotExist)
	for _, p := range candidates {
		if p == ".." || strings.HasPrefix(p, "../") {
			continue // above the mount
		}
		manifest, err := s.imageAt(p)
		if err == nil {
			return manifest, nil
		}
		switch {
		case errors.Is(err, errNoImage) && !errors.Is(errs, images.ErrAmbiguous) && errors.Is(errs, iofs.ErrNotExist):
			errs = fmt.Errorf("%q: %w", target, errNoImage)
		case errors.Is(err, iofs.ErrNotExist) && !errors.Is(err, images.ErrAmbiguous):
		case errors.Is(errs, iofs.ErrNotExist) && !errors.Is(errs, images.ErrAmbiguous):
			errs = err
		}
	}
	return v1.Hash{}, errs
}

// below is an absolute path below the mount, as a path in it.
func (f *fileSystem) below(target string) (string, bool) {
	target = path.Clean(target)
	for _, dir := range f.dirs {
		if rest, ok := strings.CutPrefix(target, dir); ok && (rest == "" || rest[0] == '/' || dir == "/") {
			return path.Clean(strings.TrimPrefix(rest, "/")), true
		}
	}
	return "", false
}

// imageAt is the image whose root directory is at p, a clean path below the
// mount. The error is fs.ErrNotExist when nothing is at p, errNoImage if an image
// could be, and fs.ErrInvalid when something else is.
func (s *namespace) imageAt(p string) (v1.Hash, error) {
	parts := strings.Split(p, "/")
	dir := ""
	if parts[0] == controlDir && len(parts) > 2 {
		n := images.Name{Repo: join(controlDir, parts[1]), Tag: parts[2]}
		switch n.Repo {
		case images.PlatformsDir:
			dir, parts = join(n.Repo, n.Tag), parts[3:]
		case images.DanglingDir:
			manifest, ok, err := s.f.store.Manifest(n)
			if err == nil && !ok {
				err = fmt.Errorf("%q: %w", p, errNoImage)
			}
			return manifest, s.orInside(err, n, parts[3:])
		case join(controlDir, "ids"):
			id, err := s.f.store.FindID(n.Tag)
			if errors.Is(err, iofs.ErrNotExist) && !errors.Is(err, images.ErrAmbiguous) {
				err = fmt.Errorf("%q: %w", p, errNoImage)
			}
			if err != nil {
				return v1.Hash{}, err
			}
			if len(parts) > 3 {
				return v1.Hash{}, notAnImage(p)
			}
			manifest, _, err := s.f.store.Shown(id.ID)
			return manifest, err
		}
	}
	if dir == "" && parts[0] == controlDir || p == "." {
		return v1.Hash{}, notAnImage(p)
	}
	named := false // p can be the path of an image
	for i, part := range parts {
		n, ok := meant(dir, part)
		named = ok
		if !ok {
			if target, isLink := spelling(dir, part); !isLink || target != "." {
				dir = join(dir, part)
			}
			continue
		}
		manifest, here, err := s.f.store.Manifest(n)
		if err != nil || here {
			return manifest, s.orInside(err, n, parts[i+1:])
		}
		dir = join(dir, part)
	}
	if dir == "" || s.isMade(dir) || s.f.store.HasPath(dir) {
		return v1.Hash{}, notAnImage(p)
	}
	if named {
		return v1.Hash{}, fmt.Errorf("%q: %w", p, errNoImage)
	}
	return v1.Hash{}, fmt.Errorf("%q: %w", p, iofs.ErrNotExist)
}

func notAnImage(p string) error { return fmt.Errorf("%q is no image: %w", p, iofs.ErrInvalid) }

// orInside is err, or what a path below the root of image n is: nothing, or no
// image.
func (s *namespace) orInside(err error, n images.Name, rest []string) error {
	if err != nil || len(rest) == 0 {
		return err
	}
	p := join(join(n.Repo, n.Tag), path.Join(rest...))
	var a images.Attr
	ino, err := s.f.store.Root(background(), n)
	for _, part := range rest {
		if err != nil {
			return err
		}
		if ino.Kind() == images.KindFile {
			if a.Mode&syscall.S_IFMT != syscall.S_IFLNK {
				return fmt.Errorf("%q: %w", p, iofs.ErrNotExist)
			}
			break // what a link leads to is no image
		}
		if ino, _, err = s.f.store.Lookup(background(), ino, part, &a); err == nil && ino == 0 {
			return fmt.Errorf("%q: %w", p, iofs.ErrNotExist)
		}
	}
	if err != nil {
		return err
	}
	return notAnImage(p)
}
