package images

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/fetch"
	"github.com/imgfs/imgfs/unionfs"
)

// layer is one layer, opened at its first use and shared by all images that have
// it.
type layer struct {
	s     *Store
	rec   layerRecord
	from  *sources
	wrong atomic.Bool // a pass has brought what the layer is not
	shown atomic.Bool // by a server that died before its pass had matched

	dropMu  sync.Mutex // held while files of it are removed or put back; before Store.mu
	dropped bool       // no image used it, and what this disk had of it was removed; dropMu

	why    atomic.Pointer[string] // why it is streamed, if it is
	failed atomic.Pointer[string] // why the last attempt to open it failed; nil when it did not

	counted     atomic.Bool  // its sizes were recorded
	prioritized atomic.Int64 // bytes of the blob to fetch first, as its table of contents says
	tail        atomic.Int64 // bytes of the blob's end that have that table; 0 when it is not known

	// state is nil while the layer is not open. What a state refers to stays
	// mapped until the store closes, so that no reader can lose it.
	state atomic.Pointer[layerState]
}

// layerState is an open layer: compiled, or still arriving.
type layerState struct {
	idx    *unionfs.Index
	reader *fetch.Reader
	pack   *cache.Pack

	// Of a layer that is still arriving:
	builder *unionfs.Builder
	pass    *fetch.Pass
	settled chan struct{} // closed when the layer has another state
	err     error         // set before settled is closed, when the pass failed

	strict   bool   // nothing is read before the pass has matched
	replaced int    // names whose first meaning did not last
	files    uint32 // that the pass brought
}

// source is what the layer answers lookups from.
func (st *layerState) source() unionfs.Layer {
	if st.idx != nil {
		return st.idx
	}
	return st.builder
}

// layer returns the layer with this sequence. The error is fs.ErrNotExist when
// there is none.
func (s *Store) layer(seq uint32) (*layer, error) {
	s.mu.Lock()
	l := s.layers[seq]
	s.mu.Unlock()
	if l != nil {
		return l, nil
	}
	rec, ok, err := s.cat.layer(seq)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("images: opening layer %d: %w", seq, iofs.ErrNotExist)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.layers == nil {
		return nil, iofs.ErrClosed
	}
	if s.layers[seq] == nil {
		s.layers[seq] = &layer{s: s, rec: rec, from: newSources(s.client, rec)}
	}
	return s.layers[seq], nil
}

// open returns the layer's state, opening it when it is not open. Concurrent
// calls share one attempt, which a caller that gives up does not end.
func (l *layer) open(ctx context.Context) (*layerState, error) {
	if st := l.state.Load(); st != nil {
		return st, nil
	}
	return flight(ctx, l.s, "layer "+l.key().String(), func(ctx context.Context) (*layerState, error) {
		if st := l.state.Load(); st != nil {
			return st, nil
		}
		st, err := l.load(ctx)
		if err != nil {
			l.fail(err)
		}
		return st, err
	})
}

// fail remembers why the layer cannot be opened.
func (l *layer) fail(err error) {
	text := err.Error()
	l.failed.Store(&text)
}

// load opens the layer: from its index on this disk, else from the index that it
// has in its registry, else by starting a streaming pass.
func (l *layer) load(ctx context.Context) (*layerState, error) {
	h := l.key()
	idx, err := unionfs.Open(l.s.cache.Path(cache.Index, h))
	if err == nil && idx.Meta().Blob == rawDigest(l.rec.Desc.Digest) {
		return l.adopt(idx)
	}
	if err == nil {
		idx.Close()
		err = fmt.Errorf("images: it is of another blob: %w", unionfs.ErrDamaged)
	}
	switch {
	case errors.Is(err, iofs.ErrNotExist):
	case !errors.Is(err, unionfs.ErrDamaged):
		return nil, err // no descriptors, no memory: the file is as good as it was
	default:
		l.s.log.Warn("layer index damaged, it is made again", "layer", h.String(), "err", err)
		if err := l.s.cache.Remove(cache.Index, h); err != nil {
			return nil, err
		}
	}
	b, err := unionfs.NewBuilder(l.s.scratchDir())
	if err != nil {
		return nil, err
	}
	if l.rec.Desc.Digest == emptyBlob {
		return l.compile(b, fetch.FormatTar) // an empty layer has nothing to fetch
	}
	l.why.Store(nil)
	toc, err := fetch.Index(ctx, l.remote(), b)
	if err == nil && toc.Format != 0 {
		l.prioritized.Store(toc.Prioritized)
		l.tail.Store(toc.Tail)
		return l.compile(b, toc.Format)
	}
	b.Close()
	if err != nil {
		return nil, err
	}
	return l.stream(toc.Why)
}

// remote is the layer as its registry has it.
func (l *layer) remote() fetch.Layer {
	return fetch.Layer{Blob: l.from, Desc: l.rec.Desc, DiffID: l.rec.DiffID}
}

