package images

import (
	"context"
	"encoding/json"
	"fmt"
	iofs "io/fs"
	"slices"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/fetch"
)

// An access profile is what was read of an image in the first seconds of its use:
// stretches of its layers' blobs, in order. It is kept beside the image, and
// outlives it, so that the next cold start has ready what the last one needed.
//
//	{"version": 1, "image": "sha256:…", "layers": [{"digest": "sha256:…", "tail": n}, …], "reads": [[layer, off, len, age], …]}
//
// tail is how many bytes of the blob's end have its table of contents; layer counts
// in layers; age is in how many starts since the stretch was not read.

// profileVersion is the version that is written, and the only one that is read.
const profileVersion = 1

// profileTime is how long a profile is written after the first read.
const profileTime = 10 * time.Second

// What a profile may have at most; more is not read, and not written.
const (
	maxProfile    = 1 << 20 // bytes of the file
	maxProfileAge = 3       // starts in a row that did not read a stretch
	maxProfiles   = 4096    // that are kept
)

// profile is the form of a profile in its file.
type profile struct {
	Version int        `json:"version"`
	Image   v1.Hash    `json:"image"` // digest of its manifest
	Layers  []profiled `json:"layers"`
	Reads   [][4]int64 `json:"reads"`
}

// profiled is a layer of a profile.
type profiled struct {
	Digest v1.Hash `json:"digest"`         // of the blob
	Tail   int64   `json:"tail,omitempty"` // 0: not known
}

// reads are what was read, in order.
func (p *profile) reads() []fetch.Read {
	list := make([]fetch.Read, len(p.Reads))
	for i, r := range p.Reads {
		list[i] = fetch.Read{Layer: p.Layers[r[0]].Digest, Off: r[1], Len: r[2]}
	}
	return list
}

// tail is what the profile, which may be nil, says of a layer.
func (p *profile) tail(layer v1.Hash) int64 {
	if p != nil {
		for _, l := range p.Layers {
			if l.Digest == layer {
				return l.Tail
			}
		}
	}
	return 0
}

// parseProfile reads a profile, which may come from anywhere. The error is
// fs.ErrInvalid.
func parseProfile(data []byte, image v1.Hash) (*profile, error) {
	bad := func(format string, args ...any) (*profile, error) {
		return nil, fmt.Errorf("images: profile of image %s: %s: %w", image, fmt.Sprintf(format, args...), iofs.ErrInvalid)
	}
	if len(data) > maxProfile {
		return bad("larger than %d bytes", maxProfile)
	}
	var p profile
	if err := json.Unmarshal(data, &p); err != nil {
		return bad("%v", err)
	}
	switch {
	case p.Version != profileVersion:
		return bad("version %d, this imgfs knows %d", p.Version, profileVersion)
	case p.Image != image:
		return bad("it is of image %s", p.Image)
	case len(p.Layers) > maxLayers || len(p.Reads) > fetch.MaxTraceReads:
		return bad("%d layers and %d reads", len(p.Layers), len(p.Reads))
	}
	for _, l := range p.Layers {
		if l.Digest.Algorithm != "sha256" || l.Tail < 0 {
			return bad("a layer %s with %d bytes", l.Digest, l.Tail)
		}
	}
	bytes := int64(0)
	for _, r := range p.Reads {
		layer, off, n, age := r[0], r[1], r[2], r[3]
		if layer < 0 || layer >= int64(len(p.Layers)) || off < 0 || n <= 0 || n > fetch.MaxTraceBytes || age < 0 || age > maxProfileAge {
			return bad("a read of %v", r)
		}
		if bytes += n; bytes > fetch.MaxTraceBytes {
			return bad("more than %d bytes", fetch.MaxTraceBytes)
		}
	}
	return &p, nil
}

