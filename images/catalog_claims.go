package images

import (
	"cmp"
	"fmt"
	iofs "io/fs"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// An image ID and a chain ID are made of diffIDs, the digests of layers that nobody
// compares a layer with which is read by the table of contents inside its blob. So
// images with one such ID may have different files, and a manifest that lies must
// not decide what the ID shows.

// Shown returns the manifest that the image ID id stands for, and its names. Several
// manifests may claim an ID: those whose layers were compared with their diffIDs
// go first, and of these the ones with names. The error is fs.ErrNotExist when no image
// here has the ID, and also ErrAmbiguous when it cannot be told which is right.
func (s *Store) Shown(id v1.Hash) (manifest v1.Hash, names []Name, err error) {
	err = s.cat.read(func(t *txn) error {
		list, err := t.withID(id)
		if err == nil && len(list) == 0 {
			err = fmt.Errorf("images: no image has the ID %s: %w", id, iofs.ErrNotExist)
		}
		if err != nil {
			return err
		}
		slices.SortStableFunc(list, func(a, b v1.Hash) int {
			return cmp.Compare(min(1, len(t.namesOf(b))), min(1, len(t.namesOf(a))))
		})
		manifest, err = t.claimed(id, list, 0)
		names = t.namesOf(manifest)
		return err
	})
	return manifest, names, err
}

// claimed returns which of images, which all say that their first depth layers (all
// layers when 0) have the ID id, is to be shown for it: the first, when these are the
// same layers; else the first whose layers were compared with their diffIDs. The error
// is ErrAmbiguous, and fs.ErrNotExist, when there is none.
func (t *txn) claimed(id v1.Hash, images []v1.Hash, depth int) (v1.Hash, error) {
	if len(images) == 1 {
		return images[0], nil
	}
	var first []imageLayer
	var proven v1.Hash
	agreed := true
	for i, digest := range images {
		var rec imageRecord
		if err := t.must(bucketImages, hashKey(digest), &rec); err != nil {
			return v1.Hash{}, err
		}
		layers := rec.Layers
		if depth > 0 {
			layers = layers[:min(depth, len(layers))]
		}
		if i == 0 {
			first = layers
		}
		agreed = agreed && sameLayers(first, layers)
		if proven == (v1.Hash{}) {
			ok, err := t.compared(layers)
			if err != nil {
				return v1.Hash{}, err
			}
			if ok {
				proven = digest
			}
		}
		if !agreed && proven != (v1.Hash{}) {
			return proven, nil
		}
	}
	if agreed && len(images) > 0 {
		return images[0], nil
	}
	return v1.Hash{}, fmt.Errorf("images: %d images claim the ID %s and have different layers, and which is right cannot be told: %w: %w",
		len(images), id.Hex, ErrAmbiguous, iofs.ErrNotExist)
}

func sameLayers(a, b []imageLayer) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Key != b[i].Key {
			return false
		}
	}
	return true
}

// compared reports whether all of the layers have been compared with their diffIDs:
// they were streamed, to the end.
func (t *txn) compared(layers []imageLayer) (bool, error) {
	for i := range layers {
		rec, ok, err := t.layer(layers[i].Key)
		if err != nil || !ok || rec.Sizes == nil || tocWord(layers[i].Desc) != "" {
			return false, err
		}
	}
	return true, nil
}