// compile writes the index that b holds, and opens it. It closes b.
func (l *layer) compile(b *unionfs.Builder, format fetch.Format) (*layerState, error) {
	defer b.Close()
	idx, err := l.install(b, format)
	if err != nil {
		return nil, err
	}
	return l.adopt(idx)
}

// install writes b as the layer's index. When the disk is full the index lives
// in memory: a full disk stops caching, not reading.
func (l *layer) install(b *unionfs.Builder, format fetch.Format) (*unionfs.Index, error) {
	m := unionfs.Meta{Blob: rawDigest(l.rec.Desc.Digest), DiffID: rawDigest(l.rec.DiffID), BlobSize: l.rec.Desc.Size,
		Format: uint8(format)}
	write := func(f *os.File) error { return b.Write(f, m) }
	err := l.s.cache.Install(cache.Index, l.key(), write)
	if err == nil {
		return unionfs.Open(l.s.cache.Path(cache.Index, l.key()))
	}
	if !isFull(err) {
		return nil, err
	}
	l.s.log.Warn("no space for a layer index, it is kept in memory", "layer", l.rec.Desc.Digest.String(), "err", err)
	path, done, err := inMemory(write)
	if err != nil {
		return nil, err
	}
	defer done()
	return unionfs.Open(path)
}

// minScratch is the free space below which scratch files are not put on the
// cache's disk: a layer of a hundred thousand files needs about 20 MB of them.
const minScratch = 64 << 20

// scratchDir is where layers are compiled: the cache directory, or, when its disk
// is nearly full, memory.
func (s *Store) scratchDir() string {
	const memory = "/dev/shm"
	if s.cache.Usage().Free < minScratch {
		if st, err := os.Stat(memory); err == nil && st.IsDir() {
			return memory
		}
	}
	return s.cache.TempDir()
}

// isFull reports whether err says that the disk has no room.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, cache.ErrFull)
}

// inMemory writes a file that exists in memory only, and returns a path that
// opens it until done is called.
func inMemory(write func(*os.File) error) (path string, done func(), err error) {
	fd, err := unix.MemfdCreate("imgfs-index", unix.MFD_CLOEXEC)
	if err != nil {
		return "", nil, os.NewSyscallError("memfd_create", err)
	}
	path = fmt.Sprintf("/proc/self/fd/%d", fd)
	f := os.NewFile(uintptr(fd), path)
	if err := write(f); err != nil {
		f.Close()
		return "", nil, err
	}
	return path, func() { f.Close() }, nil
}

// adopt makes a compiled index the layer's state.
func (l *layer) adopt(idx *unionfs.Index) (*layerState, error) {
	pack, err := l.s.cache.Pack(l.key())
	if err != nil {
		return nil, err
	}
	st := &layerState{idx: idx, pack: pack,
		reader: fetch.NewReader(l.remote(), idx, pack, l.s.cache, fetch.ReaderOptions{Strict: l.s.o.Strict})}
	l.s.mu.Lock()
	for _, n := range idx.XattrNameSet() {
		l.s.xattrs[n] = true
	}
	l.s.mu.Unlock()
	if l.rec.Sizes == nil && !l.counted.Load() {
		err := l.s.cat.setSizes(map[v1.Hash]layerSizes{l.key(): sizesOf(idx)})
		l.counted.Store(err == nil)
		if err != nil {
			l.s.log.Error("the size of a layer is not recorded", "layer", l.rec.Desc.Digest.String(), "err", err)
		}
	}
	l.failed.Store(nil)
	l.state.Store(st)
	return st, nil
}

// stream starts a pass over a layer that has no index.
func (l *layer) stream(why string) (*layerState, error) {
	l.s.log.Info("layer is streamed", "layer", l.rec.Desc.Digest.String(), "why", why)
	l.why.Store(&why)
	l.failed.Store(nil)
	b, err := unionfs.NewBuilder(l.s.scratchDir())
	if err != nil {
		return nil, err
	}
	pack, err := l.s.cache.Pack(l.key())
	if err != nil {
		b.Close()
		return nil, err
	}
	st := &layerState{builder: b, pack: pack, settled: make(chan struct{}), strict: l.s.o.Strict || l.wrong.Load() || l.shown.Load()}
	l.s.mu.Lock()
	l.s.arriving[b] = true
	l.s.mu.Unlock()
	l.noteUnproved(true)
	st.pass = fetch.StartPass(l.remote(), b, pack, l.s.cache)
	l.state.Store(st)
	l.s.tasks.Go(func() { l.finish(st, pack) })
	return st, nil
}

