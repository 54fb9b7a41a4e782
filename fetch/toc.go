package fetch

import (
	"archive/tar"
	"encoding/hex"
	"fmt"
	"path"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/containerd/stargz-snapshotter/estargz"

	"github.com/imgfs/imgfs/unionfs"
)

// tocEntry is an entry of a table of contents, eStargz's or zstd:chunked's: the
// second is the first with endOffset and chunkType.
type tocEntry struct {
	Name        string            `json:"name"`
	Type        string            `json:"type"`
	LinkName    string            `json:"linkName"`
	Mode        int64             `json:"mode"`
	Size        int64             `json:"size"`
	UID         int64             `json:"uid"`
	GID         int64             `json:"gid"`
	ModTime     string            `json:"modtime"`
	DevMajor    int64             `json:"devMajor"`
	DevMinor    int64             `json:"devMinor"`
	Xattrs      map[string][]byte `json:"xattrs"`
	Digest      string            `json:"digest"`
	Offset      int64             `json:"offset"`
	EndOffset   int64             `json:"endOffset"`
	InnerOffset int64             `json:"innerOffset"`
	ChunkOffset int64             `json:"chunkOffset"`
	ChunkSize   int64             `json:"chunkSize"`
	ChunkDigest string            `json:"chunkDigest"`
	ChunkType   string            `json:"chunkType"`
}

var tocTypes = map[string]byte{
	"dir":      tar.TypeDir,
	"reg":      tar.TypeReg,
	"symlink":  tar.TypeSymlink,
	"hardlink": tar.TypeLink,
	"char":     tar.TypeChar,
	"block":    tar.TypeBlock,
	"fifo":     tar.TypeFifo,
}

// tocSink gives entries of a table of contents to a Builder and checks where
// their chunks are said to be. Frames must follow each other in the order of the
// entries and not overlap. The end of an eStargz frame is the beginning of the
// next, so a content is told to the Builder when that is known.
type tocSink struct {
	b      *unionfs.Builder
	format Format
	end    int64 // bytes of the blob that frames may be in

	file  *tocFile   // the regular file that chunks are being read of
	queue []*tocFile // files of which not all is known, in order
	cur   int64      // where the last frame begins, or where the frame before the next one ended
	inner int64      // bytes of the last frame that chunks have taken
	open  []tocChunk // chunks of the last frame
	held  int        // chunks of file and queue

	landmark int64 // where eStargz' landmark is, before which are the prioritized files; 0 without one
}

type tocFile struct {
	id      unionfs.ID
	size    int64
	end     int64 // zstd:chunked: where the last frame ends
	content unionfs.Content
	next    int64 // content offset of the chunk that comes next
	open    int   // chunks without a frame length
}

type tocChunk struct {
	f *tocFile
	i int
}

func (s *tocSink) add(e *tocEntry) error {
	if strings.ContainsRune(e.Name, utf8.RuneError) || strings.ContainsRune(e.LinkName, utf8.RuneError) {
		return streamf("a name that is not UTF-8, which a table of contents cannot hold")
	}
	if e.Type == "chunk" {
		if s.file == nil {
			return streamf("table of contents: a chunk without a file")
		}
		return s.chunk(e)
	}
	if err := s.closeFile(); err != nil {
		return err
	}
	if isTOCName(e.Name) {
		// Its frame counts for the length of the one before.
		if path.Clean("/"+e.Name) == "/"+estargz.PrefetchLandmark && e.Offset <= s.end {
			s.landmark = max(e.Offset, 0)
		}
		if s.format == FormatEstargz && e.Offset != 0 {
			return s.advance(e.Offset)
		}
		return nil
	}
	ent, err := e.entry()
	if err != nil {
		return err
	}
	id, err := s.b.Add(ent)
	if err != nil || e.Type != "reg" {
		return err
	}
	var digest unionfs.Digest
	if e.Size != 0 || e.Digest != "" { // an empty file may go without
		if digest, err = parseDigest(e.Digest); err != nil {
			return streamf("table of contents: digest of %q: %v", e.Name, err)
		}
	}
	s.file = &tocFile{id: id, size: e.Size, end: e.EndOffset, content: unionfs.Content{Digest: digest}}
	if e.Size == 0 {
		return nil
	}
	return s.chunk(e)
}

// entry translates e without its content.
func (e *tocEntry) entry() (*unionfs.Entry, error) {
	typ, ok := tocTypes[e.Type]
	if !ok {
		return nil, streamf("table of contents: entry of type %q", e.Type)
	}
	ent := &unionfs.Entry{
		Name: e.Name, Type: typ, Mode: uint32(e.Mode & 0o7777), UID: e.UID, GID: e.GID,
		Size: e.Size, Linkname: e.LinkName, Major: e.DevMajor, Minor: e.DevMinor,
	}
	if typ != tar.TypeReg {
		ent.Size = 0
	}
	if e.ModTime != "" {
		t, err := time.Parse(time.RFC3339Nano, e.ModTime)
		if err != nil {
			return nil, streamf("table of contents: time of %q: %v", e.Name, err)
		}
		ent.Mtime, ent.MtimeNsec = t.Unix(), uint32(t.Nanosecond())
	}
	if len(e.Xattrs) > 0 {
		ent.Xattrs = make(map[string]string, len(e.Xattrs))
		for k, v := range e.Xattrs {
			ent.Xattrs[k] = string(v)
		}
	}
	return ent, nil
}

