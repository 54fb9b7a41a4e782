package images

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// putView returns the view of image under n, giving it a sequence when it has none.
func (t *txn) putView(n Name, image v1.Hash, depth int) (uint32, error) {
	key := viewKey(image, n)
	if v := t.get(bucketViews, key); len(v) == 8 {
		return uint32(binary.BigEndian.Uint64(v)), nil
	}
	seq, err := t.nextView(maxSeq)
	if err != nil {
		return 0, err
	}
	if err := t.Bucket(bucketViews).Put(key, seqKey(seq)); err != nil {
		return 0, err
	}
	return uint32(seq), t.store(bucketView, seqKey(seq), viewRecord{Name: n, Image: image, Depth: depth})
}

// nextView gives a number that no view has. After the last it begins again: views
// that were retired since the store was opened still have theirs, who had the
// others is gone.
func (t *txn) nextView(limit uint64) (uint64, error) {
	last := counter(t.Bucket(bucketMeta), "view")
	cur := t.Bucket(bucketView).Cursor()
	for _, span := range [][2]uint64{{last + 1, limit}, {1, min(last, limit)}} {
		n := span[0]
		for k, _ := cur.Seek(seqKey(n)); k != nil && binary.BigEndian.Uint64(k) == n; k, _ = cur.Next() {
			t.c.reads.Add(1)
			n++
		}
		t.c.reads.Add(1)
		if n <= span[1] {
			return n, setCounter(t.Bucket(bucketMeta), "view", n)
		}
	}
	return 0, fmt.Errorf("images: no number left for another view (limit %d)", limit)
}

// retire gives the view under key up: what comes back under its name is another
// directory to the kernel. Its record stays for those who have it open.
func (t *txn) retire(key []byte) error {
	seq := bytes.Clone(t.get(bucketViews, key))
	if len(seq) != 8 {
		return nil
	}
	if err := t.Bucket(bucketViews).Delete(key); err != nil {
		return err
	}
	return t.mark(bucketRetired, seq, true)
}

// retireSpecial gives up the view of something in .imgfs, if it shows image.
func (t *txn) retireSpecial(n Name, image v1.Hash) error {
	key := viewKey(image, n)
	seq := t.get(bucketViews, key)
	if seq == nil {
		return nil
	}
	var rec viewRecord
	if err := t.must(bucketView, seq, &rec); err != nil || rec.Image != image {
		return err
	}
	return t.retire(key)
}

// takeView takes the view of image away from n, to be given to another name.
func (t *txn) takeView(n Name, image v1.Hash) (uint32, error) {
	seq, err := t.putView(n, image, 0)
	if err != nil {
		return 0, err
	}
	return seq, t.Bucket(bucketViews).Delete(viewKey(image, n))
}

// giveView makes a view that was taken show image under n.
func (t *txn) giveView(seq uint32, n Name, image v1.Hash) error {
	if err := t.retire(viewKey(image, n)); err != nil {
		return err
	}
	if err := t.Bucket(bucketViews).Put(viewKey(image, n), seqKey(uint64(seq))); err != nil {
		return err
	}
	if t.effects.moved == nil {
		t.effects.moved = map[uint32]Name{}
	}
	t.effects.moved[seq] = n
	return t.store(bucketView, seqKey(uint64(seq)), viewRecord{Name: n, Image: image})
}

// view returns the name and image that the view with this sequence shows.
func (c *catalog) view(seq uint32) (rec viewRecord, ok bool, err error) {
	err = c.read(func(t *txn) error {
		ok, err = t.load(bucketView, seqKey(uint64(seq)), &rec)
		return err
	})
	return rec, ok, err
}

// viewOf returns the sequence of the view of image under n.
func (c *catalog) viewOf(n Name, image v1.Hash) (seq uint32, ok bool) {
	c.read(func(t *txn) error {
		if v := t.get(bucketViews, viewKey(image, n)); len(v) == 8 {
			seq, ok = uint32(binary.BigEndian.Uint64(v)), true
		}
		return nil
	})
	return seq, ok
}

// special reports whether n is a directory in .imgfs that is no name: a dangling
// image, or a chain.
func (n Name) special() bool { return n.Repo == DanglingDir || n.Repo == ChainsDir }

