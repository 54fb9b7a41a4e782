package images

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	iofs "io/fs"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
)

// A store can be opened after a crash while the kernel still holds the inode
// numbers that it gave before. They are in the catalogue; what nobody needs of it
// after a clean start is then kept.

// errOtherNumbers reports a catalogue in which the kernel's numbers mean other
// files, or none.
var errOtherNumbers = errors.New("images: the catalogue is another one than when this was mounted, or was made again: unmount, and mount again")

// ID names the catalogue as one mount has it, over all servers of that: what of its
// numbers the kernel holds means nothing in another.
func (s *Store) ID() string { return s.id }

// idKey is the key of the catalogue's ID.
var idKey = []byte("id")

// identity is the catalogue's ID. It gets another one for a new mount, which does not
// keep what the kernel holds of an older one.
func (c *catalog) identity(fresh bool) (id string, err error) {
	read := func(t *txn) error {
		id = string(t.Bucket(bucketMeta).Get(idKey))
		return nil
	}
	if err := c.read(read); err != nil || !fresh {
		return id, err
	}
	id = rand.Text()
	_, err = c.write(func(t *txn) error { return t.Bucket(bucketMeta).Put(idKey, []byte(id)) })
	return id, err
}

// Locks are the files whose locks keep other servers out of the cache directory.
// Who has copies of their descriptors can take the locks off a process that was
// killed, but cannot die yet.
func (s *Store) Locks() []*os.File { return []*os.File{s.cache.Lock(), s.cat.file} }

// ExchangeOnce is Exchange for a request of the kernel, by its number, which may
// come once more after a crash. done says that it was carried out before.
func (s *Store) ExchangeOnce(a, b Name, request uint64) (c Change, done bool, err error) {
	return s.cat.exchangeOnce(a, b, request)
}

// onceKey is the key of the last requests that were carried out once: 8 bytes
// each, the oldest first.
var onceKey = []byte("once")

// maxOnce is how many are kept: more than the kernel has under way, since each
// holds the locks of its directories.
const maxOnce = 256

// once notes a request, or tells that it was noted before. 0 is no request.
func (t *txn) once(request uint64) (before bool, err error) {
	if request == 0 {
		return false, nil
	}
	meta := t.Bucket(bucketMeta)
	list := meta.Get(onceKey)
	for i := 0; i+8 <= len(list); i += 8 {
		if binary.BigEndian.Uint64(list[i:]) == request {
			return true, nil
		}
	}
	list = binary.BigEndian.AppendUint64(append([]byte{}, list...), request)
	return false, meta.Put(onceKey, list[max(0, len(list)-8*maxOnce):])
}

// forgetRequests is for a new mount, which counts its requests anew.
func (c *catalog) forgetRequests() error {
	_, err := c.write(func(t *txn) error {
		meta := t.Bucket(bucketMeta)
		if meta.Get(onceKey) == nil {
			return errUnchanged
		}
		return meta.Delete(onceKey)
	})
	return err
}

// kept reports whether the kernel may hold numbers from before.
func (o *Options) kept() bool { return o.Resume != "" || o.Keep }

// unprovedDir has a file for each layer of which something is shown before its pass
// has matched, by the layer's key. It is for a server that follows one which was
// killed, so it need not outlive the machine.
const unprovedDir = "unproved"

// noteUnproved notes a layer, or that it has matched.
func (l *layer) noteUnproved(is bool) {
	root, err := os.OpenRoot(l.s.o.Dir)
	if err == nil {
		defer root.Close()
		name := unprovedDir + "/" + l.key().Hex
		if !is {
			err = root.Remove(name)
		} else if err = root.Mkdir(unprovedDir, 0o700); err == nil || errors.Is(err, iofs.ErrExist) {
			var f *os.File
			if f, err = root.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
				err = f.Close()
			}
		}
	}
	if err != nil && !errors.Is(err, iofs.ErrNotExist) {
		l.s.log.Warn("that a layer is not proved yet is not noted", "layer", l.rec.Desc.Digest.String(), "err", err)
	}
}

