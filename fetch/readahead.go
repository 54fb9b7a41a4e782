package fetch

import "github.com/imgfs/imgfs/unionfs"

// What a request brings beside what was asked for. At 20 ms a request costs as
// much as 250 KB at 100 Mbit/s, so a small file brings its neighbours, which are
// of the same directory most often, and who reads on in the order of the layer
// gets ever more at a time.
const (
	maxGap         = 256 << 10 // bytes between two chunks that are cheaper to read than to ask for
	maxWaste       = 128 << 10 // bytes of one request in such gaps: who reads beside others comes upon many
	maxRange       = 4 << 20   // bytes of one request, if it is not for one frame
	maxAhead       = 16 << 20  // bytes that are read ahead
	firstAhead     = 96 << 10  // bytes after a small file that was missed, as stored
	firstBehind    = 32 << 10  // bytes before it
	smallFile      = 128 << 10 // bytes of such a file
	maxAheadSize   = 64 << 20  // bytes of that, expanded: 16 MiB may be a frame that expands to gigabytes
	maxAheadChunks = 2048      // chunks in one plan
	maxAheadRanges = 4         // requests under way for what nobody has asked for yet
	maxRuns        = 32        // sequential readers that are told apart
)

// seqRun is a stretch of the blob that is being read in order.
type seqRun struct {
	from, end int64 // what was asked for last
	ahead     int64 // bytes of it that nobody had asked for
	used      uint64
}

// grow tells how much to read after the bytes [from, to) of the blob, which were
// missed. seq reports whether they continue what was read before. The caller
// holds r.mu.
func (r *Reader) grow(from, to int64) (run *seqRun, seq bool) {
	r.clock++
	oldest := &r.runs[0]
	for i := range r.runs {
		s := &r.runs[i]
		if s.used > 0 && from >= s.from && from <= s.end+maxGap {
			s.ahead = min(max(2*s.ahead, 2*(to-from)), maxAhead)
			s.from, s.used = from, r.clock
			return s, true
		}
		if s.used < oldest.used {
			oldest = s
		}
	}
	*oldest = seqRun{from: from, end: to, ahead: firstAhead, used: r.clock}
	return oldest, false
}

// plan makes the requests for need, chunks of one content in order, and for what
// comes along; guess is the job of a Prefetch that had the last of them, or nil. The
// caller holds r.mu.
func (r *Reader) plan(id unionfs.ID, ci *unionfs.ContentInfo, need []jobChunk, guess *job) []*job {
	first, last := &need[0], &need[len(need)-1]
	from, to := first.c.BlobOff, last.c.BlobOff+last.c.BlobLen
	run, seq := r.grow(from, to)
	before, ahead := int64(0), run.ahead
	if !seq {
		before = firstBehind
		if ci.Size > smallFile {
			before, ahead = 0, 0
		}
	}
	if r.full.Load() {
		before, ahead = 0, 0
	}
	w := &walk{r: r, lo: from - before, hi: to + ahead}
	chunks := need
	if k, err := r.idx.ContentNumber(id); err == nil {
		w.behind(k, first.n)
		w.after(k, last.n)
		chunks = append(append(w.before, need...), w.found...)
	}
	gap, waste := int64(maxGap), int64(maxWaste)
	tail := &chunks[len(chunks)-1].c
	if more := r.rest(guess, tail.BlobOff+tail.BlobLen); len(more) > 0 {
		chunks, gap, waste = append(chunks, more...), maxStretchGap, maxRange
	}
	jobs := split(chunks, gap, waste)
	for _, j := range jobs {
		j.guess = gap > maxGap
	}
	end := to
	for _, j := range jobs {
		end = max(end, j.off+j.n)
	}
	run.end = end
	return jobs
}

// walk collects missing chunks whose frames are within [lo, hi) of the blob.
type walk struct {
	r             *Reader
	lo, hi        int64
	before, found []jobChunk
	steps         int   // contents and chunks that were looked at
	size          int64 // bytes of the chunks, expanded
}

// maxSteps bounds the walk where it finds nothing to fetch.
const maxSteps = 2 * maxAheadChunks

