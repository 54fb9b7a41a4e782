package fetch

import (
	"slices"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/unionfs"
)

// Read is a stretch of a layer's blob that was read.
type Read struct {
	Layer    v1.Hash // digest of the blob
	Off, Len int64   // bytes
}

// What one Trace holds at most.
const (
	MaxTraceReads = 8192
	MaxTraceBytes = 64 << 20 // of blobs
)

// Trace notes which stretches of layers are read, each once, in the order of
// their first use. A stretch is what a chunk takes in the blob. It is safe for
// concurrent use.
type Trace struct {
	first func()

	mu    sync.Mutex // guards what follows
	seen  map[Read]bool
	reads []Read
	bytes int64
}

// NewTrace returns an empty Trace. first, if not nil, is called once, when
// something is read; it must not block.
func NewTrace(first func()) *Trace { return &Trace{first: first, seen: map[Read]bool{}} }

// Reads returns what was read so far, in order.
func (t *Trace) Reads() []Read {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.reads)
}

func (t *Trace) add(rd Read) {
	t.mu.Lock()
	if t.seen[rd] || len(t.reads) >= MaxTraceReads || t.bytes+rd.Len > MaxTraceBytes {
		t.mu.Unlock()
		return
	}
	t.seen[rd] = true
	t.reads = append(t.reads, rd)
	t.bytes += rd.Len
	begun := len(t.reads) == 1
	t.mu.Unlock()
	if begun && t.first != nil {
		t.first()
	}
}

// Trace has t note what is read from now on, wherever it comes from, until stop
// is called. Of a layer that is not read by ranges nothing is noted.
func (r *Reader) Trace(t *Trace) (stop func()) {
	if !r.format.ranged() {
		return func() {}
	}
	r.retrace(func(all []*Trace) []*Trace { return append(all, t) })
	return func() {
		r.retrace(func(all []*Trace) []*Trace {
			return slices.DeleteFunc(all, func(o *Trace) bool { return o == t })
		})
	}
}

// retrace changes the list of traces, which readers look at without a lock.
func (r *Reader) retrace(change func([]*Trace) []*Trace) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []*Trace
	if old := r.traces.Load(); old != nil {
		all = slices.Clone(*old)
	}
	if all = change(all); len(all) == 0 {
		r.traces.Store(nil)
		return
	}
	r.traces.Store(&all)
}

// Beginning is where the first chunk of a file is; ok is false when it has none in
// the blob.
func (r *Reader) Beginning(id unionfs.ID) (rd Read, ok bool) {
	ci, err := r.idx.Content(id)
	if err != nil || ci.NChunks == 0 {
		return rd, false
	}
	c, _, err := r.idx.Chunk(ci.FirstChunk)
	if err != nil || c.BlobLen == 0 {
		return rd, false
	}
	return Read{r.l.Desc.Digest, c.BlobOff, c.BlobLen}, true
}

// note tells traces that the chunks first to last are read.
func (r *Reader) note(traces []*Trace, first, last uint32) {
	for n := first; n <= last; n++ {
		c, _, err := r.idx.Chunk(n)
		if err != nil || c.BlobLen == 0 {
			continue
		}
		for _, t := range traces {
			t.add(Read{r.l.Desc.Digest, c.BlobOff, c.BlobLen})
		}
	}
}
