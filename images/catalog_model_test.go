package images

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// agree fails the test when a counter or a list of the catalogue is not what a
// count gives.
func agree(t *testing.T, c *catalog) {
	t.Helper()
	if _, err := c.check(context.Background(), false, func(object, problem string) { t.Errorf("%s: %s", object, problem) }); err != nil {
		t.Fatal(err)
	}
}

// model is what names mean, in the simplest way: an image has an ID, and is here
// as long as it has a name or is dangling.
type model struct {
	names    map[Name]v1.Hash
	dangling map[v1.Hash]bool
	tombs    map[Name]bool
	known    map[v1.Hash]pulled // images that were ever here
	layers   map[v1.Hash]bool   // layers that were, and were not dropped
}

func newModel() *model {
	return &model{names: map[Name]v1.Hash{}, dangling: map[v1.Hash]bool{}, tombs: map[Name]bool{}, known: map[v1.Hash]pulled{},
		layers: map[v1.Hash]bool{}}
}

func (m *model) namesOf(image v1.Hash) (list []Name) {
	for n, h := range m.names {
		if h == image {
			list = append(list, n)
		}
	}
	return list
}

func (m *model) here(image v1.Hash) bool { return m.dangling[image] || len(m.namesOf(image)) > 0 }

func (m *model) set(n Name, image v1.Hash) {
	old, ok := m.names[n]
	m.names[n] = image
	delete(m.tombs, n)
	delete(m.dangling, image)
	if ok && !m.here(old) {
		m.dangling[old] = true
	}
}

func (m *model) bury(n Name) {
	image := m.names[n]
	delete(m.names, n)
	m.tombs[n] = true
	if n.IsDigest() {
		return
	}
	for _, o := range m.namesOf(image) {
		if o.Repo == n.Repo && !o.IsDigest() {
			return
		}
	}
	for _, o := range m.namesOf(image) {
		if o.Repo == n.Repo {
			delete(m.names, o)
			m.tombs[o] = true
		}
	}
}

// idle is how many layers no image has.
func (m *model) idle() int {
	idle := maps.Clone(m.layers)
	for h, p := range m.known {
		if !m.here(h) {
			continue
		}
		for _, l := range p.image.Layers {
			delete(idle, l.Desc.Digest)
		}
	}
	return len(idle)
}

func (m *model) withID(id v1.Hash) (list []v1.Hash) {
	for h, p := range m.known {
		if p.image.Config == id && m.here(h) {
			list = append(list, h)
		}
	}
	return list
}

// step does one random operation to both, and compares what they say of it.
func (m *model) step(t *testing.T, c *catalog, r *rand.Rand, pool []pulled, names []Name) {
	t.Helper()
	p := pool[r.IntN(len(pool))]
	a, b := names[r.IntN(len(names))], names[r.IntN(len(names))]
	_, hasA := m.names[a]
	imageB, hasB := m.names[b]
	want := func(what string, err, want error) bool {
		t.Helper()
		if !errors.Is(err, want) {
			t.Fatalf("%s = %v, want %v", what, err, want)
		}
		return want == nil
	}
	switch op := r.IntN(9); op {
	case 0, 1, 2:
		if a.IsDigest() {
			a.Tag = "@" + p.digest.String()
		}
		if err := c.putLayers(&p); err != nil {
			t.Fatal(err)
		}
		_, err := c.put(a, p)
		if want("put", err, nil) {
			m.known[p.digest] = p
			for _, l := range p.image.Layers {
				m.layers[l.Desc.Digest] = true
			}
			m.set(a, p.digest)
		}
	case 3:
		var wrong error
		if !hasA {
			wrong = iofs.ErrNotExist
		}
		if _, err := c.remove(a); want(fmt.Sprintf("remove(%v)", a), err, wrong) {
			m.bury(a)
		}
	case 4:
		var wrong error
		switch {
		case b.IsDigest():
			wrong = iofs.ErrInvalid
		case !m.here(p.digest):
			wrong = iofs.ErrNotExist
		}
		if _, err := c.tag(p.digest, b); want("tag", err, wrong) {
			m.set(b, p.digest)
		}
	case 5:
		m.move(c, a, b, r.IntN(2) == 0, want)
	case 6:
		var wrong error
		switch {
		case !hasA:
			wrong = iofs.ErrNotExist
		case a.IsDigest():
			wrong = iofs.ErrInvalid
		case !hasB:
			wrong = iofs.ErrNotExist
		case b.IsDigest():
			wrong = iofs.ErrInvalid
		}
		if _, err := c.exchange(a, b); want("exchange", err, wrong) {
			m.names[a], m.names[b] = imageB, m.names[a]
		}
	case 7:
		m.removeID(c, p.image.Config, want)
	case 8:
		var wrong error = iofs.ErrNotExist
		for _, h := range m.withID(p.image.Config) {
			if m.dangling[h] {
				wrong = nil
			}
		}
		if _, err := c.remove(Name{DanglingDir, p.image.Config.Hex}); want("remove of dangling", err, wrong) {
			for _, h := range m.withID(p.image.Config) {
				delete(m.dangling, h)
			}
		}
	}
}

