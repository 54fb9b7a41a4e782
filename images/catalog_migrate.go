package images

import (
	"bytes"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// migrate makes version 2 of version 1, which had no counters, IDs, chains, or
// dangling images: an image went with its last name, or when its last name moved
// on, and then only its record was left. The sizes of layers are counted again,
// from their indexes, when the store is opened.
func (t *txn) migrate(blobs blobSource) error {
	records := map[v1.Hash]imageRecord{}
	err := t.scan(bucketImages, nil, func(k, v []byte) error {
		h, err := v1.NewHash(string(k))
		if err != nil {
			return err
		}
		var rec imageRecord
		err = decode(bucketImages, k, v, &rec)
		records[h] = rec
		return err
	})
	if err != nil {
		return err
	}
	if err := t.migrateLayers(); err != nil {
		return err
	}
	for digest, rec := range records {
		if err := t.Bucket(bucketImages).Delete(hashKey(digest)); err != nil {
			return err
		}
		if !t.used(digest) {
			if err := t.migrateUnused(digest, rec); err != nil {
				return err
			}
			continue
		}
		diffIDs, err := t.migrateStack(&rec)
		if err != nil {
			return err
		}
		if blobs != nil {
			if raw, ok, _ := blobs.Blob(rec.Config); ok {
				if cf, err := v1.ParseConfigFile(bytes.NewReader(raw)); err == nil {
					rec.Steps = steps(cf, len(rec.Layers))
				}
			}
		}
		if err := t.addImage(digest, rec, diffIDs); err != nil {
			return err
		}
		if err := t.setNamed(digest, true); err != nil {
			return err
		}
	}
	sum, err := t.total()
	if err != nil {
		return err
	}
	if err := t.scan(bucketNames, nil, func(_, _ []byte) error { sum.Names++; return nil }); err != nil {
		return err
	}
	return t.migrateViews()
}

// migrateLayers makes all layers idle; the images take theirs.
func (t *txn) migrateLayers() error {
	var keys []v1.Hash
	err := t.scan(bucketLayers, nil, func(k, _ []byte) error {
		h, err := v1.NewHash(string(k))
		keys = append(keys, h)
		return err
	})
	for _, key := range keys {
		if err == nil {
			_, _, err = t.changeLayer(key, func(r *layerRecord) { r.Idle = true })
		}
	}
	return err
}

// migrateStack fills in the keys of an image's layers, and returns their diffIDs.
func (t *txn) migrateStack(rec *imageRecord) (diffIDs []v1.Hash, err error) {
	for i := range rec.Layers {
		l := &rec.Layers[i]
		if l.Key, err = v1.NewHash(string(t.get(bucketLayer, seqKey(uint64(l.Seq))))); err != nil {
			return nil, err
		}
		var lr layerRecord
		if err := t.must(bucketLayers, hashKey(l.Key), &lr); err != nil {
			return nil, err
		}
		diffIDs = append(diffIDs, lr.DiffID)
	}
	return diffIDs, nil
}

// migrateUnused makes an image dangling that version 1 had left behind when its
// last name moved on.
func (t *txn) migrateUnused(digest v1.Hash, rec imageRecord) error {
	diffIDs, err := t.migrateStack(&rec)
	if err != nil {
		return err
	}
	if err := t.addImage(digest, rec, diffIDs); err != nil {
		return err
	}
	return t.store(bucketDangling, hashKey(digest), danglingRecord{Top: digest, Lost: now()})
}

// migrateViews retires the views of names that stand for something else.
func (t *txn) migrateViews() error {
	var gone [][]byte
	err := t.scan(bucketViews, nil, func(k, _ []byte) error {
		if t.get(bucketUses, k) == nil {
			gone = append(gone, bytes.Clone(k))
		}
		return nil
	})
	for _, k := range gone {
		if err == nil {
			err = t.retire(k)
		}
	}
	return err
}

// steps returns when each of n layers was made, as the history says; nil when the
// history is of another number of layers.
func steps(cf *v1.ConfigFile, n int) []time.Time {
	var list []time.Time
	for _, h := range cf.History {
		if !h.EmptyLayer {
			list = append(list, h.Created.Time)
		}
	}
	if len(list) != n {
		return nil
	}
	return list
}