// finish waits for a pass and compiles what it brought. After a pass that failed
// the layer is closed again, so that its next use makes another attempt; if the
// bytes were wrong once, they are shown only when they have proved right.
func (l *layer) finish(st *layerState, pack *cache.Pack) {
	defer pack.Close()
	defer close(st.settled)
	st.err = l.settle(st)
	l.s.mu.Lock()
	delete(l.s.arriving, st.builder)
	l.s.mu.Unlock()
	if st.err != nil {
		l.fail(st.err)
		l.wrong.Store(l.wrong.Load() || errors.Is(st.err, fetch.ErrDigest))
		l.state.CompareAndSwap(st, nil)
	}
	shown := l.shown.Load()
	if (st.err != nil || st.replaced > 0 || shown) && l.s.ctx.Err() == nil {
		if shown {
			l.s.dropUnopened(l)
		}
		l.s.dropLayer(l, st.err)
		if (st.err != nil || shown) && st.files > 0 {
			// Who has a file open keeps its inode, and with it bytes of which
			// nobody knows whether they are the layer's.
			l.s.tell(Event{Files: Range{fileIno(l.rec.Seq, 0), fileIno(l.rec.Seq, st.files-1)}})
		}
	}
	if st.err == nil || !shown { // else it is not proved still
		l.shown.Store(false)
		l.noteUnproved(false)
	}
}

func (l *layer) settle(st *layerState) (err error) {
	defer recovered(&err)
	defer st.builder.Close()
	err = st.pass.Wait(context.Background())
	st.files = st.builder.Stats().Files
	if err != nil {
		return err
	}
	st.replaced = st.builder.Replaced()
	if _, err = l.compile(st.builder, st.pass.Format()); err != nil {
		return err
	}
	return l.arrived()
}

// damaged is told of a layer whose index turned out to be damaged: its next use
// makes it again.
func (l *layer) damaged(st *layerState, err error) {
	l.s.log.Error("layer index is made again", "layer", l.rec.Desc.Digest.String(), "err", err)
	if l.state.CompareAndSwap(st, nil) {
		if err := l.s.cache.Remove(cache.Index, l.key()); err != nil {
			l.s.log.Error("removing a damaged layer index", "err", err)
		}
	}
}

// dropLayer tells that what was said of a layer is no longer true.
func (s *Store) dropLayer(l *layer, err error) {
	for _, n := range s.namesOf(func(im *image) bool { return slices.Contains(im.layers, l) }) {
		s.tell(Event{Name: n, Err: err, Drop: true})
	}
}

// namesOf returns the names of the views that have been opened and show such an
// image.
func (s *Store) namesOf(such func(*image) bool) (names []Name) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.views {
		if such(v.image) {
			names = append(names, v.Name())
		}
	}
	return names
}

// stop ends the layer's pass, if it has one.
func (l *layer) stop() {
	if st := l.state.Load(); st != nil && st.pass != nil {
		st.pass.Close()
	}
}

func (l *layer) close() {
	if st := l.state.Load(); st != nil && st.idx != nil {
		st.reader.Close()
		st.idx.Close()
	}
}

// rawDigest is h as unionfs has it; zero when h is no SHA-256.
func rawDigest(h v1.Hash) (d unionfs.Digest) {
	if raw, err := hex.DecodeString(h.Hex); err == nil && h.Algorithm == "sha256" && len(raw) == len(d) {
		copy(d[:], raw)
	}
	return d
}

// The annotations by which a manifest vouches for the index inside a layer's
// blob.
var tocAnnotations = []string{
	"containerd.io/snapshot/stargz/toc.digest",
	"io.github.containers.zstd-chunked.manifest-checksum",
	"io.github.containers.zstd-chunked.manifest-position",
}

// layerKey is what a layer is known by here: its index, its pack, its sequence,
// unless images disagree about it (putLayer).
//
// It is the blob's digest, except when the manifest names an index inside the
// blob. Then the blob is never read whole and its digest never checked: what is
// trusted is the manifest's word for the index. So that word is part of the key,
// else a manifest of one image could say what is in the layers of another.
func layerKey(desc v1.Descriptor) v1.Hash {
	word := tocWord(desc)
	if word == "" {
		return desc.Digest
	}
	return sha256Hash([]byte(desc.Digest.String() + word))
}

// tocWord is what the manifest says of an index inside the blob; "" when nothing.
func tocWord(desc v1.Descriptor) (word string) {
	for _, name := range tocAnnotations {
		if v := desc.Annotations[name]; v != "" {
			word += "\n" + name + "=" + v
		}
	}
	return word
}

func (l *layer) key() v1.Hash { return l.rec.Key }

// sizesOf counts the regular files of a layer that have a name, each once.
func sizesOf(idx *unionfs.Index) (z layerSizes) {
	var a Attr
	for i := range idx.Stats().Files {
		if err := idx.Attr(unionfs.FileID(i), &a); err != nil {
			continue
		}
		if a.Mode&unix.S_IFMT == unix.S_IFREG && a.Nlink > 0 {
			z.Expanded += a.Size
			z.Usage += (a.Size + 511) &^ 511
		}
	}
	return z
}

// indexedSizes is sizesOf of the index at path, if it is one of blob.
func indexedSizes(path string, blob v1.Hash) (layerSizes, bool) {
	idx, err := unionfs.Open(path)
	if err != nil {
		return layerSizes{}, false
	}
	defer idx.Close()
	return sizesOf(idx), idx.Meta().Blob == rawDigest(blob)
}