func (m *model) move(c *catalog, a, b Name, replace bool, want func(string, error, error) bool) {
	image, hasA := m.names[a]
	_, hasB := m.names[b]
	var wrong error
	switch {
	case !hasA:
		wrong = iofs.ErrNotExist
	case a == b:
	case b.IsDigest():
		wrong = iofs.ErrInvalid
	case hasB && !replace:
		wrong = iofs.ErrExist
	}
	if _, err := c.move(a, b, replace); want(fmt.Sprintf("move(%v, %v)", a, b), err, wrong) && a != b {
		m.set(b, image)
		m.bury(a)
	}
}

func (m *model) removeID(c *catalog, id v1.Hash, want func(string, error, error) bool) {
	var names []Name
	tags := 0
	list := m.withID(id)
	for _, h := range list {
		for _, n := range m.namesOf(h) {
			names = append(names, n)
			if !n.IsDigest() {
				tags++
			}
		}
	}
	var wrong error
	switch {
	case len(list) == 0:
		wrong = iofs.ErrNotExist
	case tags > 1:
		wrong = ErrConflict
	}
	if _, err := c.removeID(id); want("removeID", err, wrong) {
		for _, n := range names {
			delete(m.names, n)
			m.tombs[n] = true
		}
		for _, h := range list {
			delete(m.dangling, h)
		}
	}
}

