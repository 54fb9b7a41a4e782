package fs

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// namespace answers for what is above the images: registries, namespaces,
// repositories, the spellings of docker as symbolic links, and the tags, where
// images begin. A node is a path below the mount; its number is in the
// catalogue.
//
// Above a tag that is not here a walk passes directories of which nobody knows
// yet whether they are anything ("virtual"): they can be entered, hold nothing,
// and are not listed.
type namespace struct {
	f *fileSystem

	mu      sync.Mutex
	made    map[string]bool      // directories made by mkdir that hold no image yet
	changed map[string]time.Time // when the listing of a path last changed

	touching atomic.Int32 // operations that have names stand for other images, without the lock of the directory
}

const (
	controlDir = ".imgfs"
	// virtualTTL is how long the kernel may keep a directory that is only a guess.
	virtualTTL = time.Second
	// maxGuess is how many components of a path below a registry may be guesses.
	maxGuess = 4
	// maxMade bounds the directories that are here by mkdir alone.
	maxMade = 10000
)

// found is what a name in the namespace turned out to be.
type found struct {
	kind   foundKind
	path   string      // of a directory or link, below the mount
	target string      // of a link
	image  images.Name // of an image
}

type foundKind int

const (
	foundNothing foundKind = iota
	foundDir               // something is here below it, or mkdir made it
	foundVirtual
	foundLink
	foundImage // here
)

// parentOf is the directory that path is in; that of the root is the root.
func parentOf(path string) string { return path[:max(strings.LastIndexByte(path, '/'), 0)] }

// base is the directory that path, a repository or a directory on the way to
// one, is relative to: the mount's root, or that of another platform.
func base(path string) (root, rel string) {
	rest, ok := strings.CutPrefix(path, images.PlatformsDir+"/")
	if !ok {
		return "", path
	}
	platform, rel, _ := strings.Cut(rest, "/")
	return images.PlatformsDir + "/" + platform, rel
}

// isControl reports whether path is .imgfs or below it, and not below the root of
// another platform.
func isControl(path string) bool {
	root, _ := base(path)
	return root == "" && (path == controlDir || strings.HasPrefix(path, controlDir+"/"))
}

// valid reports whether n can name an image, of this platform or another.
func valid(n images.Name) bool {
	_, n.Repo = base(n.Repo)
	return n.Valid()
}

