package fetch

import (
	"slices"
	"sync"
	"time"

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
	all   bool // every read begins it
	first func(own bool)

	mu    sync.Mutex // guards what follows
	begun bool       // something was read that no other Trace notes
	told  bool       // first was called
	seen  map[Read]bool
	reads []Read
	times []time.Time // of reads, until begun
	bytes int64
}

// traceLead is how long before the first read of its own a Trace keeps what others
// note, too: a start reads of the layers that images share before it reads of those
// that they do not. What is older was another's.
const traceLead = 10 * time.Second

// NewTrace returns an empty Trace. It begins with the first read that it alone
// notes, or, with all, with the first. first, if not nil, is called with true then,
// and with false at the first read, if it has not begun by that. It must not block.
func NewTrace(all bool, first func(own bool)) *Trace {
	return &Trace{all: all, first: first, seen: map[Read]bool{}}
}

// Reads returns what was read so far, in order, and whether the Trace has begun: if
// not, all of it may have been for others.
func (t *Trace) Reads() (list []Read, begun bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.reads), t.begun
}

// add notes a read; own says that no other Trace does.
func (t *Trace) add(rd Read, own bool) {
	t.mu.Lock()
	own = own || t.all
	tell := own && !t.begun || !t.told
	if own && !t.begun {
		t.forget(traceLead)
		t.begun, t.times = true, nil
	}
	t.told = true
	if !t.seen[rd] {
		if !t.begun && len(t.reads) >= MaxTraceReads/2 {
			t.forget(traceLead)
		}
		if len(t.reads) < MaxTraceReads && t.bytes+rd.Len <= MaxTraceBytes {
			t.seen[rd] = true
			t.reads = append(t.reads, rd)
			t.bytes += rd.Len
			if !t.begun {
				t.times = append(t.times, time.Now())
			}
		}
	}
	t.mu.Unlock()
	if tell && t.first != nil {
		t.first(own)
	}
}

// forget drops what was read longer ago than age. The caller holds mu, and the Trace
// has not begun.
func (t *Trace) forget(age time.Duration) {
	old := 0
	for old < len(t.times) && time.Since(t.times[old]) > age {
		delete(t.seen, t.reads[old])
		t.bytes -= t.reads[old].Len
		old++
	}
	t.reads, t.times = slices.Delete(t.reads, 0, old), slices.Delete(t.times, 0, old)
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

// Beginning is where the first chunk of a file is, and its size expanded; ok is
// false when it has none in the blob.
func (r *Reader) Beginning(id unionfs.ID) (rd Read, size int64, ok bool) {
	ci, err := r.idx.Content(id)
	if err != nil || ci.NChunks == 0 {
		return rd, 0, false
	}
	c, size, err := r.idx.Chunk(ci.FirstChunk)
	if err != nil || c.BlobLen == 0 {
		return rd, 0, false
	}
	return Read{r.l.Desc.Digest, c.BlobOff, c.BlobLen}, size, true
}

// note tells traces that the chunks first to last are read.
func (r *Reader) note(traces []*Trace, first, last uint32) {
	for n := first; n <= last; n++ {
		c, _, err := r.idx.Chunk(n)
		if err != nil || c.BlobLen == 0 {
			continue
		}
		for _, t := range traces {
			t.add(Read{r.l.Desc.Digest, c.BlobOff, c.BlobLen}, len(traces) == 1)
		}
	}
}
