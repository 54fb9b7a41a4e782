package images

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/imgfs/imgfs/cache"
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

// maxResumed is how many passes are gone on with at once.
const maxResumed = 4

// resumePasses finds the passes that a server has not ended which died. What they had
// brought may have been read, and the kernel keeps it, but nobody knows any more that
// it was to be proved: so it is proved now, nothing more is shown before that, and
// the kernel forgets what it has.
func (s *Store) resumePasses() {
	recs, err := s.cat.layersHere()
	if err != nil {
		s.log.Error("what a server that died has shown cannot be proved", "err", err)
		return
	}
	packs := map[v1.Hash]bool{}
	for _, h := range s.cache.PackNames() {
		packs[h] = true
	}
	var begun []*layer
	for _, rec := range recs {
		if !packs[rec.Key] || s.cache.Has(cache.Index, rec.Key) {
			continue
		}
		if l, err := s.layer(rec.Seq); err == nil {
			l.shown.Store(true)
			begun = append(begun, l)
		}
	}
	s.begun = begun
}

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
			g.Go(func() error {
				st, err := l.open(s.ctx)
				if err != nil || st.settled == nil {
					return nil // it tells itself what is wrong, at its next use too
				}
				select {
				case <-st.settled:
				case <-s.ctx.Done():
				}
				return nil
			})
		}
		g.Wait()
	})
}

// dropUnopened has the kernel forget the names of images that have the layer and
// were not opened since this server began.
func (s *Store) dropUnopened(l *layer) {
	var names []Name
	err := s.cat.read(func(t *txn) error {
		images, err := t.manifests(bucketUsers, seqKey(uint64(l.rec.Seq)))
		for _, digest := range images {
			names = append(names, t.namesOf(digest)...)
		}
		return err
	})
	if err != nil {
		s.log.Error("the kernel is not told of a layer that was proved", "layer", l.rec.Desc.Digest.String(), "err", err)
	}
	for _, n := range names {
		s.tell(Event{Name: n, Drop: true})
	}
}
