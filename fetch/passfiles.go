package fetch

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"

	"github.com/imgfs/imgfs/unionfs"
)

// plainChunk is the length of the chunks of a layer that has none of its own, in
// bytes: what one read after an eviction, and one verified read, costs.
const plainChunk = 1 << 20

// sparseMark in Chunk.Inner says that the file is sparse in the archive: the
// rest of Inner, or BlobOff in an uncompressed layer, is where its header begins,
// and the chunk is at Chunk.Off of what archive/tar makes of it.
const sparseMark = 1 << 61

// files reads the archive in r: entries to the Builder, contents to the pack.
func (p *Pass) files(ctx context.Context, r *blockReader) error {
	tr := tar.NewReader(r)
	logical := int64(0) // bytes of sparse files
	for {
		start := (r.pos + tarBlock - 1) / tarBlock * tarBlock
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return ctxOr(ctx, fmt.Errorf("tar: %w", err))
		}
		at := place{format: p.Format(), blob: p.l.Blob.Size(), start: r.pos}
		if h.Size > 0 && isSparse(h) {
			at.start, at.sparse = start, true
			if logical += h.Size; logical < 0 || logical > max(expandsFreely, min(p.l.Blob.Size(), maxExpanded/maxRatio)*maxRatio) {
				return fmt.Errorf("%w: %q: a sparse file of %d bytes in a blob of %d", ErrNotImage, h.Name, h.Size, p.l.Blob.Size())
			}
		}
		if err := p.entry(ctx, h, tr, at, r); err != nil {
			return err
		}
	}
	// What follows the archive counts for the diffID only.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return ctxOr(ctx, err)
	}
	return p.store.flush(ctx)
}

// entry takes one entry of the archive.
func (p *Pass) entry(ctx context.Context, h *tar.Header, tr io.Reader, at place, r *blockReader) error {
	e, ok, err := tarEntry(h)
	if err != nil || !ok {
		return err
	}
	added, content, err := isAdded(h, tr)
	if err != nil {
		return ctxOr(ctx, err)
	}
	if added {
		if _, err := io.Copy(io.Discard, content); err != nil {
			return ctxOr(ctx, err)
		}
		return nil
	}
	var id unionfs.ID
	p.locked(func() { id, err = p.b.Add(e) })
	if err != nil || e.Type != tar.TypeReg || id == unionfs.NoID {
		return err
	}
	f := &passFile{id: id, size: e.Size, r: content, at: at, raw: r}
	if e.Size > plainChunk {
		return p.large(ctx, f)
	}
	return p.small(ctx, f)
}

// passFile is a regular file that is passing.
type passFile struct {
	id   unionfs.ID
	size int64
	r    io.Reader
	at   place
	raw  *blockReader // the archive
}

// place says where in the blob a content's chunks are.
type place struct {
	format Format
	blob   int64 // length of the blob
	start  int64 // in the archive: of the content, or of the header of a sparse file
	sparse bool
	end    int64 // in the archive: of a sparse file
}

func (a place) chunk(off, n int64, digest unionfs.Digest) unionfs.Chunk {
	c := unionfs.Chunk{Off: off, Digest: digest}
	switch {
	case a.format != FormatTar: // the blob is one frame
		c.BlobLen, c.Inner = a.blob, a.start+off
		if a.sparse {
			c.Inner = a.start | sparseMark
		}
	case a.sparse:
		c.BlobOff, c.BlobLen, c.Inner = a.start, a.end-a.start, sparseMark
	default:
		c.BlobOff, c.BlobLen = a.start+off, n
	}
	return c
}

// small takes a file of one chunk at most.
func (p *Pass) small(ctx context.Context, f *passFile) error {
	data, err := p.store.room(ctx, p, f.size)
	if err != nil {
		return err
	}
	if _, err := io.ReadFull(f.r, data); err != nil {
		return ctxOr(ctx, fmt.Errorf("tar: %w", noEOF(err)))
	}
	f.at.end = f.raw.pos
	content := unionfs.Content{Digest: sha256.Sum256(data)}
	if f.size > 0 {
		content.Chunks = []unionfs.Chunk{f.at.chunk(0, f.size, content.Digest)}
	}
	elsewhere := f.size > 0 && p.elsewhere(content.Digest)

	p.mu.Lock()
	defer p.mu.Unlock()
	off, dup, err := p.b.SetContent(f.id, content)
	if err != nil {
		return err
	}
	if f.size > 0 && !dup && !elsewhere {
		p.store.put(off, f.size)
	}
	if !dup {
		err = p.settle(f, elsewhere)
	}
	p.wake()
	return err
}