// specialImage returns the image that such a directory shows, and how many of its
// layers; all when 0. The error is fs.ErrNotExist when there is none.
func (t *txn) specialImage(n Name) (image v1.Hash, depth int, err error) {
	if !hexRE.MatchString(n.Tag) {
		return image, 0, notHere("opening", n)
	}
	id := v1.Hash{Algorithm: "sha256", Hex: n.Tag}
	var list []v1.Hash
	if n.Repo == DanglingDir {
		list, err = t.withID(id)
		list = slices.DeleteFunc(list, func(digest v1.Hash) bool { return t.get(bucketDangling, hashKey(digest)) == nil })
	} else {
		var chains []Chain
		if chains, err = t.chains([]byte(n.Tag + "\x00")); len(chains) > 0 {
			list, depth = chains[0].Images, chains[0].Layers
		}
	}
	if err == nil && len(list) == 0 {
		err = notHere("opening", n)
	}
	if err != nil {
		return image, 0, err
	}
	var was viewRecord // what it has shown, it goes on to show, if that is as good
	if v := t.get(bucketViews, viewKey(v1.Hash{}, n)); len(v) == 8 {
		if err := t.must(bucketView, v, &was); err != nil {
			return image, 0, err
		}
		if i := slices.Index(list, was.Image); i > 0 {
			list[0], list[i] = list[i], list[0]
		}
	}
	if image, err = t.claimed(id, list, depth); err != nil {
		return image, 0, err
	}
	var rec imageRecord
	if err := t.must(bucketImages, hashKey(image), &rec); err != nil {
		return image, 0, err
	}
	if depth == len(rec.Layers) {
		depth = 0
	}
	return image, depth, nil
}

// viewAt returns the sequence of the view under n: of the image that n stands
// for, of a dangling image, or of a chain. The last two get one when they have
// none. The error is fs.ErrNotExist when nothing is there.
func (c *catalog) viewAt(n Name) (seq uint32, err error) {
	if !n.special() {
		err = c.read(func(t *txn) error {
			rec, ok, err := t.lookup(n)
			if err == nil && !ok {
				err = notHere("opening", n)
			}
			if err != nil {
				return err
			}
			v := t.get(bucketViews, viewKey(rec.Image, n))
			if len(v) != 8 {
				return fmt.Errorf("images: opening %q: the catalogue has no view of it", n)
			}
			seq = uint32(binary.BigEndian.Uint64(v))
			return nil
		})
		return seq, err
	}
	err = c.read(func(t *txn) error {
		image, depth, err := t.specialImage(n)
		if err == nil {
			seq, err = t.specialView(n, image, depth)
		}
		return err
	})
	if err != nil || seq != 0 {
		return seq, err
	}
	_, err = c.write(func(t *txn) error {
		image, depth, err := t.specialImage(n)
		if err != nil {
			return err
		}
		if seq, err = t.specialView(n, image, depth); err != nil || seq != 0 {
			return err
		}
		if err := t.retire(viewKey(v1.Hash{}, n)); err != nil { // it shows another image
			return err
		}
		seq, err = t.putView(n, image, depth)
		return err
	})
	return seq, err
}

// specialView returns the view of a directory that is no name, if it shows the first
// depth layers of image; else 0.
func (t *txn) specialView(n Name, image v1.Hash, depth int) (uint32, error) {
	v := t.get(bucketViews, viewKey(v1.Hash{}, n))
	if len(v) != 8 {
		return 0, nil
	}
	var rec viewRecord
	if err := t.must(bucketView, v, &rec); err != nil || rec.Image != image || rec.Depth != depth {
		return 0, err
	}
	return uint32(binary.BigEndian.Uint64(v)), nil
}

// dropRetired forgets the views of names that are gone. It may only be called
// while nobody holds one.
func (c *catalog) dropRetired() error {
	_, err := c.write(func(t *txn) error {
		var gone [][]byte
		err := t.scan(bucketRetired, nil, func(k, _ []byte) error {
			gone = append(gone, bytes.Clone(k))
			return nil
		})
		if err == nil && len(gone) == 0 {
			return errUnchanged
		}
		for _, k := range gone {
			if err == nil {
				err = t.Bucket(bucketView).Delete(k)
			}
			if err == nil {
				err = t.mark(bucketRetired, k, false)
			}
		}
		return err
	})
	return err
}
