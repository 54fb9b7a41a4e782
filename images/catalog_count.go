package images

import (
	"crypto/sha256"
	"encoding/hex"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// totals are the counters of everything, kept in bucketMeta.
type totals struct {
	Images      int   `json:"images"`
	Tagged      int   `json:"tagged"`
	Names       int   `json:"names"`
	Layers      int   `json:"layers"`
	Idle        int   `json:"idle"`
	Arriving    int   `json:"arriving"`
	Compressed  int64 `json:"compressed"`
	Expanded    int64 `json:"expanded"`
	Usage       int64 `json:"usage"`
	Shared      int64 `json:"shared"`
	SharedUsage int64 `json:"sharedUsage"`
	Reclaimable int64 `json:"reclaimable"`
}

var totalsKey = []byte("totals")

// total returns the totals, to be changed.
func (t *txn) total() (*totals, error) {
	if t.totals != nil {
		return t.totals, nil
	}
	var sum totals
	if _, err := t.load(bucketMeta, totalsKey, &sum); err != nil {
		return nil, err
	}
	t.totals = &sum
	return t.totals, nil
}

func (t *txn) saveTotals() error {
	if t.totals == nil {
		return nil
	}
	return t.store(bucketMeta, totalsKey, t.totals)
}

// add counts the layer sign times.
func (sum *totals) add(r *layerRecord, sign int64) {
	if r.Images == 0 {
		if r.Idle {
			sum.Idle += int(sign)
		}
		return
	}
	sum.Layers += int(sign)
	sum.Compressed += sign * r.Desc.Size
	if r.Sizes == nil {
		sum.Arriving += int(sign)
		return
	}
	sum.Expanded += sign * r.Sizes.Expanded
	sum.Usage += sign * r.Sizes.Usage
	if r.Images > 1 {
		sum.Shared += sign * r.Sizes.Expanded
		sum.SharedUsage += sign * r.Sizes.Usage
	}
	if r.Named == 0 {
		sum.Reclaimable += sign * r.Sizes.Expanded
	}
}

// changeLayer changes the record of a layer, and with it the totals and the lists
// that it is in. It returns the records before and after.
func (t *txn) changeLayer(key v1.Hash, change func(*layerRecord)) (was, rec layerRecord, err error) {
	if err := t.must(bucketLayers, hashKey(key), &rec); err != nil {
		return was, rec, err
	}
	rec.Key = key
	was = rec
	change(&rec)
	return was, rec, t.putLayerRecord(&was, &rec)
}

func (t *txn) putLayerRecord(was, rec *layerRecord) error {
	sum, err := t.total()
	if err != nil {
		return err
	}
	sum.add(was, -1)
	sum.add(rec, 1)
	spare := func(r *layerRecord) bool { return r.Images > 0 && r.Named == 0 }
	arriving := func(r *layerRecord) bool { return r.Images > 0 && r.Sizes == nil }
	key := hashKey(rec.Key)
	for _, list := range []struct {
		bucket  []byte
		was, is bool
		effect  *map[v1.Hash]bool
	}{
		{bucketHere, was.here(), rec.here(), nil},
		{bucketIdle, was.Idle, rec.Idle, &t.effects.idle},
		{bucketSpare, spare(was), spare(rec), &t.effects.spare},
		{bucketArriving, arriving(was), arriving(rec), nil},
	} {
		if list.was == list.is {
			continue
		}
		if err := t.mark(list.bucket, key, list.is); err != nil {
			return err
		}
		if list.effect == nil {
			continue
		}
		if *list.effect == nil {
			*list.effect = map[v1.Hash]bool{}
		}
		(*list.effect)[rec.Key] = list.is
	}
	return t.store(bucketLayers, key, rec)
}

func (t *txn) changeImage(digest v1.Hash, change func(*imageRecord)) error {
	var rec imageRecord
	if err := t.must(bucketImages, hashKey(digest), &rec); err != nil {
		return err
	}
	change(&rec)
	return t.store(bucketImages, hashKey(digest), rec)
}

// distinct returns the layers of an image, each once.
func (r *imageRecord) distinct() (list []imageLayer) {
	seen := make(map[uint32]bool, len(r.Layers))
	for _, l := range r.Layers {
		if !seen[l.Seq] {
			seen[l.Seq] = true
			list = append(list, l)
		}
	}
	return list
}

// shareChanged tells the one image that has the layer that it shares it now, or
// does so no more.
func (t *txn) shareChanged(rec *layerRecord, sign int64) error {
	if rec.Sizes == nil {
		return nil
	}
	others, err := t.manifests(bucketUsers, seqKey(uint64(rec.Seq)))
	if err != nil || len(others) == 0 {
		return err
	}
	return t.changeImage(others[0], func(im *imageRecord) { im.Shared += sign * rec.Sizes.Expanded })
}

// addImage records an image that has no name yet, unless it is here. Its layers
// have their records. diffIDs are of its layers.
func (t *txn) addImage(digest v1.Hash, rec imageRecord, diffIDs []v1.Hash) error {
	if t.get(bucketImages, hashKey(digest)) != nil {
		return nil
	}
	rec.Size, rec.Unknown, rec.Expanded, rec.Usage, rec.Shared = 0, 0, 0, 0, 0
	for _, l := range rec.distinct() {
		was, is, err := t.changeLayer(l.Key, func(r *layerRecord) { r.Images++; r.Idle = false })
		if err != nil {
			return err
		}
		if was.Images == 1 {
			if err := t.shareChanged(&is, 1); err != nil {
				return err
			}
		}
		if err := t.mark(bucketUsers, userKey(l.Seq, digest), true); err != nil {
			return err
		}
		rec.Size += is.Desc.Size
		if is.Sizes == nil {
			rec.Unknown++
			continue
		}
		rec.Expanded += is.Sizes.Expanded
		rec.Usage += is.Sizes.Usage
		if is.Images > 1 {
			rec.Shared += is.Sizes.Expanded
		}
	}
	if err := t.mark(bucketIDs, []byte(rec.Config.Hex+"\x00"+digest.String()), true); err != nil {
		return err
	}
	for i, id := range chainIDs(diffIDs) {
		c := chainRecord{Depth: i + 1, Whole: i+1 == len(diffIDs)}
		if i < len(rec.Steps) {
			c.Created = rec.Steps[i]
		}
		if err := t.store(bucketChains, chainKey(id, digest), c); err != nil {
			return err
		}
	}
	sum, err := t.total()
	if err != nil {
		return err
	}
	sum.Images++
	return t.store(bucketImages, hashKey(digest), rec)
}

// deleteImage takes an image away that has no name. Its layers stay, and are idle
// when no other image has them.
func (t *txn) deleteImage(digest v1.Hash) error {
	var rec imageRecord
	if err := t.must(bucketImages, hashKey(digest), &rec); err != nil {
		return err
	}
	diffIDs := map[uint32]v1.Hash{}
	for _, l := range rec.distinct() {
		if err := t.mark(bucketUsers, userKey(l.Seq, digest), false); err != nil {
			return err
		}
		was, is, err := t.changeLayer(l.Key, func(r *layerRecord) { r.Images--; r.Idle = r.Images == 0 })
		if err != nil {
			return err
		}
		diffIDs[l.Seq] = is.DiffID
		if was.Images == 2 {
			if err := t.shareChanged(&is, -1); err != nil {
				return err
			}
		}
	}
	var stack []v1.Hash
	for _, l := range rec.Layers {
		stack = append(stack, diffIDs[l.Seq])
	}
	for _, id := range chainIDs(stack) {
		if err := t.Bucket(bucketChains).Delete(chainKey(id, digest)); err != nil {
			return err
		}
		if err := t.retireSpecial(Name{ChainsDir, id.Hex}, digest); err != nil {
			return err
		}
	}
	if err := t.clearDangling(digest, rec.Config); err != nil {
		return err
	}
	if err := t.mark(bucketIDs, []byte(rec.Config.Hex+"\x00"+digest.String()), false); err != nil {
		return err
	}
	if err := t.Bucket(bucketImages).Delete(hashKey(digest)); err != nil {
		return err
	}
	sum, err := t.total()
	if err != nil {
		return err
	}
	sum.Images--
	e := &t.effects
	t.orphan(digest)
	keys := make([]v1.Hash, len(rec.Layers))
	for i, l := range rec.Layers {
		keys[i] = l.Key
	}
	e.stacks = append(e.stacks, keys)
	if t.first(bucketIDs, []byte(rec.Config.Hex+"\x00")) == nil {
		e.Deleted = append(e.Deleted, rec.Config)
		t.orphan(rec.Config)
	}
	e.lines = append(e.lines, journalLine{Op: journalDeleted, Image: digest, Time: now()})
	return nil
}

// orphan notes that a blob is of no more use, unless it is an image's manifest or
// config: a manifest may name whatever it likes as its config.
func (t *txn) orphan(h v1.Hash) {
	if t.get(bucketImages, hashKey(h)) == nil && t.first(bucketIDs, []byte(h.Hex+"\x00")) == nil {
		t.effects.orphan = append(t.effects.orphan, h)
	}
}

// setNamed counts the layers of an image that got its first name, or lost its last.
func (t *txn) setNamed(digest v1.Hash, named bool) error {
	var rec imageRecord
	if err := t.must(bucketImages, hashKey(digest), &rec); err != nil {
		return err
	}
	sign := -1
	if named {
		sign = 1
	}
	for _, l := range rec.distinct() {
		if _, _, err := t.changeLayer(l.Key, func(r *layerRecord) { r.Named += sign }); err != nil {
			return err
		}
	}
	sum, err := t.total()
	if err != nil {
		return err
	}
	sum.Tagged += sign
	return nil
}

// setSizes records what layers amount to, once they were compiled.
func (c *catalog) setSizes(sizes map[v1.Hash]layerSizes) error {
	_, err := c.write(func(t *txn) error {
		changed := false
		for key, size := range sizes {
			rec, ok, err := t.layer(key)
			if err != nil {
				return err
			}
			if !ok || rec.Sizes != nil && *rec.Sizes == size {
				continue
			}
			changed = true
			if err := t.setSize(key, size); err != nil {
				return err
			}
		}
		if !changed {
			return errUnchanged
		}
		return nil
	})
	return err
}

func (t *txn) setSize(key v1.Hash, size layerSizes) error {
	was, is, err := t.changeLayer(key, func(r *layerRecord) { r.Sizes = &size })
	if err != nil {
		return err
	}
	images, err := t.manifests(bucketUsers, seqKey(uint64(is.Seq)))
	if err != nil {
		return err
	}
	for _, digest := range images {
		err := t.changeImage(digest, func(im *imageRecord) {
			old := layerSizes{}
			if was.Sizes == nil {
				im.Unknown--
			} else {
				old = *was.Sizes
			}
			im.Expanded += size.Expanded - old.Expanded
			im.Usage += size.Usage - old.Usage
			if is.Images > 1 {
				im.Shared += size.Expanded - old.Expanded
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// chainIDs returns the chain IDs of a stack of layers, lowest first, as
// https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid
// has them: the first is the lowest diffID, each other the digest of the one
// below it, a space, and its own diffID.
func chainIDs(diffIDs []v1.Hash) []v1.Hash {
	ids := make([]v1.Hash, len(diffIDs))
	for i, d := range diffIDs {
		if i == 0 {
			ids[i] = d
			continue
		}
		sum := sha256.Sum256([]byte(ids[i-1].String() + " " + d.String()))
		ids[i] = v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
	}
	return ids
}

func chainKey(id, image v1.Hash) []byte { return []byte(id.Hex + "\x00" + image.String()) }

func now() time.Time { return time.Now().UTC() }