// large takes a file of several chunks; its bytes can be read as they pass.
func (p *Pass) large(ctx context.Context, f *passFile) error {
	var off int64
	var err error
	p.locked(func() {
		if off, err = p.b.BeginContent(f.id); err == nil {
			p.cur = &bigFile{id: f.id, packOff: off, size: f.size}
		}
	})
	if err != nil {
		return err
	}
	whole := sha256.New()
	var content unionfs.Content
	f.at.end = f.at.start + 1 // of a sparse file, until it is known: no chunk of it is a hole by chance
	for pos := int64(0); pos < f.size; pos += plainChunk {
		n := min(plainChunk, f.size-pos)
		buf, err := p.chunk(ctx, f, off+pos, n)
		if err != nil {
			return err
		}
		whole.Write(buf)
		c := f.at.chunk(pos, n, sha256.Sum256(buf))
		if allZero(buf) {
			c.BlobOff, c.BlobLen, c.Inner = 0, 0, 0
			p.mu.Lock()
			p.store.unput(n)
			p.store.addHole(off+pos, n)
			p.mu.Unlock()
		}
		content.Chunks = append(content.Chunks, c)
	}
	if f.at.sparse && f.at.format == FormatTar {
		for i := range content.Chunks { // known only now
			if c := &content.Chunks[i]; c.BlobLen > 0 {
				c.BlobLen = f.raw.pos - f.at.start
			}
		}
	}
	content.Digest = unionfs.Digest(whole.Sum(nil))
	return p.finish(ctx, f, off, content)
}

// chunk reads n bytes into a batch; who waits sees them as they come.
func (p *Pass) chunk(ctx context.Context, f *passFile, packOff, n int64) ([]byte, error) {
	buf, err := p.store.room(ctx, p, n)
	if err != nil {
		return nil, err
	}
	for got := int64(0); got < n; {
		m, err := f.r.Read(buf[got:n])
		if m > 0 {
			p.mu.Lock()
			p.store.put(packOff+got, int64(m))
			p.cur.passed += int64(m)
			p.wake()
			p.mu.Unlock()
			got += int64(m)
		}
		if err != nil && got < n {
			return nil, ctxOr(ctx, fmt.Errorf("tar: %w", noEOF(err)))
		}
	}
	return buf, nil
}

// finish tells the Builder a content that has passed.
func (p *Pass) finish(ctx context.Context, f *passFile, off int64, content unionfs.Content) error {
	elsewhere := p.elsewhere(content.Digest)
	var dup bool
	var err error
	p.locked(func() {
		if _, dup, err = p.b.SetContent(f.id, content); err == nil && !dup {
			err = p.settle(f, elsewhere)
		}
		if err == nil && !dup {
			ci, _ := p.b.Content(f.id)
			for i := range content.Chunks {
				if content.Chunks[i].BlobLen == 0 {
					p.store.hole.add(ci.FirstChunk + uint32(i))
				}
			}
		}
		p.cur = nil
		p.wake()
	})
	if err == nil && (dup || elsewhere) {
		err = p.store.drop(ctx, off, f.size)
	}
	return err
}

// settle notes whether the pack will have the content. The caller holds p.mu.
func (p *Pass) settle(f *passFile, elsewhere bool) error {
	ci, err := p.b.Content(f.id)
	if err != nil || ci.NChunks == 0 {
		return err
	}
	p.store.note(f.id, ci, elsewhere)
	return nil
}

// elsewhere reports whether another pack has the content whole.
func (p *Pass) elsewhere(digest unionfs.Digest) bool {
	var one [1]byte
	if l, ok := p.c.Find(digest); !ok || l.Pack == p.pack.Hash() {
		return false
	}
	ok, err := p.c.ReadShared(digest, one[:], 0)
	return ok && err == nil
}

var zeros [plainChunk]byte

func allZero(b []byte) bool { return len(b) <= len(zeros) && bytes.Equal(b, zeros[:len(b)]) }