// newProfile joins what was read of an image now with what old, which may be nil,
// has from before: that comes last, and is left out when it has not been read for
// long.
func newProfile(im *image, reads []fetch.Read, old *profile) *profile {
	p := &profile{Version: profileVersion, Image: im.digest}
	number := map[v1.Hash]int64{}
	for _, l := range im.layers { // those of which nothing was read have tables, too
		h := l.rec.Desc.Digest
		tail := l.tail.Load()
		if tail == 0 {
			tail = old.tail(h)
		}
		if _, ok := number[h]; !ok {
			number[h] = int64(len(p.Layers))
			p.Layers = append(p.Layers, profiled{h, tail})
		}
	}
	have := map[fetch.Read]bool{}
	bytes := int64(0)
	add := func(r fetch.Read, age int64) {
		n, ok := number[r.Layer]
		if !ok || have[r] || len(p.Reads) >= fetch.MaxTraceReads || bytes+r.Len > fetch.MaxTraceBytes {
			return
		}
		have[r] = true
		bytes += r.Len
		p.Reads = append(p.Reads, [4]int64{n, r.Off, r.Len, age})
	}
	for _, r := range reads {
		add(r, 0)
	}
	if old != nil {
		for i, r := range old.reads() {
			if age := old.Reads[i][3] + 1; age <= maxProfileAge {
				add(r, age)
			}
		}
	}
	return p
}

// profiles are the traces that are being written, and what is fetched for images
// that are not open yet.
type profiles struct {
	mu   sync.Mutex // before that of a Reader
	open map[*image]*tracing
	held map[v1.Hash][]*fetch.Hold // by the digest of the manifest
}

// tracing is the trace of one image.
type tracing struct {
	trace *fetch.Trace
	stop  []func()
	over  chan struct{} // closed when it has ended
}

// tracing returns an image and the trace that is being written of it, if one is.
func (s *Store) tracing(digest v1.Hash) (*image, *tracing, error) {
	im, err := s.image(imageKey{digest: digest})
	if err != nil {
		return nil, nil, err
	}
	s.profiles.mu.Lock()
	defer s.profiles.mu.Unlock()
	return im, s.profiles.open[im], nil
}

// Profile returns the profile of the image with this manifest, as it would be kept
// now. The error is fs.ErrNotExist when the image is not here, or nothing was read.
func (s *Store) Profile(digest v1.Hash) ([]byte, error) {
	im, t, err := s.tracing(digest)
	if err != nil {
		return nil, err
	}
	p := s.readProfile(digest)
	if t != nil {
		if reads, begun := t.trace.Reads(); len(reads) > 0 && (begun || p == nil) {
			p = newProfile(im, reads, p)
		}
	}
	if p == nil {
		return nil, errNothingRead(digest)
	}
	return json.Marshal(p)
}

func errNothingRead(image v1.Hash) error {
	return fmt.Errorf("images: profile of image %s: nothing was read of a layer that is fetched by ranges: %w", image, iofs.ErrNotExist)
}

// Record begins the profile of the image with this manifest anew; it is written
// until Recorded is called. What the kernel has cached of the image's files is
// dropped, so that everything that is read is asked for.
func (s *Store) Record(ctx context.Context, digest v1.Hash) error {
	im, err := s.image(imageKey{digest: digest})
	if err != nil {
		return err
	}
	if _, err := im.open(ctx); err != nil {
		return err
	}
	s.beginTrace(im, nil, recordTime)
	told := make(chan struct{}, len(im.layers))
	left := 0
	for i, l := range im.layers {
		if slices.Contains(im.layers[:i], l) {
			continue
		}
		if st := l.state.Load(); st != nil && st.idx != nil && st.idx.Stats().Files > 0 {
			left++
			s.tell(Event{Files: Range{fileIno(l.rec.Seq, 0), fileIno(l.rec.Seq, st.idx.Stats().Files-1)}, Told: told})
		}
	}
	wait, cancel := context.WithTimeout(ctx, maxDropTime)
	defer cancel()
	for range left {
		select {
		case <-told:
		case <-wait.Done():
			_ = s.GiveUpRecord(digest) // the image was here a moment ago
			return fmt.Errorf("images: recording image %s: the kernel has not dropped what it knows of it: %w", digest, wait.Err())
		}
	}
	return nil
}

// recordTime is how long a profile is written that Record has begun, if nobody ends
// it; maxDropTime how long Record waits for the kernel.
const (
	recordTime  = 10 * time.Minute
	maxDropTime = 30 * time.Second
)

