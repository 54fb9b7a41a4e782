package fs

import (
	"sort"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// readDir lists what is here, from a snapshot. The entries carry no attributes:
// those of an image would open it.
func (s *namespace) readDir(dir images.Ino, off uint64, out *fuse.DirEntryList, plus bool) fuse.Status {
	path, ok := s.f.store.NodePath(dir)
	if !ok {
		return fuse.Status(syscall.ESTALE)
	}
	parent, err := s.f.store.Node(parentOf(path))
	if err == nil {
		err = s.f.snaps.readDir(dir, parent, off, out, plus, func() ([]listed, error) { return s.list(path) })
	}
	if err != nil {
		return s.refused("list", path, err)
	}
	return fuse.OK
}

// list returns what is in the directory at path: tags, and directories that are
// no tag.
func (s *namespace) list(path string) ([]listed, error) {
	dirs, tags, err := s.f.store.Children(path)
	if err != nil {
		return nil, err
	}
	var names []listed
	seen := map[string]bool{}
	add := func(n string) {
		if !seen[n] {
			seen[n] = true
			names = append(names, listed{n, syscall.S_IFDIR})
		}
	}
	if path == "" {
		add(controlDir)
	}
	for _, list := range [][]string{tags, dirs, s.madeIn(path)} {
		for _, n := range list {
			add(n)
		}
	}
	return names, nil
}

func (s *namespace) madeIn(path string) (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.made {
		if parentOf(p) == path {
			names = append(names, p[strings.LastIndexByte(p, '/')+1:])
		}
	}
	sort.Strings(names)
	return names
}
