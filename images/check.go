package images

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/fetch"
	"github.com/imgfs/imgfs/unionfs"
)

// Finding is something that Check found.
type Finding struct {
	Kind     string // "blob", "index", "tree", "pack", "catalogue"
	Object   string // its digest, or its name
	Problem  string
	Repaired bool
}

// Checked counts what Check looked at.
type Checked struct{ Blobs, Indexes, Trees, Packs, Chunks, Names int }

// Check verifies every blob, index, tree and cached chunk against its digest or
// checksums, and the counters of the catalogue against a count. With repair, what
// is damaged is removed, so that its next use fetches or makes it again, and
// counters are set right. It calls report for each finding, one at a time. A
// catalogue that cannot be read is a finding too: it is made again when the store
// is opened the next time. The first Check reports what Open has made again.
//
// It works beside everything else, and reads all that is on this disk, without
// counting that as a use. The error is ctx's, or that of the catalogue.
func (s *Store) Check(ctx context.Context, repair bool, report func(Finding)) (Checked, error) {
	c := &checker{s: s, repair: repair, report: func(f Finding) {
		f.Object, f.Problem = printable(f.Object, maxFound), printable(f.Problem, 4*maxFound)
		report(f)
	}}
	var errs []error
	s.mu.Lock()
	rebuilt := s.rebuilt
	s.rebuilt = nil
	s.mu.Unlock()
	if rebuilt != nil {
		c.report(Finding{Kind: "catalogue", Object: c.catalogueName(), Problem: rebuilt.Error(), Repaired: true})
	}
	defer func() { c.suspect(s.cat.damage()) }()
	for _, part := range []func(context.Context) error{c.blobs, c.indexes, c.trees, c.packs, c.catalogue} {
		if err := ctx.Err(); err != nil {
			return c.Checked, err
		}
		if err := part(ctx); err != nil && !c.suspect(err) {
			errs = append(errs, err)
		}
	}
	return c.Checked, errors.Join(errs...)
}

type checker struct {
	Checked
	s      *Store
	repair bool
	report func(Finding)
	told   bool // that the catalogue is damaged
}

func (c *checker) catalogueName() string { return filepath.Base(c.s.cache.CatalogPath()) }

// maxFound bounds the bytes of an object in a Finding, and of a value in its problem.
const maxFound = 200

// printable is s without what a terminal would obey, in at most limit bytes.
func printable(s string, limit int) string {
	const more = "…"
	var b strings.Builder
	fits := 0 // bytes after which more has room
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		part := s[:n]
		if r == utf8.RuneError && n == 1 || !strconv.IsPrint(r) {
			part = strings.Trim(strconv.Quote(part), `"`)
		}
		if b.Len()+len(part) > limit {
			return b.String()[:fits] + more
		}
		b.WriteString(part)
		if b.Len()+len(more) <= limit {
			fits = b.Len()
		}
		s = s[n:]
	}
	return b.String()
}

// suspect reports, once, that the catalogue is damaged, if err says so.
func (c *checker) suspect(err error) bool {
	if !errors.Is(err, errDamaged) {
		return false
	}
	if !c.told {
		c.told = true
		why, _, _ := strings.Cut(err.Error(), "\n") // without the stack
		c.report(Finding{Kind: "catalogue", Object: c.catalogueName(), Problem: why + "; it is rebuilt at the next start"})
	}
	return true
}

// found reports damage, after repairing it if that is asked for.
func (c *checker) found(kind, object string, problem error, repair func() error) {
	f := Finding{Kind: kind, Object: object, Problem: problem.Error()}
	if c.repair {
		err := repair()
		f.Repaired = err == nil
		if err != nil {
			f.Problem += fmt.Sprintf("; not repaired: %v", err)
		}
	}
	c.report(f)
}

// each calls f for the installed files of a kind. What is removed meanwhile is no
// finding: f answers fs.ErrNotExist.
func (c *checker) each(ctx context.Context, kind cache.Kind, n *int, f func(v1.Hash) error) error {
	return c.s.cache.Each(kind, func(h v1.Hash) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := f(h)
		if errors.Is(err, iofs.ErrNotExist) {
			return nil
		}
		*n++
		if c.suspect(err) { // the others can be checked
			return nil
		}
		return err
	})
}