// GiveUpRecord ends the profile that Record began; the one before it stays. The error
// is fs.ErrNotExist when the image is not here.
func (s *Store) GiveUpRecord(digest v1.Hash) error {
	im, t, err := s.tracing(digest)
	if err != nil {
		return err
	}
	if t != nil {
		s.endTrace(im, t, false)
	}
	return nil
}

// Recorded ends the profile that Record began, keeps it in place of an older one,
// and returns it. The error is fs.ErrNotExist when nothing was read, or the image
// is not here.
func (s *Store) Recorded(digest v1.Hash) ([]byte, error) {
	im, t, err := s.tracing(digest)
	if err != nil {
		return nil, err
	}
	if t == nil { // its time was over
		return s.Profile(digest)
	}
	s.endTrace(im, t, false)
	reads, _ := t.trace.Reads()
	if len(reads) == 0 {
		return nil, errNothingRead(digest)
	}
	var tails *profile
	if old := s.readProfile(digest); old != nil {
		tails = &profile{Layers: old.Layers}
	}
	data, err := json.Marshal(newProfile(im, reads, tails))
	if err == nil {
		err = s.keepProfile(digest, data)
	}
	return data, err
}

// use is told that an image was opened: what its profile has is fetched, and a
// new profile is begun.
func (s *Store) use(im *image, states []*layerState) {
	if !s.o.Prefetch || im.depth > 0 {
		return
	}
	readers := map[v1.Hash]*fetch.Reader{}
	for i, st := range states {
		if st.idx != nil && fetch.Format(st.idx.Meta().Format).Lazy() {
			readers[im.layers[i].rec.Desc.Digest] = st.reader
		}
	}
	if len(readers) == 0 {
		return
	}
	var list []fetch.Read
	if p := s.readProfile(im.digest); p != nil {
		list = p.reads()
	} else {
		left := int64(fetch.MaxTraceBytes)
		for _, l := range im.layers {
			if n := min(l.prioritized.Load(), left); n > 0 {
				list = append(list, fetch.Read{Layer: l.rec.Desc.Digest, Len: n})
				left -= n
			}
		}
	}
	if len(list) > 0 {
		held := s.takeHeld(im.digest)
		for _, h := range held {
			h.ReleaseUnstarted() // else it would come twice
		}
		s.tasks.Go(func() {
			defer release(held)
			s.guard("fetching ahead", func() { fetch.Prefetch(s.ctx, list, readers) })
		})
	}
	s.beginTrace(im, states, profileTime)
}

// expect is told that an image is being pulled, before its config has come: the
// tables of contents of layers that are not here are asked for, and what its profile
// has, as far as memory goes.
func (s *Store) expect(repo name.Repository, digest v1.Hash, m *v1.Manifest) {
	if !s.o.Prefetch {
		return
	}
	p := s.readProfile(digest)
	missing, sizes := map[v1.Hash]v1.Descriptor{}, map[v1.Hash]int64{}
	var tables, data []*fetch.Hold
	hold := func(list *[]*fetch.Hold, desc v1.Descriptor, off, n int64, prio fetch.Priority) {
		if len(tables)+len(data) >= maxHolds {
			return
		}
		if h := s.client.Hold(repo, desc, off, n, prio); h != nil {
			*list = append(*list, h)
		}
	}
	for _, desc := range m.Layers {
		if s.cache.Has(cache.Index, layerKey(desc)) {
			continue
		}
		if off, n, ok := fetch.TailGuess(desc, p.tail(desc.Digest)); ok {
			missing[desc.Digest], sizes[desc.Digest] = desc, desc.Size
			hold(&tables, desc, off, n, fetch.Demand)
		}
	}
	if p != nil {
		for _, st := range fetch.Stretches(p.reads(), sizes) {
			hold(&data, missing[st.Layer], st.Off, st.Len, fetch.Soon)
		}
	}
	s.profiles.mu.Lock()
	s.profiles.held[digest] = slices.Concat(s.profiles.held[digest], tables, data)
	s.profiles.mu.Unlock()
	s.tasks.Go(func() {
		var g errgroup.Group
		for _, h := range tables {
			g.Go(func() error { h.Fetch(s.ctx); return nil })
		}
		g.Wait() // the tables are waited for
		g.SetLimit(maxHoldsAhead)
		for _, h := range data {
			g.Go(func() error { h.Fetch(s.ctx); return nil })
		}
		g.Wait()
	})
}

