package images

import (
	"bytes"
	"fmt"
	iofs "io/fs"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/cache"
)

// List returns all images that are here: first those with a name, by name, then
// the dangling ones. Those named by digest only are included, with a tag that
// begins with "@".
func (s *Store) List() (list []Info, err error) {
	err = s.cat.read(func(t *txn) error {
		images := map[v1.Hash]imageRecord{}
		image := func(digest v1.Hash) (im imageRecord, err error) {
			im, ok := images[digest]
			if !ok {
				err = t.must(bucketImages, hashKey(digest), &im)
				images[digest] = im
			}
			return im, err
		}
		err := t.scan(bucketNames, nil, func(k, v []byte) error {
			var rec nameRecord
			if err := decode(bucketNames, k, v, &rec); err != nil {
				return err
			}
			im, err := image(rec.Image)
			list = append(list, s.info(parseKey(k), rec, &im))
			return err
		})
		if err != nil {
			return err
		}
		return t.scan(bucketDangling, nil, func(k, v []byte) error {
			digest, err := v1.NewHash(string(k))
			if err != nil {
				return err
			}
			var d danglingRecord
			if err := decode(bucketDangling, k, v, &d); err != nil {
				return err
			}
			im, err := image(digest)
			list = append(list, s.danglingInfo(digest, d, &im))
			return err
		})
	})
	return list, err
}

// IDs returns the IDs of all images that are here, and Dangling those of the
// images that no name stands for, both sorted.
func (s *Store) IDs() (ids []v1.Hash, err error) {
	err = s.cat.read(func(t *txn) error {
		return t.scan(bucketIDs, nil, func(k, _ []byte) error {
			hex, _, _ := bytes.Cut(k, []byte{0})
			if n := len(ids); n == 0 || ids[n-1].Hex != string(hex) {
				ids = append(ids, v1.Hash{Algorithm: "sha256", Hex: string(hex)})
			}
			return nil
		})
	})
	return ids, err
}

// Dangling is described at IDs. Its cost grows with what it returns.
func (s *Store) Dangling() (ids []v1.Hash, err error) {
	err = s.cat.read(func(t *txn) error {
		return t.scan(bucketDangling, nil, func(k, _ []byte) error {
			var im imageRecord
			err := t.must(bucketImages, k, &im)
			ids = append(ids, im.Config)
			return err
		})
	})
	slices.SortFunc(ids, func(a, b v1.Hash) int { return strings.Compare(a.Hex, b.Hex) })
	return slices.Compact(ids), err
}

// Image returns the Info of one name. n may also be {".imgfs/dangling", ID}. The
// error is fs.ErrNotExist when it is not here.
func (s *Store) Image(n Name) (info Info, err error) {
	err = s.cat.read(func(t *txn) error {
		var im imageRecord
		if n.Repo == DanglingDir {
			digest, _, err := t.specialImage(n)
			if err != nil {
				return err
			}
			var d danglingRecord
			if err := t.must(bucketDangling, hashKey(digest), &d); err != nil {
				return err
			}
			err = t.must(bucketImages, hashKey(digest), &im)
			info = s.danglingInfo(digest, d, &im)
			return err
		}
		rec, ok, err := t.lookup(n)
		if err == nil && !ok {
			err = notHere("describing", n)
		}
		if err != nil {
			return err
		}
		err = t.must(bucketImages, hashKey(rec.Image), &im)
		info = s.info(n, rec, &im)
		return err
	})
	return info, err
}

func (s *Store) danglingInfo(digest v1.Hash, d danglingRecord, im *imageRecord) Info {
	info := s.info(Name{DanglingDir, im.Config.Hex}, nameRecord{Image: digest, Top: d.Top, Time: d.Time}, im)
	info.Dangling = true
	return info
}

func (s *Store) info(n Name, rec nameRecord, im *imageRecord) Info {
	return Info{Name: n, Digest: rec.Image, Top: rec.Top, ID: im.Config, Created: im.Created, Pulled: rec.Time,
		Layers: len(im.Layers), Platform: im.Platform, Sizes: s.sizes(im)}
}

