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

	mu     sync.Mutex // guards what follows
	begun  bool       // something was read that no other Trace notes
	told   bool       // first was called
	layers []v1.Hash
	seen   map[span]struct{}
	reads  []span
	times  []time.Time // of reads, until begun
	fading bool        // fade will be called
	bytes  int64
}

// span is a Read as a Trace holds it: it may hold thousands, for every image.
type span struct {
	off, len int64
	layer    int32 // of layers
}

// traceLead is how long before the first read of its own a Trace keeps what others
// note, too: a start reads of the layers that images share before it reads of those
// that they do not. What is older was another's.
const traceLead = 10 * time.Second

// NewTrace returns an empty Trace. It begins with the first read that it alone
// notes, or, with all, with the first. first, if not nil, is called with true then,
// and with false at the first read, if it has not begun by that. It must not block.
func NewTrace(all bool, first func(own bool)) *Trace {
	return &Trace{all: all, first: first, seen: map[span]struct{}{}}
}

// Reads returns what was read so far, in order, and whether the Trace has begun: if
// not, all of it may have been for others.
func (t *Trace) Reads() (list []Read, begun bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.reads {
		list = append(list, Read{t.layers[s.layer], s.off, s.len})
	}
	return list, t.begun
}

// span is rd as t holds it. The caller holds mu.
func (t *Trace) span(rd Read) span {
	i := slices.Index(t.layers, rd.Layer)
	if i < 0 {
		i = len(t.layers)
		t.layers = append(t.layers, rd.Layer)
	}
	return span{rd.Off, rd.Len, int32(i)}
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
	s := t.span(rd)
	if _, seen := t.seen[s]; !seen {
		if !t.begun && len(t.reads) >= MaxTraceReads/2 {
			t.forget(traceLead)
		}
		if len(t.reads) < MaxTraceReads && t.bytes+rd.Len <= MaxTraceBytes {
			t.seen[s] = struct{}{}
			t.reads = append(t.reads, s)
			t.bytes += rd.Len
			if !t.begun {
				t.times = append(t.times, time.Now())
			}
			if !t.begun && !t.fading {
				t.fading = true
				time.AfterFunc(traceLead, t.fade)
			}
		}
	}
	t.mu.Unlock()
	if tell && t.first != nil {
		t.first(own)
	}
}

// forget drops what was read as long ago as age, or longer. The caller holds mu, and the Trace
// has not begun.
func (t *Trace) forget(age time.Duration) {
	old := 0
	for old < len(t.times) && time.Since(t.times[old]) >= age {
		delete(t.seen, t.reads[old])
		t.bytes -= t.reads[old].len
		old++
	}
	t.reads, t.times = slices.Delete(t.reads, 0, old), slices.Delete(t.times, 0, old)
	if len(t.reads) == 0 {
		t.reads, t.times, t.seen = nil, nil, map[span]struct{}{}
	}
}

// fade drops what has become too old while the Trace has not begun: it may never do.
func (t *Trace) fade() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fading = false; t.begun {
		return
	}
	if t.forget(traceLead); len(t.reads) > 0 {
		t.fading = true
		time.AfterFunc(traceLead, t.fade)
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
