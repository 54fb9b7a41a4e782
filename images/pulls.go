package images

import (
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/fetch"
)

const (
	keepPulls = time.Minute // how long a pull that has ended is told of
	maxPulls  = 256         // of those that have ended
)

// PullState is a pull that is under way or has just ended.
type PullState struct {
	Name    Name
	Started time.Time
	Ended   time.Time // zero while it is under way; what still streams then goes on
	Err     string
	Layers  []PullLayer // lowest first; none before the registry has answered
}

// PullLayer is a layer of a pull.
type PullLayer struct {
	Key     v1.Hash
	Digest  v1.Hash
	Size    int64  // compressed bytes
	Method  string // "lazy", "streaming", "here already"; "" while it is not known
	Format  string // as LayerInfo.Method
	Arrived int64  // compressed bytes that have come of a layer that is streamed; 0 for others
	Done    bool   // nothing of it has to come for the image to be usable whole
	Err     string
}

// pulls are the pulls of the last minute.
type pulls struct {
	mu   sync.Mutex
	list []*pulling // by start
}

// pulling is one pull. Its fields are guarded by pulls.mu.
type pulling struct {
	of             *pulls
	name           Name
	started, ended time.Time
	err            string
	layers         []*layer
	here           []bool // of layers: was here before
}

// begin notes that a pull of n begins.
func (p *pulls) begin(n Name) *pulling {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shrink(time.Now())
	pl := &pulling{of: p, name: n, started: time.Now()}
	p.list = append(p.list, pl)
	return pl
}

// shrink forgets the pulls that ended long ago, and the oldest when there are too
// many. The caller holds mu.
func (p *pulls) shrink(now time.Time) {
	ended := 0
	for _, pl := range p.list {
		if !pl.ended.IsZero() {
			ended++
		}
	}
	kept := p.list[:0]
	for _, pl := range p.list {
		if !pl.ended.IsZero() && (ended > maxPulls || now.Sub(pl.ended) > keepPulls && !pl.streaming()) {
			ended--
			continue
		}
		kept = append(kept, pl)
	}
	clear(p.list[len(kept):])
	p.list = kept
}

// streaming reports whether a layer of the pull is still arriving.
func (pl *pulling) streaming() bool {
	for _, l := range pl.layers {
		if st := l.state.Load(); st != nil && st.idx == nil {
			return true
		}
	}
	return false
}

// bring notes the layers of the pull, which are not opened for it yet.
func (pl *pulling) bring(layers []*layer) {
	here := make([]bool, len(layers))
	for i, l := range layers {
		if st := l.state.Load(); st != nil {
			here[i] = st.idx != nil
		} else {
			here[i] = l.s.cache.Has(cache.Index, l.key())
		}
	}
	pl.of.mu.Lock()
	defer pl.of.mu.Unlock()
	pl.layers, pl.here = layers, here
}

// end notes how the pull ended.
func (pl *pulling) end(err error) {
	pl.of.mu.Lock()
	defer pl.of.mu.Unlock()
	pl.ended = time.Now()
	if err != nil {
		pl.err = err.Error()
	}
}

// Pulls returns the pulls of the last minute, and those whose layers still
// stream, the latest last.
func (s *Store) Pulls() []PullState {
	s.pulls.mu.Lock()
	defer s.pulls.mu.Unlock()
	s.pulls.shrink(time.Now())
	list := make([]PullState, 0, len(s.pulls.list))
	for _, pl := range s.pulls.list {
		ps := PullState{Name: pl.name, Started: pl.started, Ended: pl.ended, Err: pl.err}
		for i, l := range pl.layers {
			ps.Layers = append(ps.Layers, l.pullState(pl.here[i], !pl.ended.IsZero()))
		}
		list = append(list, ps)
	}
	return list
}

// pullState describes the layer as part of a pull, which has ended or not.
func (l *layer) pullState(here, ended bool) PullLayer {
	p := PullLayer{Key: l.key(), Digest: l.rec.Desc.Digest, Size: l.rec.Desc.Size}
	if failed := l.failed.Load(); failed != nil {
		p.Err = *failed
	}
	st := l.state.Load()
	switch {
	case st == nil: // not opened yet, or dropped since
		p.Done = here || ended && p.Err == ""
	case st.idx == nil:
		p.Method, p.Format = "streaming", formatName(st.pass.Format())
		p.Arrived = st.progress()
	default:
		format := fetch.Format(st.idx.Meta().Format)
		p.Format, p.Done = formatName(format), true
		p.Method = "lazy"
		if !format.Lazy() {
			p.Method, p.Arrived = "streaming", p.Size
		}
	}
	if here {
		p.Method, p.Arrived = "here already", 0
	}
	return p
}
