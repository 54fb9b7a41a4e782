package images

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// count is what the catalogue must say, computed from names, images, layers and
// what is dangling alone: bucket -> key -> value.
type count map[string]map[string][]byte

func (n count) put(bucket, key []byte, v any) error {
	data := []byte{}
	if v != nil {
		var err error
		if data, err = json.Marshal(v); err != nil {
			return err
		}
	}
	if n[string(bucket)] == nil {
		n[string(bucket)] = map[string][]byte{}
	}
	n[string(bucket)][string(key)] = data
	return nil
}

// counted are the buckets of a count that have nothing else.
var counted = [][]byte{bucketUses, bucketIDs, bucketChains, bucketUsers, bucketHere, bucketIdle, bucketSpare, bucketArriving,
	bucketImages, bucketLayers, bucketDangling}

// check compares the counters and lists of the catalogue with a count, and calls
// report for each that is wrong. With repair they are set right. It returns how
// many names it has seen. Its cost grows with what is here; it stops, with nothing
// repaired, when ctx ends.
func (c *catalog) check(ctx context.Context, repair bool, report func(object, problem string)) (names int, err error) {
	look := func(t *txn) error {
		t.ctx = ctx
		n, lost, err := t.count()
		if err != nil {
			return err
		}
		for _, name := range lost {
			report(name.String(), "it stands for an image that is not here")
			if repair {
				if err := t.Bucket(bucketNames).Delete(name.key()); err != nil {
					return err
				}
			}
		}
		changed := len(lost) > 0
		for _, bucket := range append(slices.Clone(counted), bucketMeta) {
			wrong, err := t.compare(bucket, n[string(bucket)], repair, report)
			if err != nil {
				return err
			}
			changed = changed || wrong
		}
		err = t.scan(bucketNames, nil, func(k, v []byte) error { names++; return nil })
		if err == nil && !changed {
			return errUnchanged
		}
		return err
	}
	if repair {
		_, err = c.write(look)
		return names, err
	}
	if err = c.read(look); err == errUnchanged {
		err = nil
	}
	return names, err
}

// compare compares a bucket with what it must hold. In bucketMeta only the totals
// are looked at.
func (t *txn) compare(bucket []byte, want map[string][]byte, repair bool, report func(object, problem string)) (wrong bool, err error) {
	fix := map[string][]byte{}
	seen := map[string]bool{}
	err = t.scan(bucket, nil, func(k, v []byte) error {
		if bytes.Equal(bucket, bucketMeta) && !bytes.Equal(k, totalsKey) {
			return nil
		}
		seen[string(k)] = true
		right, ok := want[string(k)]
		switch {
		case !ok:
			report(fmt.Sprintf("%s %q", bucket, k), "it must not be there")
		case !bytes.Equal(v, right):
			report(fmt.Sprintf("%s %q", bucket, k), fmt.Sprintf("it is %s, and must be %s",
				printable(string(v), maxFound), printable(string(right), maxFound)))
		default:
			return nil
		}
		fix[string(k)] = right
		return nil
	})
	if err != nil {
		return false, err
	}
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if err := t.ended(); err != nil {
			return false, err
		}
		if !seen[k] {
			report(fmt.Sprintf("%s %q", bucket, k), "it is missing")
			fix[k] = want[k]
		}
	}
	for k, v := range fix {
		if !repair {
			break
		}
		if v == nil {
			err = t.Bucket(bucket).Delete([]byte(k))
		} else {
			err = t.Bucket(bucket).Put([]byte(k), v)
		}
		if err != nil {
			return true, err
		}
	}
	return len(fix) > 0, nil
}