// said is the state that a store shows: names, dangling images, removed names.
func said(t *testing.T, s *Store, names []Name) (list []string) {
	t.Helper()
	infos, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range infos {
		if i.Dangling {
			list = append(list, "dangling "+i.Digest.String())
		} else {
			list = append(list, i.Name.String()+" "+i.Digest.String())
		}
	}
	for _, n := range names {
		if _, removed, _ := s.Here(n); removed {
			list = append(list, "removed "+n.String())
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

func (m *model) said(names []Name) (list []string) {
	for n, h := range m.names {
		list = append(list, n.String()+" "+h.String())
	}
	for h := range m.dangling {
		list = append(list, "dangling "+h.String())
	}
	for _, n := range names {
		if m.tombs[n] {
			list = append(list, "removed "+n.String())
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// randomImages are images of layers that they share, some under one ID, one with
// a layer twice.
func randomImages() (pool []pulled, names []Name) {
	for i := range 12 {
		layers := []string{"base", fmt.Sprint("mid", i%3), fmt.Sprint("top", i)}
		if i%4 == 0 {
			layers = append(layers, "base")
		}
		pool = append(pool, imageOf(fmt.Sprint("config", i/2), layers...))
	}
	for i := range 8 {
		for _, p := range []string{"", PlatformsDir + "/linux-arm64/"} {
			names = append(names, Name{p + fmt.Sprint("repo", i%3), fmt.Sprint("tag", i)})
		}
	}
	for i := range 3 {
		names = append(names, Name{fmt.Sprint("repo", i), "@" + pool[i].digest.String()})
	}
	return pool, names
}

// imageOf is an image with these layers, not recorded.
func imageOf(config string, layers ...string) pulled {
	p := pulled{digest: hashOf("image " + config + strings.Join(layers, " ")), repo: "repo"}
	p.top, p.image.Config = p.digest, hashOf(config)
	for _, l := range layers {
		p.image.Layers = append(p.image.Layers, imageLayer{Desc: v1.Descriptor{Digest: hashOf(l), Size: int64(100 + len(l))}})
		p.diffIDs = append(p.diffIDs, hashOf("diff "+l))
	}
	return p
}

// sizeSome makes the sizes of a random layer known.
func sizeSome(t *testing.T, c *catalog, r *rand.Rand, pool []pulled) {
	p := pool[r.IntN(len(pool))]
	l := p.image.Layers[r.IntN(len(p.image.Layers))]
	n := int64(r.IntN(5000))
	if err := c.setSizes(map[v1.Hash]layerSizes{l.Desc.Digest: {n, (n + 511) &^ 511}}); err != nil {
		t.Error(err)
	}
}

// TestCatalogModel does random operations, and compares names, dangling images and
// every counter with a model after each.
func TestCatalogModel(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			s, path := testCatalog(t)
			s.cat.db.NoSync = true
			r := rand.New(rand.NewPCG(seed, 1))
			m := newModel()
			pool, names := randomImages()
			for range 400 {
				if r.IntN(5) == 0 {
					sizeSome(t, s.cat, r, pool)
				}
				if k, err := s.cat.keys(bucketIdle); err == nil && len(k) > 0 && r.IntN(10) == 0 {
					if _, err := s.cat.dropLayer(k[0]); err != nil {
						t.Fatal(err)
					}
					delete(m.layers, k[0])
				}
				m.step(t, s.cat, r, pool, names)
				agree(t, s.cat)
				if sum, err := s.Totals(); err != nil || sum.Idle != m.idle() {
					t.Fatalf("Totals().Idle = %d, %v, want %d", sum.Idle, err, m.idle())
				}
				if diff := cmp.Diff(m.said(names), said(t, s, names)); diff != "" || t.Failed() {
					t.Fatalf("names after an operation (-model +catalogue):\n%s", diff)
				}
			}
			s.cat.close()
			cat, damage, err := openCatalog(path, nil)
			if err != nil || damage != nil {
				t.Fatal(err, damage)
			}
			defer cat.close()
			agree(t, cat)
			if diff := cmp.Diff(m.said(names), said(t, &Store{cat: cat}, names)); diff != "" {
				t.Errorf("names after opening again (-model +catalogue):\n%s", diff)
			}
		})
	}
}

// TestCatalogConcurrent does the same from eight goroutines, each with names and
// images of its own that share layers with the others', and compares at the end.
func TestCatalogConcurrent(t *testing.T) {
	s, _ := testCatalog(t)
	s.cat.db.NoSync = true
	models := make([]*model, 8)
	var all []Name
	var wg sync.WaitGroup
	for g := range models {
		pool, names := randomImages()
		for i := range pool {
			config := fmt.Sprint("config ", g, i/2)
			pool[i].digest, pool[i].image.Config = hashOf(fmt.Sprint("image", g, i)), hashOf(config)
			pool[i].image.Layers = slices.Clone(pool[i].image.Layers)
		}
		for i := range names {
			names[i].Repo += fmt.Sprint("/g", g)
			if names[i].IsDigest() {
				names[i].Tag = "@" + pool[0].digest.String()
			}
		}
		all = append(all, names...)
		m := newModel()
		models[g] = m
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 2))
			for range 150 {
				if r.IntN(5) == 0 {
					sizeSome(t, s.cat, r, pool)
				}
				m.step(t, s.cat, r, pool, names)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	agree(t, s.cat)
	whole := newModel()
	for _, m := range models {
		maps.Copy(whole.names, m.names)
		maps.Copy(whole.dangling, m.dangling)
		maps.Copy(whole.tombs, m.tombs)
	}
	if diff := cmp.Diff(whole.said(all), said(t, s, all)); diff != "" {
		t.Errorf("names at the end (-model +catalogue):\n%s", diff)
	}
}
