package images

import (
	"cmp"
	"fmt"
	iofs "io/fs"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// pulled is what a pull brought: the image, and where it came from.
type pulled struct {
	top, digest v1.Hash
	image       imageRecord
	diffIDs     []v1.Hash // of image.Layers
	repo        string
	update      bool         // the name must be here
	blobs       func() error // keeps the blobs; called when no removal can be under way
}

// putLayers records the layers of p, and gives sequences to those that are new.
// They are idle until put.
func (c *catalog) putLayers(p *pulled) error {
	_, err := c.write(func(t *txn) error { return t.putLayers(p) })
	return err
}

func (t *txn) putLayers(p *pulled) error {
	result := errUnchanged
	for i := range p.image.Layers {
		l := &p.image.Layers[i]
		rec, changed, err := t.putLayer(l.Desc, p.diffIDs[i], p.repo)
		if err != nil {
			return err
		}
		l.Seq, l.Key = rec.Seq, rec.Key
		if changed {
			result = nil
		}
	}
	return result
}

// putLayer records a layer. What an image says of it, its size and its diffID, is
// proved when the layer arrives, not before. So an image that says something else
// than an earlier one gets a layer of its own: one of them is wrong, and must not
// stand in the way of the other.
func (t *txn) putLayer(desc v1.Descriptor, diffID v1.Hash, repo string) (rec layerRecord, changed bool, err error) {
	rec, ok, err := t.layer(layerKey(desc))
	if err == nil && ok && (rec.Desc.Size != desc.Size || rec.DiffID != diffID) {
		rec, ok, err = t.layer(sha256Hash(fmt.Appendf(nil, "%s %d %s", rec.Key, desc.Size, diffID)))
	}
	if err != nil {
		return rec, false, err
	}
	if !ok {
		seq, err := t.next("layer", maxSeq)
		if err != nil {
			return rec, false, err
		}
		rec = layerRecord{Seq: uint32(seq), Key: rec.Key, Desc: desc, DiffID: diffID}
		if err := t.Bucket(bucketLayer).Put(seqKey(seq), hashKey(rec.Key)); err != nil {
			return rec, false, err
		}
	}
	was := rec
	if repo != "" {
		rec.Repos = []string{repo}
		for _, r := range was.Repos {
			if r != repo && len(rec.Repos) < maxRepos {
				rec.Repos = append(rec.Repos, r)
			}
		}
	}
	rec.Idle = rec.Images == 0
	if ok && was.Idle == rec.Idle && slices.Equal(was.Repos, rec.Repos) {
		return rec, false, nil
	}
	return rec, true, t.putLayerRecord(&was, &rec)
}

// put records what a pull brought under n. The layers have their sequences; the
// view gets its own here.
func (c *catalog) put(n Name, p pulled) (Change, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.blobs != nil {
		if err := p.blobs(); err != nil {
			return Change{}, err
		}
	}
	return c.writeLocked(func(t *txn) error {
		if p.update && t.get(bucketNames, n.key()) == nil {
			return notHere("asking again for", n)
		}
		if err := t.addImage(p.digest, p.image, p.diffIDs); err != nil {
			return err
		}
		return t.name(n, nameRecord{Image: p.digest, Top: p.top, Time: now()})
	})
}

func notHere(doing string, n Name) error {
	return fmt.Errorf("images: %s %q: %w", doing, n, iofs.ErrNotExist)
}

// name makes n stand for an image that is here. The image that it stood for, if
// that was its last name, is dangling.
func (t *txn) name(n Name, rec nameRecord) error {
	old, ok, err := t.lookup(n)
	if err != nil {
		return err
	}
	t.effects.Image = rec.Image
	if ok && old.Image != rec.Image {
		if err := t.unname(n, old, true); err != nil {
			return err
		}
		if err := t.dangle(n, old); err != nil {
			return err
		}
	}
	if !ok || old.Image != rec.Image {
		if err := t.use(n, rec.Image); err != nil {
			return err
		}
	}
	if err := t.putName(n, rec); err != nil {
		return err
	}
	_, err = t.putView(n, rec.Image, 0)
	return err
}

// lookup returns what n stands for.
func (t *txn) lookup(n Name) (rec nameRecord, ok bool, err error) {
	ok, err = t.load(bucketNames, n.key(), &rec)
	return rec, ok, err
}

// putName stores the record of a name that bucketUses has.
func (t *txn) putName(n Name, rec nameRecord) error {
	if err := t.store(bucketNames, n.key(), rec); err != nil {
		return err
	}
	t.effects.lines = append(t.effects.lines, journalLine{Op: journalName, Name: &n, Image: rec.Image, Top: rec.Top, Time: rec.Time})
	return t.Bucket(bucketTombs).Delete(n.key())
}

// use gives image the name n.
func (t *txn) use(n Name, image v1.Hash) error {
	if !t.used(image) {
		if err := t.setNamed(image, true); err != nil {
			return err
		}
		var rec imageRecord
		if err := t.must(bucketImages, hashKey(image), &rec); err != nil {
			return err
		}
		if err := t.clearDangling(image, rec.Config); err != nil {
			return err
		}
	}
	sum, err := t.total()
	if err != nil {
		return err
	}
	sum.Names++
	return t.mark(bucketUses, useKey(image, n), true)
}

// unname takes n from the image that it stands for. The image may be left without
// a name: it is the caller's to say what becomes of it.
func (t *txn) unname(n Name, rec nameRecord, retire bool) error {
	if err := t.Bucket(bucketNames).Delete(n.key()); err != nil {
		return err
	}
	if err := t.mark(bucketUses, useKey(rec.Image, n), false); err != nil {
		return err
	}
	sum, err := t.total()
	if err != nil {
		return err
	}
	sum.Names--
	t.effects.Untagged = append(t.effects.Untagged, n)
	if retire {
		if err := t.retire(viewKey(rec.Image, n)); err != nil {
			return err
		}
	}
	if t.used(rec.Image) {
		return nil
	}
	return t.setNamed(rec.Image, false)
}

// bury remembers that n was removed.
func (t *txn) bury(n Name) error {
	at := now()
	t.effects.lines = append(t.effects.lines, journalLine{Op: journalGone, Name: &n, Time: at})
	return t.Bucket(bucketTombs).Put(n.key(), []byte(at.Format(timeFormat)))
}

// dangle notes that the image of rec has lost its name n. If it was the last, the
// image is dangling.
func (t *txn) dangle(n Name, rec nameRecord) error {
	if t.used(rec.Image) {
		return nil
	}
	var im imageRecord
	if err := t.must(bucketImages, hashKey(rec.Image), &im); err != nil {
		return err
	}
	d := danglingRecord{Name: n, Top: rec.Top, Time: rec.Time, Lost: now()}
	t.effects.Dangling = append(t.effects.Dangling, im.Config)
	t.effects.lines = append(t.effects.lines, journalLine{Op: journalDangling, Name: &n, Image: rec.Image, Top: d.Top, Time: d.Time, Lost: d.Lost})
	return t.store(bucketDangling, hashKey(rec.Image), d)
}

// clearDangling notes that an image is not dangling any more.
func (t *txn) clearDangling(digest, id v1.Hash) error {
	if t.get(bucketDangling, hashKey(digest)) == nil {
		return nil
	}
	if err := t.retireSpecial(Name{DanglingDir, id.Hex}, digest); err != nil {
		return err
	}
	return t.Bucket(bucketDangling).Delete(hashKey(digest))
}

// untag removes n, and with the last tag of its image in a repository the names
// by digest there.
func (t *txn) untag(n Name, rec nameRecord, retire bool) error {
	if err := t.unname(n, rec, retire); err != nil {
		return err
	}
	if err := t.bury(n); err != nil || n.IsDigest() {
		return err
	}
	var digests []Name
	prefix := useKey(rec.Image, Name{Repo: n.Repo})
	image := len(hashKey(rec.Image)) + 1
	err := t.scan(bucketUses, prefix, func(k, _ []byte) error {
		other := parseKey(k[image:])
		digests = append(digests, other)
		if !other.IsDigest() {
			digests = nil
			return errStop
		}
		return nil
	})
	for _, d := range digests {
		if err == nil {
			err = t.unname(d, rec, true)
		}
		if err == nil {
			err = t.bury(d)
		}
	}
	return err
}

// remove takes n away. The image goes with its last name. Layers stay: what no
// image uses is evicted when there is need. The error is fs.ErrNotExist when n
// is not here. {DanglingDir, ID} is the dangling images with this ID.
func (c *catalog) remove(n Name) (Change, error) {
	return c.write(func(t *txn) error {
		if n.Repo == DanglingDir {
			return t.removeDangling(n)
		}
		rec, ok, err := t.lookup(n)
		if err == nil && !ok {
			err = notHere("removing", n)
		}
		if err != nil {
			return err
		}
		if err := t.untag(n, rec, true); err != nil {
			return err
		}
		if t.used(rec.Image) {
			return nil
		}
		t.orphanTop(rec)
		return t.deleteImage(rec.Image)
	})
}

// orphanTop notes that what the registry answered for rec is of no more use, unless
// it is an image itself.
func (t *txn) orphanTop(rec nameRecord) {
	if rec.Top != rec.Image && rec.Top.Algorithm == "sha256" {
		t.orphan(rec.Top)
	}
}

func (t *txn) removeDangling(n Name) error {
	list, err := t.withID(v1.Hash{Algorithm: "sha256", Hex: n.Tag})
	if err != nil {
		return err
	}
	found := false
	for _, digest := range list {
		if t.get(bucketDangling, hashKey(digest)) == nil {
			continue
		}
		found = true
		if err := t.deleteImage(digest); err != nil {
			return err
		}
	}
	if !found {
		return notHere("removing", n)
	}
	return nil
}

// removeID takes away all images with this ID, with their names.
func (c *catalog) removeID(id v1.Hash) (Change, error) {
	return c.write(func(t *txn) error {
		list, err := t.withID(id)
		if err != nil {
			return err
		}
		if len(list) == 0 {
			return fmt.Errorf("images: removing the image %s: %w", id, iofs.ErrNotExist)
		}
		var tags []string
		names := map[v1.Hash][]Name{}
		for _, digest := range list {
			names[digest] = t.namesOf(digest)
			for _, n := range names[digest] {
				if !n.IsDigest() {
					tags = append(tags, n.String())
				}
			}
		}
		if len(tags) > 1 {
			return fmt.Errorf("images: removing the image %s: %w: it has the names %s", id, ErrConflict, strings.Join(tags, ", "))
		}
		for _, digest := range list {
			for _, n := range names[digest] {
				rec, _, err := t.lookup(n)
				if err == nil {
					err = t.unname(n, rec, true)
				}
				if err == nil {
					err = t.bury(n)
				}
				if err != nil {
					return err
				}
				t.orphanTop(rec)
			}
			if err := t.deleteImage(digest); err != nil {
				return err
			}
		}
		return nil
	})
}

// checkDst reports whether n can be given to an image that is here.
func checkDst(doing string, n Name) error {
	if !n.Valid() || n.IsDigest() {
		return fmt.Errorf("images: %s %q: not a tag: %w", doing, n, iofs.ErrInvalid)
	}
	return nil
}

// tag makes dst stand for an image that is here.
func (c *catalog) tag(manifest v1.Hash, dst Name) (Change, error) {
	if err := checkDst("tagging", dst); err != nil {
		return Change{}, err
	}
	return c.write(func(t *txn) error {
		if t.get(bucketImages, hashKey(manifest)) == nil {
			return fmt.Errorf("images: tagging %s as %q: %w", manifest, dst, iofs.ErrNotExist)
		}
		if old, ok, err := t.lookup(dst); err != nil {
			return err
		} else if ok && old.Image == manifest {
			t.effects.Image = manifest
			return errUnchanged
		}
		rec := nameRecord{Image: manifest, Top: manifest, Time: now()}
		if key := t.first(bucketUses, append(hashKey(manifest), 0)); key != nil {
			if err := t.must(bucketNames, key[len(hashKey(manifest))+1:], &rec); err != nil {
				return err
			}
		} else {
			var d danglingRecord
			if ok, err := t.load(bucketDangling, hashKey(manifest), &d); err != nil {
				return err
			} else if ok {
				rec.Top, rec.Time = d.Top, d.Time
			}
		}
		return t.name(dst, rec)
	})
}

// move makes dst stand for what src stands for, takes src away, and carries its
// view along.
func (c *catalog) move(src, dst Name, replace bool) (Change, error) {
	return c.write(func(t *txn) error {
		rec, ok, err := t.lookup(src)
		if err == nil && !ok {
			err = notHere("moving", src)
		}
		if err != nil {
			return err
		}
		t.effects.Image = rec.Image
		if src == dst {
			return errUnchanged
		}
		if err := checkDst("moving to", dst); err != nil {
			return err
		}
		old, ok, err := t.lookup(dst)
		if err != nil {
			return err
		}
		if ok && !replace {
			return fmt.Errorf("images: moving %q to %q: %w", src, dst, iofs.ErrExist)
		}
		seq, err := t.takeView(src, rec.Image)
		if err != nil {
			return err
		}
		if ok {
			if err := t.unname(dst, old, true); err != nil {
				return err
			}
		}
		if err := t.use(dst, rec.Image); err != nil {
			return err
		}
		if err := t.untag(src, rec, false); err != nil {
			return err
		}
		if err := t.putName(dst, rec); err != nil {
			return err
		}
		if err := t.giveView(seq, dst, rec.Image); err != nil || !ok {
			return err
		}
		if old.Image == rec.Image {
			t.effects.Untagged = slices.DeleteFunc(t.effects.Untagged, func(n Name) bool { return n == dst })
		}
		return t.dangle(dst, old)
	})
}

// exchange swaps what a and b stand for, and their views.
func (c *catalog) exchange(a, b Name) (Change, error) {
	ch, _, err := c.exchangeOnce(a, b, 0)
	return ch, err
}

// exchangeOnce does nothing, and says so, when it was called for that request
// before; 0 is no request.
func (c *catalog) exchangeOnce(a, b Name, request uint64) (ch Change, done bool, err error) {
	ch, err = c.write(func(t *txn) error {
		if done, err = t.once(request); done || err != nil {
			return cmp.Or(err, errUnchanged)
		}
		names := [2]Name{a, b}
		var recs [2]nameRecord
		for i, n := range names {
			var ok bool
			var err error
			if recs[i], ok, err = t.lookup(n); err == nil && !ok {
				err = notHere("exchanging", n)
			}
			if err == nil {
				err = checkDst("exchanging", n)
			}
			if err != nil {
				return err
			}
		}
		t.effects.Image = recs[1].Image
		if a == b {
			return errUnchanged
		}
		var seqs [2]uint32
		for i, n := range names {
			var err error
			if seqs[i], err = t.takeView(n, recs[i].Image); err != nil {
				return err
			}
		}
		for i, n := range names { // each image has as many names after as before
			if err := t.mark(bucketUses, useKey(recs[i].Image, n), false); err != nil {
				return err
			}
		}
		for i, n := range names {
			if err := t.mark(bucketUses, useKey(recs[1-i].Image, n), true); err != nil {
				return err
			}
			if err := t.putName(n, recs[1-i]); err != nil {
				return err
			}
			if err := t.giveView(seqs[1-i], n, recs[1-i].Image); err != nil {
				return err
			}
			if recs[0].Image != recs[1].Image {
				t.effects.Untagged = append(t.effects.Untagged, n)
			}
		}
		return nil
	})
	return ch, done, err
}
