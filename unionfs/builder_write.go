package unionfs

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"slices"
	"unsafe"
)

// Write completes the layer, if Complete was not called, and writes its index
// into f, which must be empty. f is not synced. The error is the layer's own
// after Fail, an [EntryError] when the content of a file is missing, or that of
// writing.
//
// Readers are served meanwhile: the lock is held for reading only.
func (b *Builder) Write(f *os.File, m Meta) error {
	b.Complete()
	b.mu.RLock()
	defer b.mu.RUnlock()
	if err := b.writable(); err != nil {
		return err
	}
	if err := b.checkContents(); err != nil {
		return err
	}
	w := newSectionWriter(f, indexMagic, indexVersion)
	b.writeDirs(w)
	w.begin(secFiles)
	w.append(b.files.bytes())
	links := array{s: b.s}
	defer links.free()
	if err := b.writeChildren(w, &links); err != nil {
		return err
	}
	w.begin(secLinkDirs)
	w.append(links.bytes())
	w.begin(secNames)
	w.append(b.names.bytes())
	w.begin(secXattrs)
	w.append(b.xattrs.bytes())
	w.begin(secXattrNames)
	for _, n := range slices.Sorted(maps.Keys(b.xattrNames)) {
		w.append([]byte{byte(len(n))})
		w.append([]byte(n))
	}
	b.writeContents(w)
	w.begin(secChunks)
	w.append(b.chunks.bytes())
	w.begin(secDigests)
	w.append(b.digests.bytes())
	if err := w.finish(b.meta(m)); err != nil {
		return fmt.Errorf("unionfs: writing layer index: %w", err)
	}
	return nil
}

// meta encodes the part of the header that a layer index defines.
func (b *Builder) meta(m Meta) []byte {
	h, s := make([]byte, metaLen), b.stats()
	copy(h[metaBlob:], m.Blob[:])
	copy(h[metaDiffID:], m.DiffID[:])
	put64(h, metaBlobSize, m.BlobSize)
	h[metaFormat] = m.Format
	if b.implicit > 0 {
		h[metaImplicit] = 1
	}
	put32(h, metaNames, s.Names)
	put64(h, metaExpanded, s.Expanded)
	put64(h, metaPackSize, s.PackSize)
	for i, n := range []uint32{s.Dirs, s.Files, s.Contents, s.Chunks} {
		put32(h, metaDirs+4*i, n)
	}
	return h
}

// checkContents finds files that could never be read.
func (b *Builder) checkContents() error {
	for i := range b.files.count(fileSize) {
		r := b.files.at(i, fileSize)
		if get16(r, inoMode)&modeType != modeReg || get64(r, fileLen) == 0 || get32(r, inoNlink) == 0 {
			continue
		}
		if n := get32(r, fileAux); n == none || get32(b.contents.at(n, contentSize), contDigest) == none {
			return contentError(FileID(i), "its content is missing")
		}
	}
	return nil
}

// writeDirs writes the directories with the numbers that their child records
// will have: those of one after those of the other.
func (b *Builder) writeDirs(w *sectionWriter) {
	w.begin(secDirs)
	first := uint32(0)
	var r [dirSize]byte
	for i := range b.dirs.count(dirSize) {
		copy(r[:], b.dirs.at(i, dirSize))
		put32(r[:], dirFirst, first)
		first += get32(r[:], dirCount)
		w.append(r[:])
	}
}

// writeChildren writes the child records, each directory's sorted by name, and
// puts the directories that have a ChildLink into links.
func (b *Builder) writeChildren(w *sectionWriter, links *array) error {
	w.begin(secChildren)
	order := array{s: b.s}
	defer order.free()
	for i := range b.dirs.count(dirSize) {
		d := b.dirs.at(i, dirSize)
		order.n = 0
		if _, err := order.grow(4 * int64(get32(d, dirCount))); err != nil {
			return err
		}
		nodes, k := order.words(), 0
		for n := get32(d, dirFirst); n != 0; k++ {
			nodes[k] = n - 1
			n = get32(b.nodes.at(n-1, nodeSize), nodeSib)
		}
		slices.SortFunc(nodes, func(p, q uint32) int { return cmp.Compare(b.nodeName(p), b.nodeName(q)) })
		linked := false
		for _, n := range nodes {
			r := b.nodes.at(n, nodeSize)[:childSize]
			linked = linked || ChildKind(r[childKind]) == ChildLink
			w.append(r)
		}
		if linked {
			m, err := links.grow(4)
			if err != nil {
				return err
			}
			put32(m, 0, i)
		}
	}
	return nil
}

// nodeName is the name of a node; it aliases the heap.
func (b *Builder) nodeName(n uint32) string {
	r := b.nodes.at(n, nodeSize)
	s := b.name(get32(r, childName), uint32(r[childLen]))
	return unsafe.String(unsafe.SliceData(s), len(s))
}

// writeContents writes the content records without the links of hash chains.
func (b *Builder) writeContents(w *sectionWriter) {
	w.begin(secContents)
	var r [contentSize]byte
	for i := range b.contents.count(contentSize) {
		copy(r[:], b.contents.at(i, contentSize))
		put32(r[:], contNext, 0)
		if get32(r[:], contDigest) == none { // reserved for a file that was superseded
			clear(r[:])
			put32(r[:], contDigest, none)
		}
		w.append(r[:])
	}
}
