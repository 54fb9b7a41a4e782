package unionfs

import "strings"

// Verify reads the whole index: every checksum, and every reference of every
// record. It returns ErrDamaged when anything is wrong.
func (x *Index) Verify() error {
	if err := x.s.verify(); err != nil {
		return err
	}
	next := uint32(0)
	for i := range x.stats.Dirs {
		n, err := x.verifyDir(DirID(i), next)
		if err != nil {
			return err
		}
		next += n
	}
	if next != x.children || next != x.stats.Names {
		return x.s.damaged
	}
	for i := range x.stats.Files {
		if err := x.verifyFile(FileID(i)); err != nil {
			return err
		}
	}
	for i := range x.stats.Contents {
		if err := x.verifyContent(i); err != nil {
			return err
		}
	}
	for i := range x.stats.Chunks {
		if _, _, err := x.Chunk(i); err != nil {
			return err
		}
	}
	_, err := x.LinkDirs()
	return err
}

// verifyDir checks a directory whose child records must begin with number
// next, and returns how many there are.
func (x *Index) verifyDir(dir ID, next uint32) (n uint32, err error) {
	if _, _, err = x.Parent(dir); err != nil {
		return 0, err
	}
	if _, err = x.XattrNames(dir); err != nil {
		return 0, err
	}
	first, n, err := x.Children(dir)
	if err != nil {
		return 0, err
	}
	if first != next {
		return 0, x.s.damaged
	}
	last := ""
	for i := first; i < first+n; i++ {
		name, c, err := x.ChildAt(i)
		if err != nil {
			return 0, err
		}
		if name <= last || strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
			return 0, x.s.damaged
		}
		last = name
		if c.Kind != ChildInode || !c.ID.IsDir() {
			continue
		}
		parent, own, err := x.Parent(c.ID)
		if err != nil {
			return 0, err
		}
		if parent != dir || own != name {
			return 0, x.s.damaged
		}
	}
	return n, nil
}

// verifyFile checks what an inode that is no directory refers to.
func (x *Index) verifyFile(id ID) error {
	var a Attr
	if err := x.Attr(id, &a); err != nil {
		return err
	}
	if _, err := x.XattrNames(id); err != nil {
		return err
	}
	switch a.Mode & modeType {
	case modeLink:
		_, err := x.Readlink(id)
		return err
	case modeReg:
		c, err := x.Content(id)
		if err != nil {
			return err
		}
		if a.Nlink > 0 && c.Size != a.Size {
			return x.s.damaged
		}
	}
	return nil
}

// verifyContent checks that a content's chunks make up its size.
func (x *Index) verifyContent(n uint32) error {
	c, err := x.ContentByNumber(n)
	if err != nil {
		return err
	}
	off := int64(0)
	for i := range c.NChunks {
		k, size, err := x.Chunk(c.FirstChunk + i)
		if err != nil {
			return err
		}
		if k.Off != off {
			return x.s.damaged
		}
		off += size
	}
	if off != c.Size {
		return x.s.damaged
	}
	return nil
}