// sizes returns the sizes of an image, from its counters and the cache's.
func (s *Store) sizes(im *imageRecord) Sizes {
	z := Sizes{Compressed: im.Size, Expanded: im.Expanded, Usage: im.Usage, Shared: im.Shared, Unique: im.Expanded - im.Shared}
	if im.Unknown > 0 {
		z.Expanded, z.Usage, z.Shared, z.Unique = -1, -1, -1, -1
	}
	for _, l := range im.distinct() {
		z.Cached += s.storedOf(l.Key)
	}
	return z
}

// Totals returns the counters.
func (s *Store) Totals() (Totals, error) {
	var sum *totals
	err := s.cat.read(func(t *txn) (err error) {
		sum, err = t.total()
		return err
	})
	if err != nil {
		return Totals{}, err
	}
	out := Totals{Images: sum.Images, Tagged: sum.Tagged, Dangling: sum.Images - sum.Tagged, Names: sum.Names,
		Layers: sum.Layers, Idle: sum.Idle, Arriving: sum.Arriving,
		Sizes: Sizes{Compressed: sum.Compressed, Expanded: sum.Expanded, Usage: sum.Usage, Shared: sum.Shared,
			Unique: sum.Expanded - sum.Shared},
		SharedUsage: sum.SharedUsage, Reclaimable: sum.Reclaimable}
	if s.cache == nil {
		return out, nil // tests of the catalogue alone
	}
	u := s.cache.Usage()
	out.Cached, out.CacheLimit, out.CacheFree = u.Used, u.Limit, u.Free
	out.ReclaimableCached = s.cache.IdleUsed()
	s.mu.Lock()
	spare := make([]v1.Hash, 0, len(s.spare))
	for key := range s.spare {
		spare = append(spare, key)
	}
	s.mu.Unlock()
	for _, key := range spare {
		out.ReclaimableCached += s.storedOf(key)
	}
	return out, nil
}

// maxCandidates bounds the IDs that a message about an ambiguous one names.
const maxCandidates = 4

// findID is Store.FindID.
func (c *catalog) findID(prefix string) (found ImageID, err error) {
	want := strings.TrimPrefix(prefix, "sha256:")
	if !prefixRE.MatchString(want) {
		return found, fmt.Errorf("images: no image has the ID %q: %w", prefix, iofs.ErrNotExist)
	}
	err = c.read(func(t *txn) error {
		var ids []string
		cur := t.Bucket(bucketIDs).Cursor()
		for from := []byte(want); len(ids) <= maxCandidates; from = []byte(ids[len(ids)-1] + "\x01") {
			t.c.reads.Add(1)
			k, _ := cur.Seek(from)
			id, _, ok := bytes.Cut(k, []byte{0})
			if !ok || !bytes.HasPrefix(id, []byte(want)) {
				break
			}
			ids = append(ids, string(id))
		}
		switch {
		case len(ids) == 0:
			return fmt.Errorf("images: no image has the ID %q: %w", prefix, iofs.ErrNotExist)
		case len(ids) > 1:
			more := ""
			if len(ids) > maxCandidates {
				ids, more = ids[:maxCandidates], ", …"
			}
			return fmt.Errorf("images: the ID %q: %w, it can be %s%s: %w", prefix, ErrAmbiguous, strings.Join(ids, ", "), more, iofs.ErrNotExist)
		}
		found.ID = v1.Hash{Algorithm: "sha256", Hex: ids[0]}
		list, err := t.withID(found.ID)
		if err != nil {
			return err
		}
		var unnamed []v1.Hash
		for _, digest := range list {
			names := t.namesOf(digest)
			if len(names) == 0 {
				unnamed = append(unnamed, digest)
				continue
			}
			found.Manifests = append(found.Manifests, digest)
			found.Names = append(found.Names, names...)
		}
		found.Manifests = append(found.Manifests, unnamed...)
		slices.SortFunc(found.Names, func(a, b Name) int { return bytes.Compare(a.key(), b.key()) })
		return nil
	})
	return found, err
}

