package images

import (
	"fmt"
	iofs "io/fs"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"go.etcd.io/bbolt"
)

// layerHere returns the record of a layer that is here.
func (c *catalog) layerHere(key v1.Hash) (rec layerRecord, ok bool, err error) {
	err = c.db.View(func(tx *bbolt.Tx) error {
		ok, err = load(tx, bucketLayers, []byte(key.String()), &rec)
		rec.Key = key
		return err
	})
	return rec, ok, err
}

// layersHere returns those of all.
func (c *catalog) layersHere() (list []layerRecord, err error) {
	err = c.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketLayers).ForEach(func(k, _ []byte) error {
			var rec layerRecord
			if _, err := load(tx, bucketLayers, k, &rec); err != nil {
				return err
			}
			rec.Key, err = v1.NewHash(string(k))
			list = append(list, rec)
			return err
		})
	})
	return list, err
}

func (r *layerRecord) images() int { return 1 }

func (r *layerRecord) sizes() (expanded, usage int64) {
	if r.Expanded == nil {
		return -1, -1
	}
	return *r.Expanded, -1
}

// dropLayer takes a layer that no image uses from those that are here.
func (c *catalog) dropLayer(key v1.Hash) (layerRecord, error) {
	rec, ok, err := c.layerHere(key)
	if err == nil && !ok {
		err = fmt.Errorf("images: dropping layer %s: %w", key, iofs.ErrNotExist)
	}
	return rec, err
}
