package fs

import (
	"fmt"
	iofs "io/fs"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// place is where an operation on a name is: the path of a directory of the
// namespace. What is not one cannot hold names: an image is not changed
// (errReadOnly), and .imgfs is not either (errNotAllowed).
func (s *namespace) place(dir images.Ino) (string, error) {
	if dir.Kind() != images.KindNode {
		return "", fmt.Errorf("an image cannot be changed: %w", errReadOnly)
	}
	path, ok := s.f.store.NodePath(dir)
	if !ok || isControl(path) {
		return "", fmt.Errorf("no image can have a name here: %w", errNotAllowed)
	}
	return path, nil
}

// meant is the name of an image that name in the directory at path stands for,
// if it were here: a tag, a digest, or docker's spelling of one.
func meant(path, name string) (n images.Name, ok bool) {
	if n = (images.Name{Repo: path, Tag: name}); valid(n) {
		return n, true
	}
	target, ok := spelling(path, name)
	repo, tag, two := strings.Cut(target, "/")
	n = images.Name{Repo: join(path, repo), Tag: tag}
	return n, ok && two && valid(n)
}

// nameFor is the name that an operation gives to an image: a tag of a
// repository, under which nothing is.
func nameFor(path, name string) (images.Name, error) {
	n, ok := meant(path, name)
	if !ok || n.IsDigest() {
		return n, fmt.Errorf("%q can be no tag: %w", join(path, name), iofs.ErrInvalid)
	}
	return n, nil
}

// mkdir pulls the image of that name, or makes a directory on the way to one.
func (s *namespace) mkdir(dir images.Ino, name string, again bool, out *fuse.EntryOut) fuse.Status {
	path, err := s.place(dir)
	if err != nil {
		return s.refused("mkdir", join(path, name), err)
	}
	what := printed(path, name)
	x, err := s.here(path, name)
	if err != nil {
		return s.refused("mkdir", what, err)
	}
	if again && (x.kind == foundImage || x.kind == foundDir) {
		return s.entry(x, out)
	}
	if x.kind != foundNothing {
		return fuse.Status(syscall.EEXIST)
	}
	if _, isLink := spelling(path, name); isLink {
		return s.mkdirSpelled(path, name)
	}
	if !s.possible(path, name) {
		return s.refused("mkdir", what, fmt.Errorf("%q can be no registry, repository or tag: %w", name, iofs.ErrInvalid))
	}
	if x, err = s.ask(path, name, true); err != nil {
		return s.refused("mkdir", what, err)
	}
	if x.kind == foundVirtual {
		if err := s.make(x.path); err != nil {
			return s.refused("mkdir", what, err)
		}
		x.kind = foundDir
	}
	return s.entry(x, out)
}

// mkdirSpelled pulls the image that docker's spelling means. The name itself is
// a link to it then, so that the directory asked for exists.
func (s *namespace) mkdirSpelled(path, name string) fuse.Status {
	if n, ok := meant(path, name); ok {
		if here, _, err := s.f.store.Here(n); err == nil && !here {
			if err := s.pull(n, true); err != nil {
				return s.refused("mkdir", n.String(), err)
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
	s.changed[parentOf(path)] = time.Now()
	return nil
}

// rmdir untags, or removes a directory that holds nothing.
func (s *namespace) rmdir(dir images.Ino, name string, again bool) fuse.Status {
	path, err := s.place(dir)
	if err == nil && dir == images.RootIno && name == controlDir {
		err = errNotAllowed
	}
	if err != nil {
		return s.refused("rmdir", join(path, name), err)
	}
	what := printed(path, name)
	x, err := s.here(path, name)
	if err != nil {
		return s.refused("rmdir", what, err)
	}
	if x.kind == foundImage {
		id := s.imageID(x.image)
		c, err := s.f.store.Remove(x.image)
		if err != nil {
			return s.refused("rmdir", what, err)
		}
		s.f.log.Info("untagged", "image", x.image.String())
		s.happened("untag", x.image, id, c)
		s.tell(c, []images.Name{x.image}, dir)
		return fuse.OK
	}
	p := join(path, name)
	if n, ok := meant(path, name); again && ok && x.kind == foundNothing && !s.f.store.HasPath(p) {
		s.tell(images.Change{}, []images.Name{n}, dir)
		return fuse.OK
	}
	if s.f.store.HasPath(p) {
		return s.refused("rmdir", p, errNotEmpty)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for m := range s.made {
		if strings.HasPrefix(m, p+"/") {
			return fuse.Status(errnoOf(errNotEmpty))
		}
	}
	if !s.made[p] && !again {
		return fuse.ENOENT
	}
	delete(s.made, p)
	s.changed[path] = time.Now()
	return fuse.OK
}

// nowBits are those of a SETATTR that sets times to now, as touch does.
const nowBits = fuse.FATTR_ATIME | fuse.FATTR_MTIME | fuse.FATTR_CTIME | fuse.FATTR_ATIME_NOW | fuse.FATTR_MTIME_NOW |
	fuse.FATTR_FH | fuse.FATTR_LOCKOWNER

// touches reports whether a SETATTR sets times to now and nothing else.
func touches(bits uint32) bool {
	now := bits & (fuse.FATTR_ATIME_NOW | fuse.FATTR_MTIME_NOW)
	return now != 0 && bits&^uint32(nowBits) == 0
}

// manages reports whether uid may change what names stand for: as a directory of
// the namespace has it, its owner, who mounts, and root. In the root directory of
// an image the kernel checks the mode that whoever made the image chose.
func (s *namespace) manages(uid uint32) bool {
	return !s.f.o.AllowOther || uid == s.f.uid || uid == 0
}

var errNotOwner = fmt.Errorf("only who mounted may do that: %w", iofs.ErrPermission)

// touch asks n's registry again, for uid. The caller holds the lock of the image's
// root directory, not of the directory that has its name.
func (s *namespace) touch(n images.Name, uid uint32, again bool) error {
	if !s.manages(uid) {
		return errNotOwner
	}
	if here, _, err := s.f.store.Here(n); err != nil || !here {
		if isControl(n.Repo) {
			return fmt.Errorf("it has no name that a registry could be asked for: %w", errReadOnly)
		}
		return orNotExist(err)
	}
	s.touching.Add(1)
	defer s.touching.Add(-1)
	c, err := s.f.store.Update(background(), n)
	if err != nil {
		return err
	}
	if c.Image == (v1.Hash{}) {
		if again { // the server that died may have changed it, and not told
			s.tell(images.Change{Untagged: []images.Name{n}}, nil)
		}
		s.f.log.Info("asked again, nothing has changed", "image", n.String())
		return nil
	}
	s.f.log.Info("updated", "image", n.String(), "manifest", c.Image.String())
	s.happened("update", n, s.imageID(n), c)
	c.Untagged = append(c.Untagged, n)
	s.tell(c, nil)
	return nil
}

func orNotExist(err error) error {
	if err == nil {
		return iofs.ErrNotExist
	}
	return err
}

// imageID is the ID of the image that n stands for, for events; "" when it is
// not known.
func (s *namespace) imageID(n images.Name) string {
	info, err := s.f.store.Image(n)
	if err != nil {
		return ""
	}
	return info.ID.String()
}

// happened records an operation and what followed from it.
func (s *namespace) happened(op string, n images.Name, id string, c images.Change) {
	s.f.events.add(op, n, id)
	for _, other := range c.Untagged {
		if other != n {
			s.f.events.add("untag", other, "")
		}
	}
	for _, id := range c.Dangling {
		s.f.events.add("dangling", images.Name{}, id.String())
	}
	for _, id := range c.Deleted {
		s.f.events.add("delete", images.Name{}, id.String())
	}
}

// tell has the kernel forget what c changed, and returns when it has: names that
// are gone or stand for another image, and directories that hold nothing any
// more. The kernel itself puts right the names in own. The caller's system call
// holds the locks of the directories in held, in which nothing can be waited for;
// it ends right after the answer, and what is queued for them then is done.
func (s *namespace) tell(c images.Change, own []images.Name, held ...images.Ino) {
	var waits []<-chan struct{}
	forget := func(path, name string) {
		ino, err := s.f.store.Node(path)
		if err != nil {
			s.f.log.Warn("the kernel was not told of a change", "name", join(path, name), "err", err)
			return
		}
		done := s.f.notify.entry(uint64(ino), name)
		for _, h := range held {
			if h == ino {
				return
			}
		}
		waits = append(waits, done)
	}
	gone := map[string]bool{}
	for _, n := range append(append([]images.Name{}, c.Untagged...), own...) {
		s.listed(n)
		gone[n.Repo] = true
	}
	for _, n := range c.Untagged {
		if !contains(own, n) {
			forget(n.Repo, n.Tag)
		}
	}
	told := map[string]bool{}
	for repo := range gone {
		root, _ := base(repo)
		for path := repo; path != root && !told[path] && !s.f.store.HasPath(path) && !s.isMade(path); path = parentOf(path) {
			told[path] = true
			forget(parentOf(path), path[strings.LastIndexByte(path, '/')+1:])
		}
	}
	s.f.notify.wait(waits)
}

func contains(list []images.Name, n images.Name) bool {
	for _, x := range list {
		if x == n {
			return true
		}
	}
	return false
}

// listed tells the kernel that the listings on the way to n have changed.
func (s *namespace) listed(n images.Name) {
	now := time.Now()
	root, _ := base(n.Repo)
	for path := n.Repo; ; path = parentOf(path) {
		has := s.f.store.HasPath(path)
		s.mu.Lock()
		s.changed[path] = now
		if has {
			delete(s.made, path)
		}
		s.mu.Unlock()
		if ino, err := s.f.store.Node(path); err == nil {
			s.f.notify.listing(uint64(ino))
		}
		if path == root {
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
