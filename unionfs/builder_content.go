package unionfs

import (
	"fmt"
	"hash/maphash"
)

// BeginContent reserves the place of a regular file's content in the layer's
// pack, before its bytes have passed, and returns it. An empty file has no
// place, and NoID means nothing here. The error is an [EntryError] when id is no
// regular file or has a content already.
func (b *Builder) BeginContent(id ID) (packOff int64, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.writable(); err != nil || id == NoID {
		return 0, err
	}
	r, err := b.regular(id)
	if err != nil {
		return 0, err
	}
	if get32(r, fileAux) != none {
		return 0, contentError(id, "has a content")
	}
	if get64(r, fileLen) == 0 {
		return 0, nil
	}
	n, err := b.newContent(id, r)
	if err != nil {
		return 0, entryError(id, err)
	}
	return get64(b.contents.at(n, contentSize), contPack), nil
}

// SetContent says what a regular file's content turned out to be, and where it
// is in the layer's pack. When the layer has the same digest already, the file
// refers to that place, dup is true, and the place that BeginContent reserved,
// if it did, is a hole. NoID means nothing here. The error is an [EntryError]
// when id is no regular file or has a complete content, or when the chunks do
// not make up its size.
func (b *Builder) SetContent(id ID, c Content) (packOff int64, dup bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.writable(); err != nil || id == NoID {
		return 0, false, err
	}
	defer b.bell.ring()
	packOff, dup, err = b.setContent(id, c)
	return packOff, dup, entryError(id, err)
}

// entryError makes a refusal the error of an inode's content.
func entryError(id ID, err error) error {
	if r, ok := err.(refusal); ok {
		return contentError(id, string(r))
	}
	return err
}

func contentError(id ID, reason string) error {
	return &EntryError{Name: fmt.Sprintf("inode %d", id.Index()), Reason: reason}
}

func (b *Builder) setContent(id ID, c Content) (packOff int64, dup bool, err error) {
	r, err := b.regular(id)
	if err != nil {
		return 0, false, err
	}
	size, n := get64(r, fileLen), get32(r, fileAux)
	if reason := checkContent(size, &c); reason != "" {
		return 0, false, refusal(reason)
	}
	if n != none && get32(b.contents.at(n, contentSize), contDigest) != none {
		return 0, false, refusal("has a content")
	}
	if size == 0 {
		return 0, false, nil
	}
	if k := b.findContent(c.Digest); k != 0 {
		have := b.contents.at(k-1, contentSize)
		if get64(have, contSize) != size {
			return 0, false, refusal("two sizes for one digest")
		}
		if n != none {
			clear(b.contents.at(n, contentSize))
			put32(b.contents.at(n, contentSize), contDigest, none)
		}
		put32(r, fileAux, k-1)
		return get64(have, contPack), true, nil
	}
	if err := b.roomFor(&c); err != nil {
		return 0, false, err
	}
	if n == none {
		if n, err = b.newContent(id, r); err != nil {
			return 0, false, err
		}
	}
	if err := b.fillContent(n, size, &c); err != nil {
		return 0, false, err
	}
	return get64(b.contents.at(n, contentSize), contPack), false, nil
}

// checkContent tells what is wrong with a content of the given size.
func checkContent(size int64, c *Content) (reason string) {
	if size == 0 {
		if len(c.Chunks) != 0 {
			return "chunks of an empty file"
		}
		return ""
	}
	if len(c.Chunks) == 0 || c.Chunks[0].Off != 0 {
		return "chunks do not begin at 0"
	}
	if len(c.Chunks) > MaxChunks {
		return "too many chunks"
	}
	for i, k := range c.Chunks {
		end := size
		if i+1 < len(c.Chunks) {
			end = c.Chunks[i+1].Off
		}
		switch {
		case end <= k.Off || end > size:
			return "chunks do not follow each other"
		case end-k.Off > MaxChunkSize:
			return "chunk too large"
		case k.BlobOff < 0 || k.BlobLen < 0 || k.Inner < 0 ||
			k.BlobOff > MaxSize || k.BlobLen > MaxSize-k.BlobOff || k.Inner > MaxSize:
			return "chunk out of range"
		}
	}
	return ""
}

