package unionfs

import (
	"fmt"
	iofs "io/fs"
	"path"
)

// Stack is the layers of an image, the lowest first. It answers while layers are
// still arriving: what it answers is what the [Tree] of the finished layers will
// answer. Its methods are safe for concurrent use.
//
// Layers with implicit directories are the hard case, because such a directory
// may lie beyond a symbolic link of a layer below, and its entries then belong to
// some other directory. A Stack leaves that to the merge: see Lookup.
type Stack []Layer

// waiting says that a question cannot be answered before a layer has progressed.
type waiting int

func (w waiting) Error() string { return fmt.Sprintf("unionfs: layer %d has not arrived", int(w)) }

// Lookup finds name in the directory dir, which is the stack's root
// ({len(s)-1, RootID}) or what an earlier Lookup returned.
//
// If wait is not negative, the answer cannot be given yet, and ref and ok mean
// nothing: a wait below len(s) is the ordinal of a layer that has to progress
// first, len(s) means that all layers are done and that only their merge can tell.
// That happens only if a layer but the lowest has implicit directories, and for
// hard links to what the layers below do not have.
//
// Take the layer's Changed channel before asking, so that no change is missed.
//
// The topmost layer decides: what it has at the name is the answer at once, even
// if the layer is not done, once all layers above it are done and say nothing of
// the name. That something is hidden or absent is known when the layers concerned
// are done.
func (s Stack) Lookup(dir Ref, name string) (ref Ref, ok bool, wait int, err error) {
	ref, ok, err = s.lookup(dir, name)
	if w, is := err.(waiting); is {
		return Ref{}, false, int(w), nil
	}
	return ref, ok, -1, err
}

// lookup is Lookup with waits as errors. With dir and readlink it makes s a namespace.
func (s Stack) lookup(dir Ref, name string) (Ref, bool, error) {
	if dir.Layer < 0 || dir.Layer >= len(s) || !dir.ID.IsDir() {
		return Ref{}, false, fmt.Errorf("unionfs: looking up %q in layer %d: %w", name, dir.Layer, iofs.ErrInvalid)
	}
	names, err := pathNames(s[dir.Layer], dir.ID)
	if err != nil {
		return Ref{}, false, err
	}
	for j := dir.Layer; ; j-- {
		done := s[j].Done() // before anything else: what is absent then stays absent
		at, err := s.locate(j, names)
		if err != nil {
			return Ref{}, false, err
		}
		if j == dir.Layer {
			at.dir, at.found = dir.ID, true
		}
		var c Child
		if at.found {
			if c, err = s[j].Lookup(at.dir, name); err != nil {
				return Ref{}, false, err
			}
		}
		if c.Kind == ChildInode || c.Kind == ChildLink {
			ref, err := s.entry(j, at, c)
			return ref, err == nil, err
		}
		if err := s.passed(j, done); err != nil {
			return Ref{}, false, err
		}
		if c.Kind == ChildWhiteout || at.cut || j == 0 {
			return Ref{}, false, nil
		}
	}
}

func (s Stack) dir(p Ref) bool { return p.ID.IsDir() }

func (s Stack) readlink(p Ref) (string, error) { return readSymlink(s[p.Layer], p.ID) }

// spot is what a layer has at the path of a directory.
type spot struct {
	dir      ID
	found    bool // the layer has the directory
	cut      bool // layers below do not matter: an opaque directory, a whiteout or a file is on the path
	implicit bool // a directory on the path is implicit, so that it may lie elsewhere
}

// locate returns what layer j has at the path of names.
func (s Stack) locate(j int, names []string) (spot, error) {
	l := s[j]
	at := spot{dir: RootID, found: true}
	for i := 0; ; i++ {
		opaque, err := l.Opaque(at.dir)
		if err != nil {
			return spot{}, err
		}
		at.cut = at.cut || opaque
		if i == len(names) {
			return at, nil
		}
		c, err := l.Lookup(at.dir, names[i])
		if err != nil {
			return spot{}, err
		}
		if c.Kind != ChildInode || !c.ID.IsDir() {
			at.found = false
			at.cut = at.cut || c.Kind != ChildNone
			return at, nil
		}
		at.dir = c.ID
		var a Attr
		if err := l.Attr(c.ID, &a); err != nil {
			return spot{}, err
		}
		at.implicit = at.implicit || a.Implicit
	}
}