// elsewhere reports whether err says nothing about the file that was to be
// checked: the system has no descriptor or memory left, or the catalogue is damaged.
func elsewhere(err error) bool {
	for _, of := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EINTR, errDamaged} {
		if errors.Is(err, of) {
			return true
		}
	}
	return false
}

func (c *checker) blobs(ctx context.Context) error {
	return c.each(ctx, cache.Blob, &c.Blobs, func(h v1.Hash) error {
		err := c.s.cache.VerifyBlob(h)
		if err == nil || errors.Is(err, iofs.ErrNotExist) || elsewhere(err) {
			return err
		}
		c.found("blob", h.String(), err, func() error { return c.s.cache.Remove(cache.Blob, h) })
		return nil
	})
}

func (c *checker) indexes(ctx context.Context) error {
	return c.each(ctx, cache.Index, &c.Indexes, func(h v1.Hash) error {
		err := c.index(h)
		if err == nil || errors.Is(err, iofs.ErrNotExist) || elsewhere(err) {
			return err
		}
		c.found("index", h.String(), err, func() error { return c.s.remakeIndex(h, err) })
		return nil
	})
}

// index verifies an index through a mapping of its own, and that it is of a layer
// that is known.
func (c *checker) index(h v1.Hash) error {
	rec, ok, err := c.s.cat.layerKeyed(h)
	if err != nil {
		return err
	}
	if !ok {
		return errors.New("images: no image ever had the layer")
	}
	idx, err := unionfs.Open(c.s.cache.Path(cache.Index, h))
	if err != nil {
		return err
	}
	defer idx.Close()
	if idx.Meta().Blob != rawDigest(rec.Desc.Digest) {
		return fmt.Errorf("images: it is of another blob: %w", unionfs.ErrDamaged)
	}
	return idx.Verify()
}

// layerKeyed returns the record of the layer with this key, in use or not.
func (c *catalog) layerKeyed(key v1.Hash) (rec layerRecord, ok bool, err error) {
	err = c.read(func(t *txn) error {
		rec, ok, err = t.layer(key)
		return err
	})
	return rec, ok, err
}

// remakeIndex removes the index of a layer, and closes the layer and the images
// that show it: their next use makes it again.
func (s *Store) remakeIndex(key v1.Hash, why error) error {
	s.mu.Lock()
	var layers []*layer
	for _, l := range s.layers {
		if l.key() == key {
			layers = append(layers, l)
		}
	}
	var images []*image
	for _, im := range s.images {
		if slices.ContainsFunc(im.layers, func(l *layer) bool { return l.key() == key }) {
			images = append(images, im)
		}
	}
	delete(s.formats, key)
	s.mu.Unlock()
	for _, l := range layers {
		if st := l.state.Load(); st != nil && st.idx != nil {
			l.damaged(st, why)
		}
	}
	for _, im := range images {
		if st := im.state.Load(); st != nil && st.tree != nil {
			im.damaged(st, why)
		}
	}
	return s.cache.Remove(cache.Index, key)
}

func (c *checker) trees(ctx context.Context) error {
	here := map[v1.Hash]imageKey{} // which image each tree is of
	c.s.cache.Each(cache.Tree, func(h v1.Hash) error {
		here[h] = imageKey{}
		return nil
	})
	err := c.s.cat.read(func(t *txn) error {
		t.ctx = ctx
		return t.scan(bucketImages, nil, func(k, v []byte) error {
			var rec imageRecord
			digest, err := v1.NewHash(string(k))
			if err == nil {
				err = decode(bucketImages, k, v, &rec)
			}
			if err != nil {
				return err
			}
			var stack []v1.Hash
			for i, il := range rec.Layers {
				stack = append(stack, il.Key)
				if key := treeKey(stack); here[key] == (imageKey{}) {
					if _, ok := here[key]; ok {
						here[key] = imageKey{digest, i + 1}
					}
				}
			}
			return nil
		})
	})
	if err != nil && !c.suspect(err) {
		return err
	}
	return c.each(ctx, cache.Tree, &c.Trees, func(h v1.Hash) error {
		err := c.tree(h, here[h])
		if err == nil || errors.Is(err, iofs.ErrNotExist) || elsewhere(err) {
			return err
		}
		c.found("tree", h.String(), err, func() error { return c.s.remakeTree(h, err) })
		return nil
	})
}

