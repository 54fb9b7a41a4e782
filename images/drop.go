package images

import (
	"context"
	"fmt"
	iofs "io/fs"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/cache"
)

// DropLayer gives the disk back what is cached of a layer that no image uses:
// its pack, its index. It returns the bytes. ErrConflict while an image uses the
// layer, fs.ErrNotExist when it is not here. Who still has files of it open
// reads on, from the registry; a layer that is still arriving for such a reader is
// dropped when it has.
func (s *Store) DropLayer(_ context.Context, layer v1.Hash) (int64, error) {
	rec, ok, err := s.cat.layerHere(layer)
	if err == nil && !ok {
		err = fmt.Errorf("images: dropping layer %s: %w", layer, iofs.ErrNotExist)
	}
	if err != nil {
		return 0, err
	}
	l, err := s.layer(rec.Seq)
	if err != nil {
		return 0, err
	}
	l.dropMu.Lock()
	defer l.dropMu.Unlock()
	if _, err := s.cat.dropLayer(layer); err != nil {
		return 0, err
	}
	l.dropped = true
	if st := l.state.Load(); st != nil && st.idx == nil {
		return 0, nil // finish does the rest
	}
	return l.discard()
}

// discard removes what this disk has of the layer. An open layer stays open: its
// index stays mapped, and its readers find nothing in the pack. The caller holds
// dropMu.
func (l *layer) discard() (freed int64, err error) {
	c, key := l.s.cache, l.key()
	if st, err := os.Stat(c.Path(cache.Index, key)); err == nil {
		freed = st.Size()
	}
	if err := c.Remove(cache.Index, key); err != nil {
		return 0, err
	}
	l.s.mu.Lock()
	delete(l.s.formats, key)
	l.s.mu.Unlock()
	if err := l.s.rescue(key); err != nil {
		l.s.log.Warn("what other layers have in a layer that is dropped is not all kept", "layer", key.String(), "err", err)
	}
	n, err := c.ClearPack(key)
	// What its readers bring back is of no use to others.
	c.SetIdle(key, true)
	return freed + n, err
}

// arrived is told that a layer has its index, and drops it if that was asked for
// meanwhile.
func (l *layer) arrived() error {
	l.dropMu.Lock()
	defer l.dropMu.Unlock()
	if !l.dropped {
		return nil
	}
	_, err := l.discard()
	return err
}

// reuse is told that an image uses the layer, as the catalogue says by now. If it
// was dropped before, and is still open, its index is put back on this disk.
func (l *layer) reuse() error {
	l.dropMu.Lock() // a removal that the catalogue allowed has ended
	defer l.dropMu.Unlock()
	if !l.dropped {
		return nil
	}
	l.dropped = false
	l.s.cache.SetIdle(l.key(), false)
	st := l.state.Load()
	if st == nil || st.idx == nil || l.s.cache.Has(cache.Index, l.key()) {
		return nil
	}
	err := l.s.cache.Install(cache.Index, l.key(), func(f *os.File) error {
		_, err := st.idx.WriteTo(f)
		return err
	})
	if err != nil && isFull(err) {
		return nil // it is in memory, and made again after a restart
	}
	return err
}

// dropTrees removes the trees of an image that is gone, and of its chains. Another
// image of the same layers that is open keeps its mapping; its tree is made again
// when it is opened the next time, in milliseconds.
func (s *Store) dropTrees(stack []v1.Hash) {
	for n := range stack {
		if err := s.cache.Remove(cache.Tree, treeKey(stack[:n+1])); err != nil {
			s.log.Warn("removing a tree", "err", err)
		}
	}
}

// idlePacks marks the packs of layers that are not here: readers of layers that
// were dropped have left them, or a crash.
func (s *Store) idlePacks() error {
	return s.cat.read(func(t *txn) error {
		for _, key := range s.cache.PackNames() {
			if t.get(bucketHere, hashKey(key)) == nil {
				s.cache.SetIdle(key, true)
			}
		}
		return nil
	})
}

// sweepDropped removes what this disk still has of layers that were dropped: a
// crash came between the catalogue and the files, or readers went on. It runs
// beside everything else.
func (s *Store) sweepDropped() {
	sweep := func(key v1.Hash) error {
		if err := s.ctx.Err(); err != nil {
			return err
		}
		rec, ok, err := s.cat.layerKeyed(key)
		if err != nil || !ok || rec.here() { // what no layer is known for is a finding of Check
			return err
		}
		l, err := s.layer(rec.Seq)
		if err != nil {
			return err
		}
		l.dropMu.Lock()
		defer l.dropMu.Unlock()
		if _, ok, err := s.cat.layerHere(key); err != nil || ok || l.dropped {
			return err
		}
		l.dropped = true
		if st := l.state.Load(); st != nil && st.idx == nil {
			return nil
		}
		_, err = l.discard()
		return err
	}
	err := s.cache.Each(cache.Index, sweep)
	for _, key := range s.cache.PackNames() {
		if err == nil {
			err = sweep(key)
		}
	}
	if err != nil && s.ctx.Err() == nil {
		s.log.Warn("what was dropped is not wholly removed", "err", err)
	}
}
