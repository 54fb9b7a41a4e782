package unionfs

import (
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// maxTargetPath bounds a path while the symbolic links in it are expanded: PATH_MAX.
const maxTargetPath = 4096

// namespace is something in which paths can be followed: a stack, the state of a
// merge, a tree. P is a place in it.
type namespace[P any] interface {
	lookup(dir P, name string) (P, bool, error)
	dir(p P) bool
	readlink(p P) (string, error) // "" if p is not a symbolic link
}

// follow follows path from the last place of at, whose first is the root. It
// returns the places on the way to the directory that path names; ok is false if
// it names none. ".." above the root is the root. It changes at.
func follow[P any](ns namespace[P], at []P, path string) (way []P, ok bool, err error) {
	way, missing, err := reach(ns, at, path)
	return way, err == nil && way != nil && missing == "", err
}

// reach is follow, but if nothing is at the last name of path, it returns the
// places on the way to where it would be, and the name. way is nil if path names
// something else than a directory, or lies below nothing.
func reach[P any](ns namespace[P], at []P, path string) (way []P, missing string, err error) {
	if strings.HasPrefix(path, "/") {
		at = at[:1]
	}
	for hops := 0; path != ""; {
		var name string
		name, path, _ = strings.Cut(path, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			at = at[:max(1, len(at)-1)]
			continue
		}
		p, ok, err := ns.lookup(at[len(at)-1], name)
		if err != nil {
			return nil, "", err
		}
		if !ok {
			if strings.Trim(path, "/") != "" {
				return nil, "", nil
			}
			return at, name, nil
		}
		if ns.dir(p) {
			at = append(at, p)
			continue
		}
		target, err := ns.readlink(p)
		if err != nil {
			return nil, "", err
		}
		hops++
		if target == "" || hops > MaxHops || len(target)+len(path) >= maxTargetPath {
			return nil, "", nil
		}
		if target[0] == '/' {
			at = at[:1]
		}
		path = target + "/" + path
	}
	return at, "", nil
}

// readSymlink returns the target of a symbolic link, "" for another inode.
func readSymlink(l Layer, id ID) (string, error) {
	var a Attr
	if err := l.Attr(id, &a); err != nil || a.Mode&unix.S_IFMT != unix.S_IFLNK {
		return "", err
	}
	return l.Readlink(id)
}

// pathNames returns the names on the way from the layer's root to dir.
func pathNames(l Layer, dir ID) ([]string, error) {
	var names []string
	for dir != RootID {
		parent, name, err := l.Parent(dir)
		if err != nil {
			return nil, err
		}
		if len(names) >= maxTargetPath { // a path of 4,096 bytes has fewer
			return nil, ErrDamaged
		}
		names = append(names, name)
		dir = parent
	}
	slices.Reverse(names)
	return names, nil
}
