package unionfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
)

// Types of entries, as archive/tar has them.
const (
	typeReg     = '0'
	typeRegA    = 0
	typeLink    = '1'
	typeSymlink = '2'
	typeChar    = '3'
	typeBlock   = '4'
	typeDir     = '5'
	typeFifo    = '6'
	typeCont    = '7' // contiguous file: a regular one
	typeSparse  = 'S' // GNU sparse file: archive/tar expands it
)

// prepare cleans and checks an entry. Nothing of the layer is needed for that.
func prepare(e *Entry) (*addition, error) {
	refuse := func(reason string) (*addition, error) {
		return nil, &EntryError{Name: e.Name, Reason: reason}
	}
	p, reason := cleanPath(e.Name)
	if reason != "" {
		return refuse(reason)
	}
	a := &addition{path: p, typ: e.Type}
	if reason = a.setAttr(e); reason == "" {
		reason = a.setTarget(e)
	}
	if reason == "" && a.typ != typeLink {
		a.xattrs, reason = encodeXattrs(e.Xattrs)
	}
	if reason == "" && e.Content != nil && a.typ == typeReg {
		reason = checkContent(a.attr.Size, e.Content)
	}
	if reason != "" {
		return refuse(reason)
	}
	return a, nil
}

// setAttr takes the attributes of an entry, or tells what is wrong with them.
func (a *addition) setAttr(e *Entry) (reason string) {
	switch {
	case e.Size < 0 || e.Size > MaxSize:
		return "size out of range"
	case e.UID < 0 || e.UID > maxID || e.GID < 0 || e.GID > maxID:
		return "owner out of range"
	case e.MtimeNsec > maxNsec:
		return "nanoseconds out of range"
	}
	a.attr = Attr{Mode: e.Mode & 0o7777, UID: uint32(e.UID), GID: uint32(e.GID), Nlink: 1,
		Mtime: e.Mtime, MtimeNsec: e.MtimeNsec}
	switch e.Type {
	case typeReg, typeRegA, typeCont, typeSparse:
		a.typ = typeReg
		a.attr.Mode |= modeReg
		a.attr.Size = e.Size
	case typeDir:
		a.attr.Mode |= modeDir
	case typeSymlink:
		a.attr.Mode = modeLink | 0o777 // a symbolic link has no permissions of its own on Linux, whatever the archive says
		a.attr.Size = int64(len(e.Linkname))
	case typeFifo:
		a.attr.Mode |= modeFifo
	case typeChar, typeBlock:
		if e.Major < 0 || e.Major > maxMajor || e.Minor < 0 || e.Minor > maxMinor {
			return "device number out of range"
		}
		a.attr.Mode |= modeChar
		if e.Type == typeBlock {
			a.attr.Mode = a.attr.Mode&^modeChar | modeBlock
		}
		a.attr.Rdev = encodeDev(uint32(e.Major), uint32(e.Minor))
	case typeLink:
	default:
		return fmt.Sprintf("unknown type %q", e.Type)
	}
	return ""
}

// encodeDev is Linux's new_encode_dev: the low 8 bits of the minor, the major,
// the rest of the minor.
func encodeDev(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | minor&^0xff<<12
}

// setTarget takes the target of a link, or tells what is wrong with it.
func (a *addition) setTarget(e *Entry) (reason string) {
	switch a.typ {
	case typeSymlink:
		switch {
		case e.Linkname == "":
			return "symbolic link to nothing"
		case len(e.Linkname) > MaxTarget:
			return "target of the link too long"
		case strings.IndexByte(e.Linkname, 0) >= 0:
			return "NUL in the target of the link"
		}
		a.target = e.Linkname
	case typeLink:
		if a.target, reason = cleanPath(e.Linkname); reason != "" {
			return "target of the link: " + reason
		}
	}
	return ""
}

// xattrSet is an inode's attributes, encoded; no bytes when it has none.
type xattrSet struct {
	bytes []byte
	names []string
}

// encodeXattrs encodes attributes, or tells what is wrong with them.
func encodeXattrs(m map[string]string) (set xattrSet, reason string) {
	if len(m) == 0 {
		return set, ""
	}
	if len(m) > MaxXattrs {
		return set, "too many extended attributes"
	}
	size := xattrCount
	for n, v := range m {
		if n == "" || len(n) > MaxName || strings.IndexByte(n, 0) >= 0 {
			return set, "bad name of an extended attribute"
		}
		if len(v) > MaxXattrValue {
			return set, "extended attribute too large"
		}
		size += xattrHead + len(n) + len(v)
	}
	if size > MaxXattrSet {
		return set, "extended attributes too large together"
	}
	set.names = slices.Sorted(maps.Keys(m))
	b := binary.LittleEndian.AppendUint16(make([]byte, 0, size), uint16(len(m)))
	for _, n := range set.names {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(n)))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(m[n])))
		b = append(append(b, n...), m[n]...)
	}
	set.bytes = b
	return set, ""
}

// addXattrs puts a set on the heap, once for all inodes that have the same, and
// returns 1 + its offset; 0 for no attributes.
func (b *Builder) addXattrs(set *xattrSet) (uint32, error) {
	if len(set.bytes) == 0 {
		return 0, nil
	}
	h := uint32(maphash.Bytes(b.seed, set.bytes))
	for n := b.setTab.first(h); n != 0; {
		r := b.sets.at(n-1, setSize)
		off, l := get32(r, setOff), get32(r, setLen)
		if get32(r, setHash) == h && bytes.Equal(b.xattrs.bytes()[off:off+l], set.bytes) {
			return off + 1, nil
		}
		n = get32(r, setNext)
	}
	return b.newSet(set, h)
}

func (b *Builder) newSet(set *xattrSet, h uint32) (uint32, error) {
	if b.xattrs.n+int64(len(set.bytes)) > MaxXattrHeap {
		return 0, refusal("extended attributes of the layer too large together")
	}
	for _, n := range set.names {
		if _, ok := b.xattrNames[n]; !ok && len(b.xattrNames) >= MaxXattrNames {
			return 0, refusal("too many names of extended attributes")
		}
		b.xattrNames[n] = struct{}{}
	}
	i := b.sets.count(setSize)
	grown, err := b.setTab.fit(i)
	if err != nil {
		return 0, err
	}
	chain := func(k uint32, r []byte) {
		slot := b.setTab.slot(get32(r, setHash))
		put32(r, setNext, *slot)
		*slot = k + 1
	}
	if grown {
		for k := range i {
			chain(k, b.sets.at(k, setSize))
		}
	}
	off := uint32(b.xattrs.n)
	m, err := b.xattrs.grow(int64(len(set.bytes)))
	if err != nil {
		return 0, err
	}
	copy(m, set.bytes)
	r, err := b.sets.grow(setSize)
	if err != nil {
		return 0, err
	}
	put32(r, setOff, off)
	put32(r, setLen, uint32(len(set.bytes)))
	put32(r, setHash, h)
	chain(i, r)
	return off + 1, nil
}
