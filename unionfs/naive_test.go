package unionfs

import (
	"errors"
	"path"
	"slices"
	"strings"
)

// naiveMerge applies layers one after the other to a map of paths, as tar does to
// a directory.
type naiveMerge struct {
	layers []source
	nodes  map[string]*naiveNode
	queue  []naiveMove
	links  map[linkKey]*naiveNode // of this layer, also those that do not come to stand
}

type naiveNode struct {
	dirs   []Ref // a directory: who made it, in the order in which they came
	owner  int   // a file: the layer
	file   Ref
	target string // a symbolic link
	link   string // a hard link that is not resolved
}

type naiveMove struct {
	src  Ref
	path string
}

var errNaive = errors.New("dangling hard link")

func naive(layers []source) (map[string]*naiveNode, error) {
	m := &naiveMerge{layers: layers, nodes: map[string]*naiveNode{"": {}}}
	for k := range layers {
		m.links = map[linkKey]*naiveNode{}
		dirs, _ := layers[k].LinkDirs()
		for _, dir := range dirs {
			first, n, _ := layers[k].Children(dir)
			for i := first; i < first+n; i++ {
				if name, c, _ := layers[k].ChildAt(i); c.Kind == ChildLink {
					m.links[linkKey{Ref{k, dir}, name}] = &naiveNode{owner: k, link: c.Target}
				}
			}
		}
		if !m.resolveAll() {
			return nil, errNaive
		}
		m.put(Ref{k, RootID}, "")
		for len(m.queue) > 0 {
			mv := m.queue[0]
			m.queue = m.queue[1:]
			n := m.nodes[mv.path]
			if n == nil || n.dirs != nil {
				m.put(mv.src, mv.path)
			} else if to, ok := m.follow(path.Dir("/" + mv.path)[1:], n.target); ok && n.target != "" {
				m.put(mv.src, to)
			} else if to := m.missing(path.Dir("/" + mv.path)[1:], n.target); to != "" {
				m.put(mv.src, to)
			} else if n.owner != k {
				m.remove(mv.path)
				m.put(mv.src, mv.path)
			}
		}
		if !m.resolveAll() {
			return nil, errNaive
		}
		for _, n := range m.links {
			if n.link != "" {
				return nil, errNaive
			}
		}
	}
	return m.nodes, nil
}

func (m *naiveMerge) resolveAll() bool {
	for _, n := range m.links {
		if n.link != "" && !m.resolve(n) {
			return false
		}
	}
	return true
}

// resolve resolves a hard link, if its target is there. It is false for a directory.
func (m *naiveMerge) resolve(n *naiveNode) bool {
	dir, base := path.Split(n.link)
	at, ok := m.follow("", dir)
	if !ok {
		return true
	}
	t := m.nodes[path.Join(at, base)]
	switch {
	case t == nil || t.link != "":
	case t.dirs != nil:
		return false
	default:
		n.file, n.target, n.link = t.file, t.target, ""
	}
	return true
}

// follow is the path of the directory that target names, seen from dir.
func (m *naiveMerge) follow(dir, target string) (string, bool) {
	for hops := 0; ; {
		if strings.HasPrefix(target, "/") {
			dir = ""
		}
		target = strings.TrimLeft(target, "/")
		if target == "" {
			return dir, true
		}
		name, rest, _ := strings.Cut(target, "/")
		target = rest
		if name == ".." {
			dir = path.Dir("/" + dir)[1:]
			continue
		}
		n := m.nodes[path.Join(dir, name)]
		switch {
		case name == ".":
		case n == nil:
			return "", false
		case n.dirs != nil:
			dir = path.Join(dir, name)
		case n.target == "":
			return "", false
		default:
			if hops++; hops > MaxHops {
				return "", false
			}
			target = n.target + "/" + rest
		}
	}
}

