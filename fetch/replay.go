package fetch

import "time"

// replay is a second pass over a layer that cannot be read by ranges, for what
// is gone from the cache. It answers who waits as their chunks pass, and keeps
// everything else that is missing on the way, as far as it goes.
type replay struct {
	pos  uint32        // the chunk that comes next; what is before it needs another replay
	kick chan struct{} // a flight was added
}

// A replay goes on without anybody waiting for lingerBytes, since who reads one
// file reads the next one often; then it waits for lingerTime before it gives up.
const (
	lingerBytes = 64 << 20
	lingerTime  = 5 * time.Second
)

// startReplay has chunks come by the replay. The caller holds r.mu.
func (r *Reader) startReplay(chunks []jobChunk) {
	for i := range chunks {
		chunks[i].f.replay = true
	}
	if r.replay != nil {
		select {
		case r.replay.kick <- struct{}{}:
		default:
		}
		return
	}
	r.replay = &replay{kick: make(chan struct{}, 1)}
	r.begin(r.replays)
}

// replays replays the layer until nobody waits.
func (r *Reader) replays() {
	for {
		err := recovered(r.replayOnce)
		if err == nil {
			err = r.ctx.Err()
		}
		r.mu.Lock()
		left := make(map[uint32]*flight)
		for n, f := range r.flights {
			if f.replay {
				left[n] = f
			}
		}
		if len(left) == 0 || err != nil {
			r.replay = nil
		}
		again := r.replay != nil
		if again {
			r.replay.pos = 0
		} else {
			for n := range left {
				delete(r.flights, n)
			}
		}
		r.mu.Unlock()
		if again {
			continue
		}
		for n, f := range left {
			r.land(n, f, nil, r.fail(err))
		}
		return
	}
}

// replayOnce streams the layer from its beginning for as long as it is of use.
func (r *Reader) replayOnce() error {
	missing := r.lastMissing()
	rc, err := r.l.Blob.Stream(r.ctx, Demand, 0)
	if err != nil {
		return err
	}
	defer rc.Close()
	fr := newFrames(r.format, rc, 0)
	defer fr.close()
	idle := int64(0) // bytes since somebody waited
	for k := range r.stats.Contents {
		ci, err := r.idx.ContentByNumber(k)
		if err != nil {
			return err
		}
		for i := range ci.NChunks {
			n := ci.FirstChunk + i
			f, ahead, behind := r.reached(n)
			if ahead {
				idle = 0
			} else if behind || n > missing || r.full.Load() || !r.linger(&idle) {
				return nil
			}
			if f == nil && (r.pack.Has(n, 1) || r.elsewhere(&ci)) {
				continue
			}
			c, size, err := r.idx.Chunk(n)
			if err != nil {
				return err
			}
			idle += size
			if c.BlobLen == 0 {
				continue
			}
			j := jobChunk{n: n, c: c, size: size, packOff: ci.PackOff + c.Off, f: f}
			if err := r.take(r.ctx, fr, &j); err != nil {
				return err
			}
		}
		r.share(&ci)
	}
	return nil
}

// reached moves the replay on to chunk n, and tells whether anybody waits for
// that or a later one, or for one before.
func (r *Reader) reached(n uint32) (f *flight, ahead, behind bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.replay.pos = n + 1
	for m, g := range r.flights {
		switch {
		case !g.replay:
		case m == n:
			f, ahead = g, true
		case m > n:
			ahead = true
		default:
			behind = true
		}
	}
	return f, ahead, behind
}

// linger reports whether a replay that nobody waits for goes on. When it has gone
// on for long, it waits for somebody first.
func (r *Reader) linger(idle *int64) bool {
	if *idle < lingerBytes {
		return true
	}
	t := time.NewTimer(lingerTime)
	defer t.Stop()
	select {
	case <-r.replay.kick:
		*idle = 0
		return true
	case <-t.C:
	case <-r.ctx.Done():
	}
	return false
}

// lastMissing is the last chunk that the pack does not have.
func (r *Reader) lastMissing() uint32 {
	for n := r.stats.Chunks; n > 0; n-- {
		if !r.pack.Has(n-1, 1) {
			return n - 1
		}
	}
	return 0
}
