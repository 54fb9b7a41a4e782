package images

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"sync/atomic"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// maxLayers is the most layers an image may have: their ordinals take 8 of a
// directory number's 26 bits, and leave a layer 2^18 directories. Engines that
// unpack images stop at 127.
const maxLayers = 256

// image is one image, opened at its first use.
type image struct {
	s *Store
	imageKey
	rec    imageRecord
	layers []*layer // lowest first, at least one

	state atomic.Pointer[imageState] // nil while the image is not open
}

// imageKey is what an image is: a manifest, and how many of its layers; all when
// depth is 0, else it is an intermediate image.
type imageKey struct {
	digest v1.Hash
	depth  int
}

// imageState is an open image: merged, or with layers that are still arriving.
type imageState struct {
	tree *unionfs.Tree

	// Of an image with layers that are still arriving:
	stack   unionfs.Stack
	layers  []*layerState
	settled chan struct{} // closed when the image has another state
	err     error         // set before settled is closed, when a layer failed
}

// newImage returns the image that rec describes, not opened.
func (s *Store) newImage(key imageKey, rec imageRecord) (*image, error) {
	if key.depth > 0 && key.depth < len(rec.Layers) {
		rec.Layers = rec.Layers[:key.depth]
	}
	im := &image{s: s, imageKey: key, rec: rec}
	for _, il := range rec.Layers {
		l, err := s.layer(il.Seq)
		if err != nil {
			return nil, err
		}
		im.layers = append(im.layers, l)
	}
	return im, nil
}

// image returns an image, not necessarily open. The error is fs.ErrNotExist when
// it is not here.
func (s *Store) image(key imageKey) (*image, error) {
	s.mu.Lock()
	im := s.images[key]
	s.mu.Unlock()
	if im != nil {
		return im, nil
	}
	rec, ok, err := s.cat.image(key.digest)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("images: opening image %s: %w", key.digest, iofs.ErrNotExist)
	}
	if im, err = s.newImage(key, rec); err != nil {
		return nil, err
	}
	return s.keep(im)
}

// keep remembers im, unless another call was first: then that one is returned.
func (s *Store) keep(im *image) (*image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.images == nil {
		return nil, iofs.ErrClosed
	}
	if s.images[im.imageKey] == nil {
		s.images[im.imageKey] = im
	}
	return s.images[im.imageKey], nil
}

// open returns the image's state, opening it when it is not open.
func (im *image) open(ctx context.Context) (*imageState, error) {
	if st := im.state.Load(); st != nil {
		return st, nil
	}
	return flight(ctx, im.s, fmt.Sprintf("image %s %d", im.digest, im.depth), func(ctx context.Context) (*imageState, error) {
		if st := im.state.Load(); st != nil {
			return st, nil
		}
		return im.load(ctx)
	})
}