// passed is nil if the layers below j may be asked: layer j is done and puts
// nothing into directories but under their own paths.
func (s Stack) passed(j int, done bool) error {
	if !done {
		return waiting(j)
	}
	if j > 0 && s[j].HasImplicit() {
		return s.merge()
	}
	return nil
}

// merge says that only the merge can answer, or what it waits for.
func (s Stack) merge() waiting {
	for j := len(s) - 1; j >= 0; j-- {
		if !s[j].Done() {
			return waiting(j)
		}
	}
	return waiting(len(s))
}

// entry returns the inode of child c, which layer j has in the directory at.
func (s Stack) entry(j int, at spot, c Child) (Ref, error) {
	if j > 0 && at.implicit {
		return Ref{}, s.merge()
	}
	if c.Kind == ChildLink {
		return s.link(j, c)
	}
	if j > 0 && c.ID.IsDir() {
		var a Attr
		if err := s[j].Attr(c.ID, &a); err != nil {
			return Ref{}, err
		}
		if a.Implicit {
			return Ref{}, s.merge()
		}
	}
	return Ref{j, c.ID}, nil
}

// link resolves a hard link of layer j to a file of a lower layer.
func (s Stack) link(j int, c Child) (Ref, error) {
	if j == 0 {
		return Ref{}, s.merge()
	}
	low := s[:j]
	dir, base := path.Split(c.Target)
	way, ok, err := follow(low, []Ref{{j - 1, RootID}}, dir)
	var ref Ref
	if err == nil && ok {
		ref, ok, err = low.lookup(way[len(way)-1], base)
	}
	switch {
	case err == waiting(j), err == nil && (!ok || ref.ID.IsDir()):
		return Ref{}, s.merge() // it has the last word on where links lead, and on errors
	case err != nil:
		return Ref{}, err
	}
	return ref, nil
}

// Attr fills a with the attributes of ref, which Lookup returned. final is false
// if they may still change; a directory's Nlink is 1 then, which means unknown.
func (s Stack) Attr(ref Ref, a *Attr) (final bool, err error) {
	if ref.Layer < 0 || ref.Layer >= len(s) {
		return false, fmt.Errorf("unionfs: attributes in layer %d: %w", ref.Layer, iofs.ErrInvalid)
	}
	if err := s[ref.Layer].Attr(ref.ID, a); err != nil {
		return false, err
	}
	if !ref.ID.IsDir() {
		return s[ref.Layer].Done(), nil
	}
	if final, err = s.dirAttr(ref, a); !final {
		a.Nlink = 1
	}
	return final, err
}

// dirAttr completes a directory's attributes from the layers below ref.Layer, and
// reports whether they are those that the merge will have.
func (s Stack) dirAttr(ref Ref, a *Attr) (bool, error) {
	for j := range s { // one that comes through a symbolic link would add subdirectories
		if j > 0 && s[j].HasImplicit() {
			return false, nil
		}
	}
	names, err := pathNames(s[ref.Layer], ref.ID)
	if err != nil {
		return false, err
	}
	final := true
	for j := ref.Layer; ; j-- {
		done := s[j].Done()
		at, err := s.locate(j, names)
		if err != nil {
			return false, err
		}
		if at.found && j < ref.Layer {
			final = false // the subdirectories of both count
			if a.Implicit {
				if err := s[j].Attr(at.dir, a); err != nil {
					return false, err
				}
			}
			if !a.Implicit {
				return false, nil
			}
		}
		if !done {
			return false, nil
		}
		if at.cut || j == 0 {
			return final, nil
		}
	}
}