// tree verifies a tree, with the indexes of the image that it is of when they are
// all here.
func (c *checker) tree(h v1.Hash, of imageKey) error {
	path := c.s.cache.Path(cache.Tree, h)
	rec, ok, err := c.s.cat.image(of.digest)
	if err != nil {
		return err
	}
	if !ok || len(rec.Layers) < of.depth {
		return unionfs.VerifyTree(path)
	}
	var indexes []*unionfs.Index
	defer func() {
		for _, idx := range indexes {
			idx.Close()
		}
	}()
	for _, il := range rec.Layers[:of.depth] {
		idx, err := unionfs.Open(c.s.cache.Path(cache.Index, il.Key))
		if err != nil { // missing, or a finding of its own
			return unionfs.VerifyTree(path)
		}
		indexes = append(indexes, idx)
	}
	tree, err := unionfs.OpenTree(path, indexes)
	if err != nil {
		return err
	}
	defer tree.Close()
	return tree.Verify()
}

// remakeTree removes a tree and closes the images that it is of.
func (s *Store) remakeTree(key v1.Hash, why error) error {
	s.mu.Lock()
	var images []*image
	for _, im := range s.images {
		if im.treeKey() == key {
			images = append(images, im)
		}
	}
	s.mu.Unlock()
	for _, im := range images {
		if st := im.state.Load(); st != nil && st.tree != nil {
			im.damaged(st, why)
		}
	}
	return s.cache.Remove(cache.Tree, key)
}

func (c *checker) packs(ctx context.Context) error {
	for key := range c.s.cache.Packs() {
		if err := ctx.Err(); err != nil {
			return err
		}
		rec, ok, err := c.s.cat.layerKeyed(key)
		if c.suspect(err) {
			continue
		}
		if err != nil {
			return err
		}
		if !ok {
			c.found("pack", key.String(), errors.New("images: no image ever had the layer"), func() error {
				_, err := c.s.cache.ClearPack(key)
				return err
			})
			continue
		}
		if err := c.pack(ctx, key, rec); err != nil {
			return err
		}
	}
	return nil
}

// pack verifies what is here of a layer's contents. Without the layer's index
// nobody can tell, nor read it.
func (c *checker) pack(ctx context.Context, key v1.Hash, rec layerRecord) error {
	idx, err := unionfs.Open(c.s.cache.Path(cache.Index, key))
	if err != nil {
		return nil
	}
	defer idx.Close()
	if idx.Meta().Blob != rawDigest(rec.Desc.Digest) {
		return nil
	}
	pack, err := c.s.cache.Pack(key)
	if err != nil {
		return err
	}
	defer pack.Close()
	c.Packs++
	n, err := fetch.CheckPack(ctx, idx, pack, func(chunk uint32, problem error) {
		c.found("pack", key.String(), problem, func() error { return pack.Drop(chunk, 1) })
	})
	c.Chunks += n
	if errors.Is(err, unionfs.ErrDamaged) {
		return nil // a finding of its own
	}
	return err
}

func (c *checker) catalogue(ctx context.Context) (err error) {
	var found []Finding
	c.Names, err = c.s.cat.check(ctx, c.repair, func(object, problem string) {
		f := Finding{Kind: "catalogue", Object: printable(object, maxFound), Problem: problem}
		if !c.repair {
			c.report(f)
			return
		}
		found = append(found, f)
	})
	for _, f := range found {
		f.Repaired = err == nil // all of it, or nothing
		c.report(f)
	}
	return err
}