// count counts. lost are the names whose image is not here.
func (t *txn) count() (n count, lost []Name, err error) {
	n = count{}
	images := map[v1.Hash]imageRecord{}
	layers := map[v1.Hash]layerRecord{}
	err = t.scan(bucketImages, nil, func(k, v []byte) error {
		var rec imageRecord
		h, err := v1.NewHash(string(k))
		if err == nil {
			err = decode(bucketImages, k, v, &rec)
		}
		images[h] = rec
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	err = t.scan(bucketLayers, nil, func(k, v []byte) error {
		var rec layerRecord
		h, err := v1.NewHash(string(k))
		if err == nil {
			err = decode(bucketLayers, k, v, &rec)
		}
		rec.Key, rec.Images, rec.Named = h, 0, 0
		layers[h] = rec
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	var sum totals
	named := map[v1.Hash]bool{}
	err = t.scan(bucketNames, nil, func(k, v []byte) error {
		var rec nameRecord
		if err := decode(bucketNames, k, v, &rec); err != nil {
			return err
		}
		name := parseKey(k)
		if _, ok := images[rec.Image]; !ok {
			lost = append(lost, name)
			return nil
		}
		named[rec.Image] = true
		sum.Names++
		return n.put(bucketUses, useKey(rec.Image, name), nil)
	})
	if err != nil {
		return nil, nil, err
	}
	sum.Images, sum.Tagged = len(images), len(named)
	if err := t.countLayers(n, images, layers, named); err != nil {
		return nil, nil, err
	}
	for key, rec := range layers {
		if err := t.ended(); err != nil {
			return nil, nil, err
		}
		sum.add(&rec, 1)
		if err := n.put(bucketLayers, hashKey(key), rec); err != nil {
			return nil, nil, err
		}
	}
	if err := t.countImages(n, images, layers, named); err != nil {
		return nil, nil, err
	}
	return n, lost, n.put(bucketMeta, totalsKey, sum)
}

// countLayers counts the images of layers, and lists the layers.
func (t *txn) countLayers(n count, images map[v1.Hash]imageRecord, layers map[v1.Hash]layerRecord, named map[v1.Hash]bool) error {
	for digest, im := range images {
		if err := t.ended(); err != nil {
			return err
		}
		for _, l := range im.distinct() {
			rec, ok := layers[l.Key]
			if !ok {
				return fmt.Errorf("images: image %s has the layer %s, which the catalogue does not know", digest, l.Key)
			}
			rec.Images++
			if named[digest] {
				rec.Named++
			}
			layers[l.Key] = rec
			if err := n.put(bucketUsers, userKey(l.Seq, digest), nil); err != nil {
				return err
			}
		}
	}
	for key, rec := range layers {
		if err := t.ended(); err != nil {
			return err
		}
		rec.Idle = rec.Idle && rec.Images == 0
		layers[key] = rec
		for _, list := range []struct {
			bucket []byte
			in     bool
		}{
			{bucketHere, rec.here()}, {bucketIdle, rec.Idle}, {bucketSpare, rec.Images > 0 && rec.Named == 0},
			{bucketArriving, rec.Images > 0 && rec.Sizes == nil},
		} {
			if !list.in {
				continue
			}
			if err := n.put(list.bucket, hashKey(key), nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// countImages counts the sizes of images, and lists their IDs and chains.
func (t *txn) countImages(n count, images map[v1.Hash]imageRecord, layers map[v1.Hash]layerRecord, named map[v1.Hash]bool) error {
	for digest, im := range images {
		if err := t.ended(); err != nil {
			return err
		}
		im.Size, im.Unknown, im.Expanded, im.Usage, im.Shared = 0, 0, 0, 0, 0
		for _, l := range im.distinct() {
			rec := layers[l.Key]
			im.Size += rec.Desc.Size
			if rec.Sizes == nil {
				im.Unknown++
				continue
			}
			im.Expanded += rec.Sizes.Expanded
			im.Usage += rec.Sizes.Usage
			if rec.Images > 1 {
				im.Shared += rec.Sizes.Expanded
			}
		}
		if err := n.put(bucketImages, hashKey(digest), im); err != nil {
			return err
		}
		if err := n.put(bucketIDs, []byte(im.Config.Hex+"\x00"+digest.String()), nil); err != nil {
			return err
		}
		var diffIDs []v1.Hash
		for _, l := range im.Layers {
			diffIDs = append(diffIDs, layers[l.Key].DiffID)
		}
		for i, id := range chainIDs(diffIDs) {
			c := chainRecord{Depth: i + 1, Whole: i+1 == len(diffIDs)}
			if i < len(im.Steps) {
				c.Created = im.Steps[i]
			}
			if err := n.put(bucketChains, chainKey(id, digest), c); err != nil {
				return err
			}
		}
		if named[digest] {
			continue
		}
		d := danglingRecord{Top: digest}
		if _, err := t.load(bucketDangling, hashKey(digest), &d); err != nil {
			return err
		}
		if err := n.put(bucketDangling, hashKey(digest), d); err != nil {
			return err
		}
	}
	return nil
}