// Chains returns all chains, by ID.
func (s *Store) Chains() (list []Chain, err error) {
	err = s.cat.read(func(t *txn) (err error) {
		list, err = t.chains(nil)
		return err
	})
	return list, err
}

// Chain returns one of them.
func (s *Store) Chain(id v1.Hash) (c Chain, ok bool, err error) {
	err = s.cat.read(func(t *txn) error {
		list, err := t.chains([]byte(id.Hex + "\x00"))
		if len(list) > 0 {
			c, ok = list[0], true
		}
		return err
	})
	return c, ok, err
}

func (t *txn) chains(prefix []byte) (list []Chain, err error) {
	err = t.scan(bucketChains, prefix, func(k, v []byte) error {
		var rec chainRecord
		if err := decode(bucketChains, k, v, &rec); err != nil {
			return err
		}
		id, image, _ := bytes.Cut(k, []byte{0})
		digest, err := v1.NewHash(string(image))
		if err != nil {
			return err
		}
		if len(list) == 0 || list[len(list)-1].ID.Hex != string(id) {
			list = append(list, Chain{ID: v1.Hash{Algorithm: "sha256", Hex: string(id)}, Layers: rec.Depth})
		}
		c := &list[len(list)-1]
		c.Images = append(c.Images, digest)
		c.Whole = c.Whole || rec.Whole
		if c.Created.IsZero() {
			c.Created = rec.Created
		}
		return nil
	})
	return list, err
}

// catalogApplied tells the rest of the store what a transaction has done. It is
// called in the order of the transactions.
func (s *Store) catalogApplied(e *effects) {
	for key, idle := range e.idle {
		s.cache.SetIdle(key, idle)
	}
	s.mu.Lock()
	for key, is := range e.spare {
		if is {
			s.spare[key] = true
		} else {
			delete(s.spare, key)
		}
	}
	s.moves += len(e.moved)
	for seq, n := range e.moved {
		if v := s.views[seq]; v != nil {
			v.setName(n)
		}
	}
	s.mu.Unlock()
	for _, h := range e.orphan {
		if err := s.cache.Remove(cache.Blob, h); err != nil {
			s.log.Warn("removing a blob", "digest", h.String(), "err", err)
		}
	}
	for _, stack := range e.stacks {
		s.dropTrees(stack)
	}
}

// settleCatalog brings the store and its catalogue together when they are opened:
// the sizes of layers that were compiled before their sizes were recorded, what
// the cache should evict first.
func (s *Store) settleCatalog() error {
	for bucket, f := range map[string]func(v1.Hash){
		string(bucketIdle):  func(key v1.Hash) { s.cache.SetIdle(key, true) },
		string(bucketSpare): func(key v1.Hash) { s.spare[key] = true },
	} {
		keys, err := s.cat.keys([]byte(bucket))
		if err != nil {
			return err
		}
		for _, key := range keys {
			f(key)
		}
	}
	if err := s.idlePacks(); err != nil {
		return err
	}
	keys, err := s.cat.keys(bucketArriving)
	if err != nil || len(keys) == 0 {
		return err
	}
	sizes := map[v1.Hash]layerSizes{}
	for _, key := range keys {
		rec, ok, err := s.cat.layerHere(key)
		if err != nil || !ok {
			continue
		}
		if z, ok := indexedSizes(s.cache.Path(cache.Index, key), rec.Desc.Digest); ok {
			sizes[key] = z
		}
	}
	return s.cat.setSizes(sizes)
}

// storedOf is how many bytes of a layer's content are on this disk.
func (s *Store) storedOf(key v1.Hash) int64 {
	if s.cache == nil {
		return 0
	}
	return s.cache.StoredOf(key)
}