// missing is the path that target names, if nothing but its last name is missing.
func (m *naiveMerge) missing(dir, target string) string {
	for range MaxHops {
		target = strings.TrimRight(target, "/")
		up, base := path.Split(target)
		at, ok := m.follow(dir, up)
		if !ok || base == "" || base == "." || base == ".." {
			return ""
		}
		n := m.nodes[path.Join(at, base)]
		switch {
		case n == nil:
			return path.Join(at, base)
		case n.dirs != nil || n.target == "":
			return ""
		}
		dir, target = at, n.target
	}
	return ""
}

func (m *naiveMerge) under(p string) []string {
	var all []string
	for q := range m.nodes {
		if p == "" && q != "" || strings.HasPrefix(q, p+"/") {
			all = append(all, q)
		}
	}
	slices.Sort(all)
	return all
}

func (m *naiveMerge) remove(p string) {
	for _, q := range m.under(p) {
		delete(m.nodes, q)
	}
	delete(m.nodes, p)
}

// cut removes what layers below k have at p or under it.
func (m *naiveMerge) cut(p string, k int) {
	for _, q := range append(m.under(p), p) {
		n := m.nodes[q]
		if n == nil {
			continue
		}
		if n.dirs == nil {
			if n.owner < k {
				delete(m.nodes, q)
			}
			continue
		}
		n = &naiveNode{dirs: slices.DeleteFunc(slices.Clone(n.dirs), func(r Ref) bool { return r.Layer < k })}
		if m.nodes[q] = n; len(n.dirs) == 0 && q != "" {
			delete(m.nodes, q)
		}
	}
}

func (n *naiveNode) has(k int) bool {
	if n.dirs == nil {
		return n.owner == k
	}
	return slices.ContainsFunc(n.dirs, func(r Ref) bool { return r.Layer == k })
}

// put puts a layer's directory at p, where a directory or nothing is.
func (m *naiveMerge) put(src Ref, p string) {
	k := src.Layer
	l := m.layers[k]
	if opaque, _ := l.Opaque(src.ID); opaque && m.nodes[p] != nil {
		m.cut(p, k)
	}
	n := &naiveNode{}
	if old := m.nodes[p]; old != nil {
		n.dirs = slices.Clone(old.dirs)
	}
	n.dirs = append(n.dirs, src)
	m.nodes[p] = n
	first, count, _ := l.Children(src.ID)
	for i := first; i < first+count; i++ {
		name, c, _ := l.ChildAt(i)
		q := path.Join(p, name)
		old := m.nodes[q]
		switch {
		case c.Kind == ChildWhiteout:
			m.cut(q, k)
		case c.Kind == ChildInode && c.ID.IsDir():
			m.putDir(Ref{k, c.ID}, q)
		default:
			n := &naiveNode{owner: k, file: Ref{k, c.ID}}
			if c.Kind == ChildInode {
				n.target, _ = readSymlink(l, c.ID)
			} else {
				n = m.links[linkKey{src, name}]
			}
			if old == nil || !old.has(k) {
				m.remove(q)
				m.nodes[q] = n
			}
		}
	}
}

func (m *naiveMerge) putDir(src Ref, q string) {
	old := m.nodes[q]
	if old != nil && old.dirs == nil {
		opaque, _ := m.layers[src.Layer].Opaque(src.ID)
		var a Attr
		m.layers[src.Layer].Attr(src.ID, &a)
		if a.Implicit && !opaque && old.target != "" {
			m.queue = append(m.queue, naiveMove{src, q})
			return
		}
		if old.has(src.Layer) {
			return
		}
		m.remove(q)
	}
	m.put(src, q)
}

// top is the name of a directory: its topmost contributor. source is who gives
// its attributes.
func (n *naiveNode) top() Ref {
	top := n.dirs[0]
	for _, r := range n.dirs {
		if r.Layer > top.Layer {
			top = r
		}
	}
	return top
}

func (n *naiveNode) source(layers []source) Ref {
	best, lowest := noRef, n.dirs[0]
	for _, r := range n.dirs {
		var a Attr
		layers[r.Layer].Attr(r.ID, &a)
		if !a.Implicit && r.Layer > best.Layer {
			best = r
		}
	}
	if best == noRef {
		return lowest
	}
	return best
}