// load opens all layers at once, and merges them when all are compiled.
func (im *image) load(ctx context.Context) (*imageState, error) {
	states := make([]*layerState, len(im.layers))
	g, gctx := errgroup.WithContext(ctx)
	for i, l := range im.layers {
		g.Go(func() (err error) {
			states[i], err = l.open(gctx)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	st := &imageState{layers: states, settled: make(chan struct{})}
	live := false
	for _, ls := range states {
		live = live || ls.idx == nil
		st.stack = append(st.stack, ls.source())
	}
	im.s.use(im, states)
	if !live {
		return im.merge(states)
	}
	im.state.Store(st)
	im.s.tasks.Go(func() { im.finish(st) })
	return st, nil
}

// finish waits for the layers that are still arriving, and merges.
func (im *image) finish(st *imageState) {
	defer close(st.settled)
	st.err = im.settle(st)
	if st.err == nil || im.s.ctx.Err() != nil {
		return
	}
	im.state.CompareAndSwap(st, nil)
	for _, n := range im.s.namesOf(func(v *image) bool { return v == im }) {
		im.s.tell(Event{Name: n, Err: st.err, Drop: true})
	}
}

func (im *image) settle(st *imageState) (err error) {
	defer recovered(&err)
	final := make([]*layerState, len(st.layers))
	for i, ls := range st.layers {
		final[i] = ls
		if ls.idx != nil {
			continue
		}
		<-ls.settled
		if ls.err != nil {
			return ls.err
		}
		if final[i] = im.layers[i].state.Load(); final[i] == nil || final[i].idx == nil {
			return fmt.Errorf("images: opening image %s: layer %d was closed", im.digest, i)
		}
	}
	_, err = im.merge(final)
	return err
}

// merge opens the image's tree, making it first when it is not on this disk.
func (im *image) merge(states []*layerState) (*imageState, error) {
	indexes := make([]*unionfs.Index, len(states))
	for i, st := range states {
		indexes[i] = st.idx
		if n := st.idx.Stats().Dirs; n > maxDirs(len(states)) {
			return nil, fmt.Errorf("images: layer %s has %d directories, %d at most fit into an image of %d layers: %w",
				im.rec.Layers[i].Desc.Digest, n, maxDirs(len(states)), len(states), iofs.ErrInvalid)
		}
	}
	tree, err := im.openTree(indexes)
	if err != nil {
		return nil, err
	}
	st := &imageState{tree: tree}
	im.state.Store(st)
	return st, nil
}

func (im *image) openTree(indexes []*unionfs.Index) (*unionfs.Tree, error) {
	key := im.treeKey()
	path := im.s.cache.Path(cache.Tree, key)
	tree, err := unionfs.OpenTree(path, indexes)
	if err == nil {
		return tree, nil
	}
	if !errors.Is(err, iofs.ErrNotExist) && !errors.Is(err, unionfs.ErrDamaged) {
		return nil, err
	}
	write := func(f *os.File) error { return unionfs.Merge(f, indexes) }
	err = im.s.cache.Install(cache.Tree, key, write)
	if err == nil {
		// Gone again: an image with the same layers was removed at this moment.
		if tree, err = unionfs.OpenTree(path, indexes); !errors.Is(err, iofs.ErrNotExist) {
			return tree, err
		}
	} else if !isFull(err) {
		return nil, fmt.Errorf("images: merging the layers of %s: %w", im.digest, err)
	}
	path, done, err := inMemory(write)
	if err != nil {
		return nil, err
	}
	defer done()
	return unionfs.OpenTree(path, indexes)
}

// treeKey names the tree of a stack of layers. It is made of what the layers are
// known by, not of diffIDs as a chain ID is: two blobs with one diffID have two
// indexes, with numbers of their own.
func (im *image) treeKey() v1.Hash {
	stack := make([]v1.Hash, len(im.layers))
	for i, l := range im.layers {
		stack[i] = l.key()
	}
	return treeKey(stack)
}

func treeKey(stack []v1.Hash) v1.Hash {
	chain := make([]byte, 0, 72*len(stack))
	for _, key := range stack {
		chain = append(append(chain, key.String()...), ' ')
	}
	return sha256Hash(chain)
}

// damaged is told of an image whose index or tree turned out to be damaged. It
// removes the files that are, and closes the image, so that its next use makes
// them again. The mappings stay as long as the process: other readers may use
// them.
func (im *image) damaged(bad *imageState, err error) {
	if !im.state.CompareAndSwap(bad, nil) {
		return // somebody else was first
	}
	im.s.log.Error("image is made again", "image", im.digest.String(), "err", err)
	for _, l := range im.layers {
		if st := l.state.Load(); st != nil && st.idx != nil && st.idx.Verify() != nil {
			l.damaged(st, unionfs.ErrDamaged)
		}
	}
	if err := im.s.cache.Remove(cache.Tree, im.treeKey()); err != nil {
		im.s.log.Error("removing a damaged tree", "err", err)
	}
}

func (im *image) close() {
	if st := im.state.Load(); st != nil && st.tree != nil {
		st.tree.Close()
	}
}

// wait blocks until a or b is closed; b may be nil. It gives up with
// context.DeadlineExceeded when progress has returned the same number for as
// long as the store's timeout.
func (s *Store) wait(ctx context.Context, a, b <-chan struct{}, progress func() int64) error {
	last := progress()
	t := time.NewTicker(s.o.Timeout)
	defer t.Stop()
	for {
		select {
		case <-a:
			return nil
		case <-b:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
			now := progress()
			if now == last {
				return fmt.Errorf("images: nothing arrived for %v: %w", s.o.Timeout, context.DeadlineExceeded)
			}
			last = now
		}
	}
}

// progress adds up what the passes of st have brought.
func (st *imageState) progress() (sum int64) {
	for _, ls := range st.layers {
		sum += ls.progress()
	}
	return sum
}

func (st *layerState) progress() int64 {
	if st.pass == nil {
		return 0
	}
	done, _ := st.pass.Progress()
	return done
}