// unproved are the keys of the layers that are noted.
func unproved(dir string) (keys map[string]bool, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	list, err := iofs.ReadDir(root.FS(), unprovedDir)
	if errors.Is(err, iofs.ErrNotExist) {
		err = nil
	}
	keys = map[string]bool{}
	for _, e := range list {
		keys[e.Name()] = true
	}
	return keys, err
}

// forgetUnproved is for a new mount: the kernel holds nothing that was shown before.
func forgetUnproved(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return root.RemoveAll(unprovedDir)
}

// resumePasses finds the passes that a server has not ended which died. What they had
// brought may have been read, and the kernel keeps it, but nobody knows any more that
// it was to be proved: so it is proved now, nothing more is shown before that, and
// the kernel forgets what it has.
func (s *Store) resumePasses() {
	noted, err := unproved(s.o.Dir)
	var recs []layerRecord
	if err == nil && len(noted) > 0 {
		recs, err = s.cat.layersHere()
	}
	if err != nil {
		s.log.Error("what a server that died has shown cannot be proved", "err", err)
		return
	}
	for _, rec := range recs {
		if !noted[rec.Key.Hex] {
			continue
		}
		if l, err := s.layer(rec.Seq); err == nil {
			l.shown.Store(true)
			s.begun = append(s.begun, l)
		}
	}
}

const (
	maxResumed  = 4 // passes that are gone on with at once
	resumeFirst = time.Second
	resumeMost  = time.Minute
)

// provePasses is resumePasses once somebody watches: the kernel must hear of it.
func (s *Store) provePasses(begun []*layer) {
	if len(begun) == 0 {
		return
	}
	s.log.Info("going on with layers that were on their way", "layers", len(begun))
	s.tasks.Go(func() {
		var g errgroup.Group
		g.SetLimit(maxResumed)
		for _, l := range begun {
			g.Go(func() error { return l.prove(s.ctx) })
		}
		g.Wait()
	})
}

// prove opens a layer until it has matched, or ctx ends.
func (l *layer) prove(ctx context.Context) error {
	for wait := resumeFirst; ; wait = min(2*wait, resumeMost) {
		st, err := l.open(ctx)
		switch {
		case err != nil:
			l.s.dropUnopened(l) // who looks again is told why
		case st.settled != nil:
			select {
			case <-st.settled:
			case <-ctx.Done():
			}
		default: // it had matched, and nobody was told
			l.proved(st.idx.Stats().Files)
		}
		if !l.shown.Load() {
			return nil
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// proved has the kernel forget what a server that died has shown of the layer, which
// has this many files.
func (l *layer) proved(files uint32) {
	l.s.dropUnopened(l)
	if files > 0 {
		l.s.tell(Event{Files: Range{fileIno(l.rec.Seq, 0), fileIno(l.rec.Seq, files-1)}})
	}
	l.shown.Store(false)
	l.noteUnproved(false)
}

// dropUnopened has the kernel forget all directories of images that have the layer,
// also of those that were not opened since this server began.
func (s *Store) dropUnopened(l *layer) {
	var names []Name
	err := s.cat.read(func(t *txn) error {
		images, err := t.manifests(bucketUsers, seqKey(uint64(l.rec.Seq)))
		if err != nil {
			return err
		}
		return t.scan(bucketView, nil, func(k, v []byte) error {
			var rec viewRecord
			if err := decode(bucketView, k, v, &rec); err != nil {
				return err
			}
			if slices.Contains(images, rec.Image) {
				names = append(names, rec.Name)
			}
			return nil
		})
	})
	if err != nil {
		s.log.Error("the kernel is not told of a layer that was proved", "layer", l.rec.Desc.Digest.String(), "err", err)
	}
	for _, n := range names {
		s.tell(Event{Name: n, Drop: true})
	}
}