// chunk checks the chunk that e tells of s.file and appends it.
func (s *tocSink) chunk(e *tocEntry) error {
	f := s.file
	left := f.size - f.next
	size := e.ChunkSize
	if size == 0 {
		size = left
	}
	switch {
	case e.ChunkOffset != f.next:
		return streamf("table of contents: chunk at %d of %q where %d should be", e.ChunkOffset, e.Name, f.next)
	case size <= 0 || size > left:
		return streamf("table of contents: chunk of %d bytes where %d are left", size, left)
	case e.ChunkType == "zeros":
		return s.hole(e, size)
	case e.ChunkType != "" && e.ChunkType != "data":
		return streamf("table of contents: chunk of type %q", e.ChunkType)
	case size > maxChunk:
		return streamf("table of contents: a chunk of %d bytes", size)
	case e.Offset < 0 || e.Offset >= s.end:
		return streamf("table of contents: chunk at %d of a blob of %d bytes", e.Offset, s.end)
	case s.held >= maxFileChunks:
		return streamf("table of contents: too many chunks")
	}
	digest := f.content.Digest
	if e.ChunkDigest != "" || size != f.size {
		var err error
		if digest, err = parseDigest(e.ChunkDigest); err != nil {
			return streamf("table of contents: digest of a chunk: %v", err)
		}
	}
	if err := s.advance(e.Offset); err != nil {
		return err
	}
	if e.InnerOffset < s.inner || e.InnerOffset > maxInner {
		return streamf("table of contents: chunk %d bytes into a frame of which %d are taken", e.InnerOffset, s.inner)
	}
	s.inner = e.InnerOffset + size
	s.open = append(s.open, tocChunk{f, len(f.content.Chunks)})
	f.content.Chunks = append(f.content.Chunks, unionfs.Chunk{Off: f.next, BlobOff: e.Offset, Inner: e.InnerOffset, Digest: digest})
	f.open++
	f.next += size
	s.held++
	return nil
}

// hole appends size zeros, in chunks that have no place in the blob and no digest.
func (s *tocSink) hole(e *tocEntry, size int64) error {
	f := s.file
	for size > 0 {
		if s.held >= maxFileChunks {
			return streamf("table of contents: too many chunks")
		}
		n := min(size, maxChunk)
		f.content.Chunks = append(f.content.Chunks, unionfs.Chunk{Off: f.next})
		f.next += n
		size -= n
		s.held++
	}
	if e.Offset > s.cur && e.Offset < s.end {
		return s.advance(e.Offset) // the frame before ends here
	}
	return nil
}

// advance says that a frame begins at off, so that the one before ends there.
func (s *tocSink) advance(off int64) error {
	switch {
	case off < s.cur || off > s.end:
		return streamf("table of contents: a frame at %d after one at %d, before %d", off, s.cur, s.end)
	case off == s.cur:
		return nil
	}
	n := off - s.cur
	if len(s.open) > 0 && n > maxFrame {
		return streamf("table of contents: a frame of %d bytes", n)
	}
	for _, c := range s.open {
		c.f.content.Chunks[c.i].BlobLen = n
		c.f.open--
	}
	clear(s.open)
	s.open, s.cur, s.inner = s.open[:0], off, 0
	return s.flush()
}

// closeFile ends the chunks of s.file.
func (s *tocSink) closeFile() error {
	f := s.file
	if f == nil {
		return nil
	}
	if f.next != f.size {
		return streamf("table of contents: chunks of %d bytes for a file of %d", f.next, f.size)
	}
	s.file = nil
	s.queue = append(s.queue, f)
	if s.format == FormatZstdChunked && f.open > 0 {
		return s.advance(f.end)
	}
	return s.flush()
}

// flush gives the Builder the contents of which everything is known.
func (s *tocSink) flush() error {
	n := 0
	for _, f := range s.queue {
		if f.open > 0 {
			break
		}
		if f.id != unionfs.NoID { // a whiteout has no content
			if _, _, err := s.b.SetContent(f.id, f.content); err != nil {
				return err
			}
		}
		s.held -= len(f.content.Chunks)
		n++
	}
	clear(s.queue[:n])
	s.queue = s.queue[n:]
	return nil
}

// close ends the table: the last frame ends where frames may be.
func (s *tocSink) close() error {
	if err := s.closeFile(); err != nil {
		return err
	}
	if len(s.open) > 0 {
		if err := s.advance(s.end); err != nil {
			return err
		}
	}
	if len(s.queue) > 0 {
		return streamf("table of contents: a frame without an end")
	}
	return nil
}

// parseDigest reads "sha256:" and 64 hexadecimal digits.
func parseDigest(s string) (d unionfs.Digest, err error) {
	h, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(h) != 2*len(d) {
		return d, fmt.Errorf("%.80q is not a sha256", s)
	}
	_, err = hex.Decode(d[:], []byte(h))
	return d, err
}
