package images

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// get returns the value under key; nil when there is none. It is valid as long as
// the transaction.
func (t *txn) get(bucket, key []byte) []byte {
	t.c.reads.Add(1)
	return t.Bucket(bucket).Get(key)
}

// load decodes the record under key into v.
func (t *txn) load(bucket, key []byte, v any) (bool, error) {
	data := t.get(bucket, key)
	if data == nil {
		return false, nil
	}
	return true, decode(bucket, key, data, v)
}

func decode(bucket, key, data []byte, v any) error {
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("images: catalogue entry %s %q is %w: %v", bucket, key, errDamaged, err)
	}
	return nil
}

// must is load of a record that another one refers to.
func (t *txn) must(bucket, key []byte, v any) error {
	ok, err := t.load(bucket, key, v)
	if err == nil && !ok {
		err = fmt.Errorf("images: catalogue entry %s %q is missing: it is %w", bucket, key, errDamaged)
	}
	return err
}

func (t *txn) store(bucket, key []byte, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return t.Bucket(bucket).Put(key, data)
}

// mark puts key without a value, or deletes it.
func (t *txn) mark(bucket, key []byte, on bool) error {
	if on {
		return t.Bucket(bucket).Put(key, []byte{})
	}
	return t.Bucket(bucket).Delete(key)
}

// errStop ends a scan early.
var errStop = errors.New("images: enough")

// ended returns the error of the transaction's context, if it has one.
func (t *txn) ended() error {
	if t.ctx == nil {
		return nil
	}
	return t.ctx.Err()
}

// scan calls f for the entries whose key begins with prefix, in order, until it
// returns an error; errStop is none. f must not change the bucket.
func (t *txn) scan(bucket, prefix []byte, f func(k, v []byte) error) error {
	cur := t.Bucket(bucket).Cursor()
	var last []byte
	for k, v := cur.Seek(prefix); ; k, v = cur.Next() {
		t.c.reads.Add(1)
		if k == nil || !bytes.HasPrefix(k, prefix) {
			return nil
		}
		if err := t.ended(); err != nil {
			return err
		}
		if last != nil && bytes.Compare(last, k) >= 0 { // it may go round for ever
			return fmt.Errorf("images: the catalogue is %w: %s has %q after %q", errDamaged, bucket, k, last)
		}
		last = k
		if err := f(k, v); err == errStop {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// first returns the first key that begins with prefix; nil when there is none.
func (t *txn) first(bucket, prefix []byte) (key []byte) {
	t.scan(bucket, prefix, func(k, _ []byte) error {
		key = k
		return errStop
	})
	return key
}

// namesOf returns the names of an image.
func (t *txn) namesOf(image v1.Hash) (list []Name) {
	prefix := hashKey(image)
	prefix = append(prefix, 0)
	t.scan(bucketUses, prefix, func(k, _ []byte) error {
		list = append(list, parseKey(k[len(prefix):]))
		return nil
	})
	return list
}

// sameDigest is the image whose manifest has the digest that n is, if a name in
// n's repository stands for it.
func (t *txn) sameDigest(n Name) (image v1.Hash, ok bool) {
	image, err := v1.NewHash(strings.TrimPrefix(n.Tag, "@"))
	if err != nil {
		return v1.Hash{}, false
	}
	return image, slices.ContainsFunc(t.namesOf(image), func(other Name) bool { return other.Repo == n.Repo })
}

// used reports whether image has a name.
func (t *txn) used(image v1.Hash) bool {
	return t.first(bucketUses, append(hashKey(image), 0)) != nil
}

// layer returns the record of a layer.
func (t *txn) layer(key v1.Hash) (rec layerRecord, ok bool, err error) {
	ok, err = t.load(bucketLayers, hashKey(key), &rec)
	rec.Key = key
	return rec, ok, err
}

// manifests returns the manifest digests under a prefix of bucketIDs,
// bucketChains or bucketUsers that ends where they begin.
func (t *txn) manifests(bucket, prefix []byte) (list []v1.Hash, err error) {
	err = t.scan(bucket, prefix, func(k, _ []byte) error {
		h, err := v1.NewHash(string(k[len(prefix):]))
		list = append(list, h)
		return err
	})
	return list, err
}

// withID returns the manifests of the images with this ID.
func (t *txn) withID(id v1.Hash) ([]v1.Hash, error) {
	return t.manifests(bucketIDs, []byte(id.Hex+"\x00"))
}