// add considers chunk n of content ci; more is false when it is out of bounds.
func (w *walk) add(out *[]jobChunk, ci *unionfs.ContentInfo, n uint32) (more bool) {
	c, size, err := w.r.idx.Chunk(n)
	if w.steps++; err != nil || w.steps > maxSteps || len(w.found)+len(w.before) >= maxAheadChunks {
		return false
	}
	if c.BlobLen == 0 {
		return true
	}
	if c.BlobOff < w.lo || c.BlobOff+c.BlobLen > w.hi || c.Inner&sparseMark != 0 {
		return false
	}
	return w.take(out, ci, n, &c, size)
}

// take adds a chunk, unless it is here or on its way; more is false when there is
// enough.
func (w *walk) take(out *[]jobChunk, ci *unionfs.ContentInfo, n uint32, c *unionfs.Chunk, size int64) (more bool) {
	if size > maxChunk || w.r.pack.Has(n, 1) {
		return true
	}
	if w.size += size; w.size > maxAheadSize {
		return false
	}
	f, created := w.r.overtake(n)
	if !created {
		return true
	}
	j := jobChunk{n: n, c: *c, size: size, packOff: ci.PackOff + c.Off, f: f}
	if n == ci.FirstChunk+ci.NChunks-1 {
		whole := *ci
		j.last = &whole
	}
	*out = append(*out, j)
	return true
}

// shared reports whether there is no use in fetching the content: it is empty, or
// another pack is said to have it.
func (w *walk) shared(ci *unionfs.ContentInfo) bool {
	w.steps++
	return ci.NChunks == 0 || w.r.elsewhere(ci)
}

// elsewhere reports whether a pack other than the layer's own may have a content.
func (r *Reader) elsewhere(ci *unionfs.ContentInfo) bool {
	l, ok := r.c.Find(ci.Digest)
	return ok && l.Pack != r.pack.Hash()
}

// after collects what follows chunk n of content k.
func (w *walk) after(k, n uint32) {
	n++
	for ; k < w.r.stats.Contents && w.steps < maxSteps; k++ {
		ci, err := w.r.idx.ContentByNumber(k)
		if err != nil {
			return
		}
		if n >= ci.FirstChunk+ci.NChunks || n < ci.FirstChunk && w.shared(&ci) {
			continue
		}
		for n = max(n, ci.FirstChunk); n < ci.FirstChunk+ci.NChunks; n++ {
			if !w.add(&w.found, &ci, n) {
				return
			}
		}
	}
}

// behind collects what comes before chunk n of content k: of the same frame, and
// small neighbours. They are found last first, and turned round.
func (w *walk) behind(k, n uint32) {
	var out []jobChunk
	defer func() {
		for i := len(out) - 1; i >= 0; i-- {
			w.before = append(w.before, out[i])
		}
	}()
	for {
		ci, err := w.r.idx.ContentByNumber(k)
		if err != nil {
			return
		}
		for ; n > ci.FirstChunk && n <= ci.FirstChunk+ci.NChunks; n-- {
			if !w.add(&out, &ci, n-1) {
				return
			}
		}
		for { // the content before, unless another pack has it
			if k == 0 || w.steps > maxSteps {
				return
			}
			k--
			if ci, err = w.r.idx.ContentByNumber(k); err != nil {
				return
			}
			if !w.shared(&ci) {
				break
			}
		}
		n = ci.FirstChunk + ci.NChunks
	}
}

// split makes requests of chunks, which are in the order of their places; those that
// lie at most gap bytes apart come together, as long as what lies between those of a
// request is no more than waste in all. Requests with a chunk that a reader waits for
// are in demand. The caller holds r.mu.
func split(chunks []jobChunk, gap, waste int64) (jobs []*job) {
	var j *job
	between := int64(0) // the chunks of j
	for i := range chunks {
		c := &chunks[i]
		off, end := c.c.BlobOff, c.c.BlobOff+c.c.BlobLen
		same := j != nil && off == j.chunks[len(j.chunks)-1].c.BlobOff // the same frame
		skip := int64(0)
		if j != nil && !same {
			skip = off - (j.off + j.n)
		}
		near := j != nil && skip >= 0 && skip <= gap && between+skip <= waste && end-j.off <= maxRange
		if !same && !near {
			j, between, skip = &job{prio: Soon, off: off}, 0, 0
			jobs = append(jobs, j)
		}
		between += skip
		if c.f.wanted {
			j.prio = Demand
		}
		j.n = max(j.n, end-j.off)
		j.chunks = append(j.chunks, *c)
		c.f.j = j
	}
	return jobs
}