// roomFor makes sure that the chunks of a content fit.
func (b *Builder) roomFor(c *Content) error {
	n := int64(len(c.Chunks))
	if int64(b.chunks.count(chunkSize))+n > MaxChunks {
		return refusal("too many chunks in the layer")
	}
	if err := b.chunks.reserve(n * chunkSize); err != nil {
		return err
	}
	return b.digests.reserve((n + 1) * digestSize)
}

// newContent gives a file a content that is not complete.
func (b *Builder) newContent(id ID, file []byte) (uint32, error) {
	n, size := b.contents.count(contentSize), get64(file, fileLen)
	if n > MaxEntries || size > MaxSize-b.packEnd {
		return 0, refusal("too many contents")
	}
	r, err := b.contents.grow(contentSize)
	if err != nil {
		return 0, err
	}
	put64(r, contSize, size)
	put64(r, contPack, b.packEnd)
	put32(r, contDigest, none)
	b.packEnd += size
	put32(file, fileAux, n)
	return n, nil
}

// fillContent completes content n. roomFor was called.
func (b *Builder) fillContent(n uint32, size int64, c *Content) error {
	grown, err := b.contentTab.fit(n)
	if err != nil {
		return err
	}
	if grown {
		for k := range b.contents.count(contentSize) {
			if r := b.contents.at(k, contentSize); get32(r, contDigest) != none {
				b.chainContent(k, r)
			}
		}
	}
	r := b.contents.at(n, contentSize)
	put32(r, contFirst, b.chunks.count(chunkSize))
	put32(r, contChunks, uint32(len(c.Chunks)))
	whole := b.addDigest(&c.Digest)
	put32(r, contDigest, whole)
	b.chainContent(n, r)
	for i := range c.Chunks {
		k, end := &c.Chunks[i], size
		if i+1 < len(c.Chunks) {
			end = c.Chunks[i+1].Off
		}
		d := whole
		if k.Digest != c.Digest {
			d = b.addDigest(&k.Digest)
		}
		m, err := b.chunks.grow(chunkSize)
		if err != nil {
			return err
		}
		put64(m, chunkOff, k.Off)
		put64(m, chunkBlob, k.BlobOff)
		put64(m, chunkInner, k.Inner)
		put64(m, chunkBlobLen, k.BlobLen)
		put32(m, chunkLen, uint32(end-k.Off))
		put32(m, chunkDigest, d)
	}
	return nil
}

// addDigest stores a digest, for which there is room, and returns its number.
func (b *Builder) addDigest(d *Digest) uint32 {
	n := b.digests.count(digestSize)
	m, err := b.digests.grow(digestSize)
	if err != nil {
		panic(err) // roomFor has reserved it
	}
	copy(m, d[:])
	return n
}

// findContent returns 1 + the complete content with a digest, or 0.
func (b *Builder) findContent(d Digest) uint32 {
	for n := b.contentTab.first(b.hashDigest(d[:])); n != 0; {
		r := b.contents.at(n-1, contentSize)
		if Digest(b.digests.at(get32(r, contDigest), digestSize)) == d {
			return n
		}
		n = get32(r, contNext)
	}
	return 0
}

// chainContent puts content n first in its hash chain.
func (b *Builder) chainContent(n uint32, r []byte) {
	slot := b.contentTab.slot(b.hashDigest(b.digests.at(get32(r, contDigest), digestSize)))
	put32(r, contNext, *slot)
	*slot = n + 1
}

// hashDigest has a seed too: a table of contents may lie about digests.
func (b *Builder) hashDigest(d []byte) uint32 { return uint32(maphash.Bytes(b.seed, d)) }