// What is held for one image that is not open yet.
const (
	maxHolds      = 64 // ranges
	maxHoldsAhead = 4  // of a profile, that are fetched at once
)

// guard runs f; a panic of it fails f and nothing else.
func (s *Store) guard(what string, f func()) {
	err := func() (err error) {
		defer recovered(&err)
		f()
		return nil
	}()
	if err != nil {
		s.log.Error(what, "err", err)
	}
}

// takeHeld gives what is held for an image to the caller, who releases it.
func (s *Store) takeHeld(digest v1.Hash) []*fetch.Hold {
	s.profiles.mu.Lock()
	defer s.profiles.mu.Unlock()
	held := s.profiles.held[digest]
	delete(s.profiles.held, digest)
	return held
}

func release(held []*fetch.Hold) {
	for _, h := range held {
		h.Release()
	}
}

// dropHeld releases what is held for an image, if its opening has not taken it.
func (s *Store) dropHeld(digest v1.Hash) { release(s.takeHeld(digest)) }

// beginTrace has what is read of an image noted, until a time after the first read:
// of its layers' states, or, when states is nil, of its layers as they are now. A
// trace that was going on is given up.
func (s *Store) beginTrace(im *image, states []*layerState, last time.Duration) {
	t := &tracing{over: make(chan struct{})}
	t.trace = fetch.NewTrace(states == nil, func(own bool) { // within a read, for which Close waits
		s.tasks.Go(func() {
			timer := time.NewTimer(last)
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-t.over:
			case <-s.ctx.Done():
			}
			s.guard("keeping a profile", func() {
				if own {
					s.endTrace(im, t, true)
				} else {
					s.keepShared(im, t)
				}
			})
		})
	})
	// first may run before all layers note their reads, but not before t is known.
	s.profiles.mu.Lock()
	defer s.profiles.mu.Unlock()
	if old := s.profiles.open[im]; old != nil {
		old.end()
	}
	s.profiles.open[im] = t
	for i, l := range im.layers {
		st := l.state.Load()
		if states != nil {
			st = states[i]
		}
		if st != nil && st.reader != nil {
			t.stop = append(t.stop, st.reader.Trace(t.trace))
		}
	}
}

// end stops noting. The caller holds profiles.mu, or has taken t out of it.
func (t *tracing) end() {
	for _, stop := range t.stop {
		stop()
	}
	close(t.over)
}

// endTrace ends the trace of an image, unless it has ended, and keeps it if asked.
func (s *Store) endTrace(im *image, t *tracing, keep bool) {
	s.profiles.mu.Lock()
	current := s.profiles.open[im] == t
	if current {
		delete(s.profiles.open, im)
	}
	s.profiles.mu.Unlock()
	if !current {
		return
	}
	t.end()
	reads, begun := t.trace.Reads()
	if !keep || !begun {
		if keep {
			s.keepShared(im, t)
		}
		return
	}
	data, err := json.Marshal(newProfile(im, reads, s.readProfile(im.digest)))
	if err == nil {
		err = s.keepProfile(im.digest, data)
	}
	if err != nil {
		s.log.Warn("a profile is not kept", "image", im.digest.String(), "err", err)
	}
}

// keepShared keeps what was read of layers that other images have, too, if there is
// no profile: which of them was meant cannot be told. The trace goes on.
func (s *Store) keepShared(im *image, t *tracing) {
	reads, begun := t.trace.Reads()
	if begun || len(reads) == 0 || s.readProfile(im.digest) != nil {
		return
	}
	data, err := json.Marshal(newProfile(im, reads, nil))
	if err == nil {
		err = s.keepProfile(im.digest, data)
	}
	if err != nil {
		s.log.Warn("a profile is not kept", "image", im.digest.String(), "err", err)
	}
}

// endTraces keeps what was read so far, when the store closes.
func (s *Store) endTraces() {
	s.profiles.mu.Lock()
	all := map[*image]*tracing{}
	for im, t := range s.profiles.open {
		all[im] = t
	}
	s.profiles.mu.Unlock()
	for im, t := range all {
		s.endTrace(im, t, true)
	}
}