// printed is a name in the directory at path as docker writes it, if it can be an
// image, else as a path.
func printed(path, name string) string {
	if n := (images.Name{Repo: path, Tag: name}); valid(n) {
		return n.String()
	}
	return join(path, name)
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// spelling resolves docker's spellings, which are links: "name:tag",
// "name@digest", "name:tag@digest", and Docker Hub's own names.
func spelling(dir, name string) (target string, ok bool) {
	_, dir = base(dir)
	if dir == "" {
		switch name {
		case "docker.io", "index.docker.io", "registry-1.docker.io", "library":
			return ".", true
		}
		if images.ValidHost(name) {
			return "", false
		}
	}
	if repo, digest, has := strings.Cut(name, "@"); has && repo != "" {
		repo, _, _ = strings.Cut(repo, ":")
		n := images.Name{Repo: join(dir, repo), Tag: "@" + digest}
		return repo + "/" + n.Tag, n.Valid()
	}
	if repo, tag, has := strings.Cut(name, ":"); has {
		n := images.Name{Repo: join(dir, repo), Tag: tag}
		return repo + "/" + tag, n.Valid() && !n.IsDigest()
	}
	return "", false
}

// here finds name in dir among what is here, without asking a registry.
func (s *namespace) here(dir, name string) (found, error) {
	if !s.possible(dir, name) {
		return found{}, nil
	}
	path := join(dir, name)
	n := images.Name{Repo: dir, Tag: name}
	if valid(n) {
		here, _, err := s.f.store.Here(n)
		if err != nil || here {
			return found{kind: foundImage, image: n}, err
		}
	}
	if s.isMade(path) || s.f.store.HasPath(path) {
		return found{kind: foundDir, path: path}, nil
	}
	return found{}, nil
}

func (s *namespace) isMade(path string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.made[path]
}

// ask finds name in dir, which is not here, by asking its registry: it pulls
// the tag of that name, else looks whether it is a repository or a namespace.
// With force it also asks again what is known to be missing.
func (s *namespace) ask(dir, name string, force bool) (found, error) {
	n := images.Name{Repo: dir, Tag: name}
	refused := error(iofs.ErrNotExist) // why it is no tag
	if valid(n) {
		err := s.pull(n, force)
		if err == nil {
			return found{kind: foundImage, image: n}, nil
		}
		no := errors.Is(err, iofs.ErrNotExist) || errors.Is(err, iofs.ErrPermission)
		if !no || n.IsDigest() {
			return found{}, err
		}
		refused = err
	}
	path := join(dir, name)
	root, rel := base(path)
	_, rest := images.SplitHost(rel)
	if dir == root || rest != "" && !strings.Contains(rest, "/") {
		// A registry, or the first component of a path in one: nothing to ask for.
		if rest == "" || images.ValidComponent(name) {
			return found{kind: foundVirtual, path: path}, nil
		}
		return found{}, iofs.ErrNotExist
	}
	if !images.ValidRepo(rel) {
		return found{}, refused
	}
	kind, err := s.f.store.Probe(background(), rel, force)
	if err != nil {
		return found{}, err
	}
	if kind == images.PathUnknown {
		guess, err := s.guess(rel)
		if err != nil {
			return found{}, err
		}
		if guess && !errors.Is(refused, iofs.ErrPermission) {
			kind = images.PathNamespace
		}
	}
	if kind == images.PathRepository || kind == images.PathNamespace {
		return found{kind: foundVirtual, path: path}, nil
	}
	return found{}, refused
}

// guess reports whether path, below a platform's root, in a registry that does not
// list what it has, may be a namespace: below a repository a name is taken for a
// tag that is not there, elsewhere for a namespace.
func (s *namespace) guess(path string) (bool, error) {
	if strings.Count(path, "/") > maxGuess {
		return false, nil
	}
	if !images.ValidRepo(parentOf(path)) {
		return true, nil
	}
	kind, err := s.f.store.Probe(background(), parentOf(path), false)
	return kind != images.PathRepository, err
}

// pull brings n, unless it is known to be missing and force is not set.
func (s *namespace) pull(n images.Name, force bool) error {
	if !force {
		if err := s.f.store.Missing(n); err != nil {
			return err
		}
	}
	if err := s.f.store.Pull(background(), n); err != nil {
		return err
	}
	s.f.log.Info("pulled", "image", n.String())
	s.f.events.add("pull", n, s.imageID(n))
	s.listed(n)
	return nil
}

func (s *namespace) lookup(dir images.Ino, name string, who fuse.Caller, out *fuse.EntryOut) fuse.Status {
	path, ok := s.f.store.NodePath(dir)
	if !ok {
		return fuse.Status(syscall.ESTALE)
	}
	x, err := s.find(path, name, who)
	if err != nil {
		return s.refused("walk", printed(path, name), err)
	}
	return s.entry(x, out)
}

// find is what a LOOKUP by who finds.
func (s *namespace) find(dir, name string, who fuse.Caller) (found, error) {
	x, err := s.here(dir, name)
	if err != nil || x.kind != foundNothing {
		return x, err
	}
	target, isLink := spelling(dir, name)
	if !isLink && !s.possible(dir, name) {
		return found{}, nil
	}
	if c := changeOf(who.Pid); c.call != callNone {
		return s.findForChange(c, dir, name)
	}
	if isLink {
		return found{kind: foundLink, path: join(dir, name), target: target}, nil
	}
	if s.f.o.Pull == PullNever {
		return found{}, nil
	}
	if !s.f.o.PullByOthers && !s.manages(who.Uid) {
		return found{}, nil
	}
	if n := (images.Name{Repo: dir, Tag: name}); valid(n) {
		if _, removed, err := s.f.store.Here(n); err != nil || removed {
			return found{}, errors.Join(err, fmt.Errorf("fs: %q was removed; mkdir brings it back: %w", n, iofs.ErrNotExist))
		}
	}
	return s.ask(dir, name, false)
}

// findForChange is what a LOOKUP finds that a system call makes which changes
// names. A mkdir looks before it makes, and the MKDIR pulls; a symlink or a rename
// names something that no registry need have. So nothing is asked for: what is
// not here is not there, or, where it is on the way to what is made, or can be no
// tag and so only be on the way, can be passed. A link is there when what it means
// is.
func (s *namespace) findForChange(c change, dir, name string) (found, error) {
	path := join(dir, name)
	if target, isLink := spelling(dir, name); isLink {
		n, ok := meant(dir, name)
		here := !ok // the root's other names
		if ok {
			var err error
			if here, _, err = s.f.store.Here(n); err != nil {
				return found{}, err
			}
		}
		if here {
			return found{kind: foundLink, path: path, target: target}, nil
		}
		return found{}, nil
	}
	n := images.Name{Repo: dir, Tag: name}
	if c.passes(path) || c.call == callMkdir && s.f.o.Pull == PullMissing && !valid(n) {
		return found{kind: foundVirtual, path: path}, nil
	}
	return found{}, nil
}

// possible reports whether name in dir can be a registry, a component of a
// repository's path or a tag at all.
func (s *namespace) possible(dir, name string) bool {
	if root, _ := base(dir); dir == root {
		return images.ValidHost(name) || images.ValidComponent(name)
	}
	return valid(images.Name{Repo: dir, Tag: name}) || images.ValidComponent(name)
}

// refused turns the error of an operation on what into its errno, and keeps the
// reason. The bare fs.ErrNotExist is for names that no registry was asked for.
func (s *namespace) refused(op, what string, err error) fuse.Status {
	errno := errnoOf(err)
	if err != iofs.ErrNotExist && s.f.errors.add(what, op, errno, err) {
		s.f.log.Warn(op+" failed", "object", what, "errno", errno.Error(), "err", err)
	}
	return fuse.Status(errno)
}

// entry makes the answer to a LOOKUP or MKDIR.
func (s *namespace) entry(x found, out *fuse.EntryOut) fuse.Status {
	switch x.kind {
	case foundNothing:
		return fuse.ENOENT
	case foundImage:
		return s.imageEntry(x.image, out)
	}
	ino, err := s.f.store.Node(x.path)
	if err != nil {
		return s.refused("walk", x.path, err)
	}
	out.NodeId = uint64(ino)
	name, attr := day, day
	switch x.kind {
	case foundVirtual:
		name, attr = virtualTTL, virtualTTL
	case foundLink: // a rename may have put anything under its name
		name = 0
	}
	setTimeout(&out.EntryValid, &out.EntryValidNsec, name)
	setTimeout(&out.AttrValid, &out.AttrValidNsec, attr)
	s.attr(ino, x.path, &out.Attr)
	return fuse.OK
}

func (s *namespace) imageEntry(n images.Name, out *fuse.EntryOut) fuse.Status {
	var a images.Attr
	ino, err := s.f.store.Root(background(), n)
	final := false
	if err == nil {
		final, err = s.f.store.Stat(background(), ino, &a)
	}
	if err != nil {
		errno := dataErrno(err)
		if s.f.errors.add(n.String(), "open", errno, err) {
			s.f.log.Error("opening an image failed", "image", n.String(), "err", err)
		}
		return fuse.Status(errno)
	}
	s.f.fillEntry(ino, &a, final, out)
	return fuse.OK
}

// linkTarget returns the target of the link at path; ok is false when path is a
// directory.
func linkTarget(path string) (string, bool) {
	return spelling(parentOf(path), path[strings.LastIndexByte(path, '/')+1:])
}

// attr fills in the attributes of a directory or link of the namespace.
func (s *namespace) attr(ino images.Ino, path string, out *fuse.Attr) {
	out.Ino = uint64(ino)
	out.Mode, out.Nlink = syscall.S_IFDIR|0o755, 2
	if target, ok := linkTarget(path); ok && ino != images.RootIno {
		out.Mode, out.Nlink, out.Size = syscall.S_IFLNK|0o777, 1, uint64(len(target))
	}
	out.Uid, out.Gid = s.f.uid, s.f.gid
	out.Blksize = 4096
	s.mu.Lock()
	t, ok := s.changed[path]
	s.mu.Unlock()
	if !ok {
		t = s.f.started
	}
	setTime(&out.Mtime, &out.Mtimensec, t)
	setTime(&out.Ctime, &out.Ctimensec, t)
	setTime(&out.Atime, &out.Atimensec, t)
}

func (s *namespace) getattr(ino images.Ino, out *fuse.AttrOut) fuse.Status {
	if ino == transientIno {
		s.transientAttr(&out.Attr)
		return fuse.OK
	}
	path, ok := s.f.store.NodePath(ino)
	if !ok {
		return fuse.Status(syscall.ESTALE)
	}
	setTimeout(&out.AttrValid, &out.AttrValidNsec, day)
	s.attr(ino, path, &out.Attr)
	return fuse.OK
}

func (s *namespace) readlink(ino images.Ino) ([]byte, fuse.Status) {
	path, ok := s.f.store.NodePath(ino)
	if !ok {
		return nil, fuse.Status(syscall.ESTALE)
	}
	target, ok := linkTarget(path)
	if !ok {
		return nil, fuse.EINVAL
	}
	return []byte(target), fuse.OK
}
