package images

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"os"
)

// A store can be opened after a crash while the kernel still holds the inode
// numbers that it gave before. They are in the catalogue; what nobody needs of it
// after a clean start is then kept.

// errOtherNumbers reports a catalogue in which the kernel's numbers mean other
// files, or none.
var errOtherNumbers = errors.New("images: the catalogue is another one than when this was mounted, or was made again: unmount, and mount again")

// ID names the catalogue, from when it was made to when it is lost: what of its
// numbers the kernel holds means nothing in another.
func (s *Store) ID() string { return s.id }

// idKey is the key of the catalogue's ID.
var idKey = []byte("id")

// identity is the catalogue's ID, which it gets when it has none.
func (c *catalog) identity() (id string, err error) {
	read := func(t *txn) error {
		id = string(t.Bucket(bucketMeta).Get(idKey))
		return nil
	}
	if err := c.read(read); err != nil || id != "" {
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
