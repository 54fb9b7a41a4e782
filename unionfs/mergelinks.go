package unionfs

import (
	"fmt"
	"path"
)

// crossLink is a hard link of a layer to a path that the layer does not have.
type crossLink struct {
	linkKey
	target string
}

// resolveLinks finds the targets of layer k's hard links in the layers below it,
// and returns the links whose target is not there.
func (m *merger) resolveLinks(k int) ([]crossLink, error) {
	layer := m.layers[k]
	dirs, err := layer.LinkDirs()
	if err != nil {
		return nil, err
	}
	var pending []crossLink
	for _, dir := range dirs {
		m.dirs = append(m.dirs, Ref{k, dir})
		first, n, err := layer.Children(dir)
		if err != nil {
			return nil, err
		}
		for i := first; i < first+n; i++ {
			name, c, err := layer.ChildAt(i)
			if err != nil {
				return nil, err
			}
			if c.Kind != ChildLink {
				continue
			}
			if len(m.links)+len(pending) >= maxCrossLinks {
				return nil, fmt.Errorf("unionfs: merging layers: more than %d hard links to other layers", maxCrossLinks)
			}
			l := crossLink{linkKey{Ref{k, dir}, name}, c.Target}
			if err := m.resolveLink(l, false); err != nil {
				return nil, err
			}
			if _, ok := m.links[l.linkKey]; !ok {
				pending = append(pending, l)
			}
		}
	}
	return pending, nil
}

// resolveLink finds the target of a hard link in what is merged so far. must says
// that it is an error if nothing is there. A link to a directory always is.
func (m *merger) resolveLink(l crossLink, must bool) error {
	dir, base := path.Split(l.target)
	at, ok, err := follow(m, []step{{found{dir: m.root}, ""}}, dir)
	if err != nil {
		return err
	}
	var p found
	if ok {
		if p, ok, err = m.find(at[len(at)-1].found, base); err != nil {
			return err
		}
	}
	switch {
	case ok && !p.isDir():
		m.links[l.linkKey] = p.ref
		return nil
	case ok:
		return m.linkError(l, "a directory")
	case must:
		return m.linkError(l, "not there")
	}
	return nil
}

func (m *merger) linkError(l crossLink, what string) error {
	dir, err := layerPath(m.layers[l.dir.Layer], l.dir.ID)
	if err != nil {
		return err
	}
	return &EntryError{
		Name:   path.Join(dir, l.name),
		Reason: fmt.Sprintf("target %q of the hard link is %s", l.target, what),
	}
}

// layerPath returns the path of a layer's directory, "" for the root.
func layerPath(l Layer, dir ID) (string, error) {
	names, err := pathNames(l, dir)
	if err != nil {
		return "", err
	}
	return path.Join(names...), nil
}
