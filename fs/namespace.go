package fs

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"sort"
	"strings"
	"sync"
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

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// spelling resolves docker's spellings, which are links: "name:tag",
// "name@digest", "name:tag@digest", and Docker Hub's own names.
func spelling(dir, name string) (target string, ok bool) {
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
	if n.Valid() {
		here, _, err := s.f.store.Here(n)
		if err != nil || here {
			return found{kind: foundImage, image: n}, err
		}
	}
	s.mu.Lock()
	made := s.made[path]
	s.mu.Unlock()
	if made || s.f.store.HasPath(path) {
		return found{kind: foundDir, path: path}, nil
	}
	return found{}, nil
}

// ask finds name in dir, which is not here, by asking its registry: it pulls
// the tag of that name, else looks whether it is a repository or a namespace.
// With force it also asks again what is known to be missing.
func (s *namespace) ask(dir, name string, force bool) (found, error) {
	n := images.Name{Repo: dir, Tag: name}
	refused := error(iofs.ErrNotExist) // why it is no tag
	if n.Valid() {
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
	_, rest := images.SplitHost(path)
	if dir == "" || rest != "" && !strings.Contains(rest, "/") {
		// A registry, or the first component of a path in one: nothing to ask for.
		if rest == "" || images.ValidComponent(name) {
			return found{kind: foundVirtual, path: path}, nil
		}
		return found{}, iofs.ErrNotExist
	}
	if !images.ValidRepo(path) {
		return found{}, refused
	}
	kind, err := s.f.store.Probe(background(), path, force)
	if err != nil {
		return found{}, err
	}
	if kind == images.PathUnknown {
		guess, err := s.guess(dir, path)
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

// guess reports whether path, in a registry that does not list what it has, may
// be a namespace: below a repository a name is taken for a tag that is not
// there, elsewhere for a namespace.
func (s *namespace) guess(dir, path string) (bool, error) {
	if strings.Count(path, "/") > maxGuess {
		return false, nil
	}
	if !images.ValidRepo(dir) {
		return true, nil
	}
	kind, err := s.f.store.Probe(background(), dir, false)
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
	s.listed(n)
	return nil
}

// listed tells the kernel that the listings on the way to n have changed.
func (s *namespace) listed(n images.Name) {
	now := time.Now()
	for path := n.Repo; ; path = path[:max(strings.LastIndexByte(path, '/'), 0)] {
		s.mu.Lock()
		s.changed[path] = now
		delete(s.made, path)
		s.mu.Unlock()
		if ino, err := s.f.store.Node(path); err == nil {
			s.f.notify.listing(uint64(ino))
		}
		if path == "" {
			return
		}
	}
}

// dropImage has the kernel forget what it knows below n.
func (s *namespace) dropImage(n images.Name) {
	if ino, err := s.f.store.Node(n.Repo); err == nil {
		s.f.notify.entry(uint64(ino), n.Tag)
	}
}

func (s *namespace) lookup(dir images.Ino, name string, tid uint32, out *fuse.EntryOut) fuse.Status {
	if st, ok := s.f.control.lookup(dir, name, out); ok {
		return st
	}
	path, ok := s.f.store.NodePath(dir)
	if !ok {
		return fuse.Status(syscall.ESTALE)
	}
	x, err := s.find(path, name, tid)
	if err != nil {
		return s.refused(path, name, err)
	}
	return s.entry(x, out)
}

// find is what a LOOKUP finds.
func (s *namespace) find(dir, name string, tid uint32) (found, error) {
	x, err := s.here(dir, name)
	if err != nil || x.kind != foundNothing {
		return x, err
	}
	target, isLink := spelling(dir, name)
	if !isLink && !s.possible(dir, name) {
		return found{}, nil
	}
	if c := changeOf(tid); c.any {
		// A mkdir looks before it makes: the MKDIR pulls. What is on the way to
		// it, or can be no tag and so only be on the way, can be passed.
		n := images.Name{Repo: dir, Tag: name}
		if path := join(dir, name); !isLink && (c.passes(path) || s.f.o.Pull == PullMissing && !n.Valid()) {
			return found{kind: foundVirtual, path: path}, nil
		}
		return found{}, nil
	}
	if isLink {
		return found{kind: foundLink, path: join(dir, name), target: target}, nil
	}
	if s.f.o.Pull == PullNever {
		return found{}, nil
	}
	if n := (images.Name{Repo: dir, Tag: name}); n.Valid() {
		if _, removed, err := s.f.store.Here(n); err != nil || removed {
			return found{}, errors.Join(err, fmt.Errorf("fs: %q was removed; mkdir brings it back: %w", n, iofs.ErrNotExist))
		}
	}
	return s.ask(dir, name, false)
}

// possible reports whether name in dir can be a registry, a component of a
// repository's path or a tag at all.
func (s *namespace) possible(dir, name string) bool {
	if dir == "" {
		return images.ValidHost(name) || images.ValidComponent(name)
	}
	return images.Name{Repo: dir, Tag: name}.Valid() || images.ValidComponent(name)
}

// refused turns the error of a walk into its errno, and keeps the reason. The
// bare fs.ErrNotExist is for names that no registry was asked for.
func (s *namespace) refused(dir, name string, err error) fuse.Status {
	errno := errnoOf(err)
	if err != iofs.ErrNotExist {
		image := images.Name{Repo: dir, Tag: name}
		what := join(dir, name)
		if image.Valid() {
			what = image.String()
		}
		if s.f.errors.add(what, "walk", errno, err) {
			s.f.log.Warn("walk failed", "object", what, "errno", errno.Error(), "err", err)
		}
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
		return s.refused("", x.path, err)
	}
	out.NodeId = uint64(ino)
	valid := day
	if x.kind == foundVirtual {
		valid = virtualTTL
	}
	setTimeout(&out.EntryValid, &out.EntryValidNsec, valid)
	setTimeout(&out.AttrValid, &out.AttrValidNsec, valid)
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
	i := strings.LastIndexByte(path, '/')
	return spelling(path[:max(i, 0)], path[i+1:])
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
	if s.f.control.getattr(ino, out) {
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

// readDir lists what is here. The entries carry no attributes: those of an image
// would open it.
func (s *namespace) readDir(dir images.Ino, pos int, out *fuse.DirEntryList, plus bool) fuse.Status {
	if dir == controlIno {
		return s.f.control.readDir(pos, out, plus)
	}
	path, ok := s.f.store.NodePath(dir)
	if !ok {
		return fuse.Status(syscall.ESTALE)
	}
	names, err := s.list(path)
	if err != nil {
		return s.refused("", path, err)
	}
	parent, err := s.f.store.Node(path[:max(strings.LastIndexByte(path, '/'), 0)])
	if err != nil {
		return s.refused("", path, err)
	}
	if pos < 2 && !addDots(out, pos, dir, parent, plus) {
		return fuse.OK
	}
	addNames(out, names, max(pos-2, 0), plus)
	return fuse.OK
}

// addNames adds directories without attributes, from the one at pos on.
func addNames(out *fuse.DirEntryList, names []string, pos int, plus bool) {
	for i := pos; i < len(names); i++ {
		d := fuse.DirEntry{Name: names[i], Mode: syscall.S_IFDIR, Off: uint64(i + 3)}
		if plus && out.AddDirLookupEntry(d) == nil || !plus && !out.AddDirEntry(d) {
			return
		}
	}
}

// list returns the names in the directory at path: tags, and directories that
// are no tag.
func (s *namespace) list(path string) ([]string, error) {
	dirs, tags, err := s.f.store.Children(path)
	if err != nil {
		return nil, err
	}
	var names []string
	if path == "" {
		names = append(names, controlDir)
	}
	seen := map[string]bool{}
	for _, list := range [][]string{tags, dirs, s.madeIn(path)} {
		for _, n := range list {
			if !seen[n] {
				seen[n] = true
				names = append(names, n)
			}
		}
	}
	return names, nil
}

func (s *namespace) madeIn(path string) (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.made {
		i := strings.LastIndexByte(p, '/')
		if p[:max(i, 0)] == path {
			names = append(names, p[i+1:])
		}
	}
	sort.Strings(names)
	return names
}

// mkdir pulls the image of that name, or makes a directory on the way to one.
func (s *namespace) mkdir(dir images.Ino, name string, out *fuse.EntryOut) fuse.Status {
	path, ok := s.f.store.NodePath(dir)
	if !ok || dir == controlIno {
		return fuse.EPERM
	}
	x, err := s.here(path, name)
	if err != nil {
		return s.refused(path, name, err)
	}
	if x.kind != foundNothing {
		return fuse.Status(syscall.EEXIST)
	}
	if target, isLink := spelling(path, name); isLink {
		return s.mkdirSpelled(path, target)
	}
	if !s.possible(path, name) {
		return s.refused(path, name, fmt.Errorf("%q can be no registry, repository or tag: %w", name, iofs.ErrInvalid))
	}
	if x, err = s.ask(path, name, true); err != nil {
		return s.refused(path, name, err)
	}
	if x.kind == foundVirtual {
		if err := s.make(x.path); err != nil {
			return s.refused(path, name, err)
		}
		x.kind = foundDir
	}
	return s.entry(x, out)
}

// mkdirSpelled pulls the image that docker's spelling means. The name itself is
// a link to it then, so that the directory asked for exists.
func (s *namespace) mkdirSpelled(dir, target string) fuse.Status {
	repo, tag, ok := strings.Cut(target, "/")
	n := images.Name{Repo: join(dir, repo), Tag: tag}
	if ok && n.Valid() {
		if here, _, err := s.f.store.Here(n); err == nil && !here {
			if err := s.pull(n, true); err != nil {
				return s.refused(n.Repo, n.Tag, err)
			}
		}
	}
	return fuse.Status(syscall.EEXIST)
}

func (s *namespace) make(path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.made) >= maxMade {
		return fmt.Errorf("fs: making %q: %d directories without an image are here already", path, maxMade)
	}
	s.made[path] = true
	s.changed[path[:max(strings.LastIndexByte(path, '/'), 0)]] = time.Now()
	return nil
}

// rmdir untags, or removes a directory that holds nothing.
func (s *namespace) rmdir(dir images.Ino, name string) fuse.Status {
	path, ok := s.f.store.NodePath(dir)
	if !ok || dir == controlIno || dir == images.RootIno && name == controlDir {
		return fuse.EPERM
	}
	x, err := s.here(path, name)
	if err != nil {
		return s.refused(path, name, err)
	}
	if x.kind == foundImage {
		if _, err := s.f.store.Remove(x.image); err != nil {
			return s.refused(path, name, err)
		}
		s.f.log.Info("untagged", "image", x.image.String())
		s.removed(x.image)
		return fuse.OK
	}
	p := join(path, name)
	if s.f.store.HasPath(p) {
		return fuse.Status(errnoOf(errNotEmpty))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for m := range s.made {
		if strings.HasPrefix(m, p+"/") {
			return fuse.Status(errnoOf(errNotEmpty))
		}
	}
	if !s.made[p] {
		return fuse.ENOENT
	}
	delete(s.made, p)
	s.changed[path] = time.Now()
	return fuse.OK
}

// removed tells the kernel that n is gone, and with it the directories above
// that hold nothing any more.
func (s *namespace) removed(n images.Name) {
	s.listed(n)
	for path := n.Repo; path != "" && !s.f.store.HasPath(path); {
		i := strings.LastIndexByte(path, '/')
		parent := path[:max(i, 0)]
		if ino, err := s.f.store.Node(parent); err == nil {
			s.f.notify.entry(uint64(ino), path[i+1:])
		}
		path = parent
	}
}
