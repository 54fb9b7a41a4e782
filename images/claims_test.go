package images

import (
	iofs "io/fs"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// withTOC is p with the layer at i read by a table of contents that the manifest
// vouches for.
func withTOC(p pulled, i int, toc string) pulled {
	p.image.Layers[i].Desc.Annotations = map[string]string{tocAnnotations[0]: hashOf(toc).String()}
	return p
}

// What an image ID and a chain ID show is not decided by an image that only claims
// them.
func TestClaims(t *testing.T) {
	s, _ := testCatalog(t)
	lies := func(name, toc string) pulled { // the same diffIDs and config, other layers
		p := imageOf("same", "base", "a")
		p.digest = hashOf("manifest " + name)
		return withTOC(p, 0, toc)
	}
	good := imageOf("same", "base", "a")
	chain := hashOf("diff base")
	shown := func(n Name) v1.Hash {
		t.Helper()
		image, ok, err := s.Manifest(n)
		if err != nil || !ok {
			t.Fatalf("Manifest(%v) = %v, %v", n, ok, err)
		}
		return image
	}
	seqOf := func() uint32 {
		t.Helper()
		seq, err := s.cat.viewAt(Name{ChainsDir, chain.Hex})
		if err != nil {
			t.Fatal(err)
		}
		return seq
	}
	one, two := lies("one", "one"), lies("two", "two")
	keep(t, s.cat, Name{"evil", "1"}, one)
	if got := shown(Name{ChainsDir, chain.Hex}); got != one.digest {
		t.Errorf("the chain of one image shows %s", got)
	}
	first := seqOf()

	// A second liar: neither can be told to be right.
	keep(t, s.cat, Name{"evil", "2"}, two)
	_, _, err := s.Manifest(Name{ChainsDir, chain.Hex})
	wantErr(t, "Manifest of a chain with two claims", err, ErrAmbiguous)
	_, err = s.cat.viewAt(Name{ChainsDir, chain.Hex})
	wantErr(t, "viewAt of a chain with two claims", err, ErrAmbiguous)
	wantErr(t, "viewAt of a chain with two claims", err, iofs.ErrNotExist)
	_, _, err = s.Shown(good.image.Config)
	wantErr(t, "Shown with two claims", err, ErrAmbiguous)

	// An image whose layers are compared with the ID.
	keep(t, s.cat, Name{"zgood", "1"}, good)
	_, _, err = s.Manifest(Name{ChainsDir, chain.Hex})
	wantErr(t, "Manifest of a chain whose layers have not come yet", err, ErrAmbiguous)
	sizes := map[v1.Hash]layerSizes{}
	for _, l := range good.image.Layers {
		sizes[l.Desc.Digest] = layerSizes{1, 512}
	}
	if err := s.cat.setSizes(sizes); err != nil {
		t.Fatal(err)
	}
	if got := shown(Name{ChainsDir, chain.Hex}); got != good.digest {
		t.Errorf("the chain shows %s, want %s", got, good.digest)
	}
	if second := seqOf(); second == first {
		t.Error("the chain has the directory numbers of another image")
	} else if again := seqOf(); again != second {
		t.Error("the chain's directory numbers have changed")
	}
	got, names, err := s.Shown(good.image.Config)
	if err != nil || got != good.digest || len(names) != 1 || names[0].Repo != "zgood" {
		t.Errorf("Shown = %s, %v, %v, want %s", got, names, err, good.digest)
	}

	// The same among images without a name.
	for _, n := range []Name{{"evil", "1"}, {"evil", "2"}} {
		keep(t, s.cat, n, imageOf("other "+n.Tag, "other"))
	}
	dangling := Name{DanglingDir, good.image.Config.Hex}
	_, _, err = s.Manifest(dangling)
	wantErr(t, "Manifest of two dangling claims", err, ErrAmbiguous)
	keep(t, s.cat, Name{"zgood", "1"}, imageOf("other", "other"))
	if got := shown(dangling); got != good.digest {
		t.Errorf("dangling shows %s, want %s", got, good.digest)
	}
	if _, err := s.Remove(dangling); err != nil {
		t.Errorf("Remove(dangling) = %v", err)
	}
	agree(t, s.cat)
	_, _, err = s.Shown(good.image.Config)
	wantErr(t, "Shown of nothing", err, iofs.ErrNotExist)
}

// Images that have the same layers agree, however many there are, and what was
// shown goes on to be.
func TestClaimsAgree(t *testing.T) {
	s, _ := testCatalog(t)
	chain := Name{ChainsDir, hashOf("diff base").Hex}
	keep(t, s.cat, Name{"u", "1"}, withTOC(imageOf("1", "base", "x"), 0, "toc"))
	seq, err := s.cat.viewAt(chain)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"2", "3", "4", "5", "6"} {
		keep(t, s.cat, Name{"u", id}, withTOC(imageOf(id, "base"), 0, "toc"))
		if got, err := s.cat.viewAt(chain); err != nil || got != seq {
			t.Errorf("viewAt with another image of the chain = %d, %v, want %d", got, err, seq)
		}
	}
	if _, err := s.Remove(Name{"u", "1"}); err != nil {
		t.Fatal(err)
	}
	if got, err := s.cat.viewAt(chain); err != nil || got == seq {
		t.Errorf("viewAt after the image that was shown has gone = %d, %v, want a new one", got, err)
	}
	agree(t, s.cat)
}
