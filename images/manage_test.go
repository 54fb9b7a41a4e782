package images

import (
	"context"
	"errors"
	iofs "io/fs"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/cache"
)

// keep records p under n.
func keep(t *testing.T, c *catalog, n Name, p pulled) Change {
	t.Helper()
	if err := c.putLayers(&p); err != nil {
		t.Fatal(err)
	}
	ch, err := c.put(n, p)
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

func wantChange(t *testing.T, what string, got Change, err error, want Change) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s = %v", what, err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s = %v, want %v", what, err, want)
	}
}

// The scenes of docs/namespace.md, and what each operation says that it did.
func TestChanges(t *testing.T) {
	s, _ := testCatalog(t)
	a, b := imageOf("A", "base", "a"), imageOf("B", "base", "b")
	id := func(p pulled) v1.Hash { return p.image.Config }
	one, two, other := Name{"u", "1"}, Name{"u", "2"}, Name{"host.io/v", "1"}
	digest := Name{"u", "@" + a.digest.String()}

	wantChange(t, "first pull", keep(t, s.cat, one, a), nil, Change{Image: a.digest})
	keep(t, s.cat, digest, a)
	ch, err := s.Tag(a.digest, other)
	wantChange(t, "tag", ch, err, Change{Image: a.digest})
	ch, err = s.Tag(a.digest, other)
	wantChange(t, "tag again", ch, err, Change{Image: a.digest})

	ch, err = s.Remove(one)
	wantChange(t, "remove with a name by digest in the same repository", ch, err, Change{Untagged: []Name{one, digest}})
	if here, removed, _ := s.Here(digest); here || !removed {
		t.Errorf("Here(digest) = %v, %v", here, removed)
	}
	ch, err = s.Remove(other)
	wantChange(t, "remove of the last name", ch, err, Change{Untagged: []Name{other}, Deleted: []v1.Hash{id(a)}})

	keep(t, s.cat, one, a)
	wantChange(t, "pull of a moved tag", keep(t, s.cat, one, b), nil,
		Change{Untagged: []Name{one}, Dangling: []v1.Hash{id(a)}, Image: b.digest})
	ghost := Name{DanglingDir, id(a).Hex}
	if m, ok, err := s.Manifest(ghost); m != a.digest || !ok || err != nil {
		t.Errorf("Manifest(dangling) = %v, %v, %v", m, ok, err)
	}
	if info, err := s.Image(ghost); err != nil || !info.Dangling || info.ID != id(a) || info.Name != ghost {
		t.Errorf("Image(dangling) = %+v, %v", info, err)
	}
	ch, err = s.Tag(a.digest, two)
	wantChange(t, "tag of a dangling image", ch, err, Change{Image: a.digest})
	if _, ok, err := s.Manifest(ghost); ok || err != nil {
		t.Errorf("Manifest(no longer dangling) = %v, %v", ok, err)
	}

	ch, err = s.Exchange(one, two)
	wantChange(t, "exchange", ch, err, Change{Untagged: []Name{one, two}, Image: a.digest})
	ch, err = s.Move(one, two, true) // two was B's only name
	wantChange(t, "move onto another", ch, err, Change{Untagged: []Name{two, one}, Dangling: []v1.Hash{id(b)}, Image: a.digest})
	if here, removed, _ := s.Here(one); here || !removed {
		t.Errorf("Here(moved away) = %v, %v", here, removed)
	}
	ch, err = s.Move(two, two, false)
	wantChange(t, "move onto itself", ch, err, Change{Image: a.digest})
	ch, err = s.Remove(Name{DanglingDir, id(b).Hex})
	wantChange(t, "remove of a dangling image", ch, err, Change{Deleted: []v1.Hash{id(b)}})
	ch, err = s.RemoveID(id(a))
	wantChange(t, "removal by ID", ch, err, Change{Untagged: []Name{two}, Deleted: []v1.Hash{id(a)}})
	agree(t, s.cat)
	if sum, err := s.Totals(); err != nil || sum.Layers != 0 || sum.Idle != 3 || sum.Images != 0 {
		t.Errorf("Totals at the end = %+v, %v, want 3 idle layers and nothing else", sum, err)
	}
}

func TestChangeErrors(t *testing.T) {
	s, _ := testCatalog(t)
	a, b := imageOf("A", "a"), imageOf("A", "a", "b") // one ID, two manifests
	one, two, none := Name{"u", "1"}, Name{"u", "2"}, Name{"u", "none"}
	digest := Name{"u", "@" + a.digest.String()}
	keep(t, s.cat, one, a)
	keep(t, s.cat, two, b)
	keep(t, s.cat, digest, a)
	_, err := s.Remove(none)
	wantErr(t, "Remove(none)", err, iofs.ErrNotExist)
	_, err = s.Remove(Name{DanglingDir, a.image.Config.Hex})
	wantErr(t, "Remove(dangling, of an image that is not)", err, iofs.ErrNotExist)
	_, err = s.Tag(hashOf("nothing"), none)
	wantErr(t, "Tag(nothing)", err, iofs.ErrNotExist)
	for _, bad := range []Name{{"u", "a b"}, {"U", "1"}, {"u", ""}, {"", "1"}, {"u", "@" + b.digest.String()}, {DanglingDir, "x"},
		{PlatformsDir + "/linux", "1"}, {PlatformsDir + "/linux-arm64", "1"}, {PlatformsDir + "/linux-arm64-", "1"}} {
		_, err = s.Tag(a.digest, bad)
		wantErr(t, "Tag("+bad.String()+")", err, iofs.ErrInvalid)
		_, err = s.Move(one, bad, true)
		wantErr(t, "Move(to "+bad.String()+")", err, iofs.ErrInvalid)
	}
	_, err = s.Move(none, one, true)
	wantErr(t, "Move(none)", err, iofs.ErrNotExist)
	_, err = s.Move(one, two, false)
	wantErr(t, "Move(no replace)", err, iofs.ErrExist)
	_, err = s.Exchange(one, none)
	wantErr(t, "Exchange(none)", err, iofs.ErrNotExist)
	_, err = s.Exchange(one, digest)
	wantErr(t, "Exchange(digest)", err, iofs.ErrInvalid)
	_, err = s.RemoveID(a.image.Config)
	wantErr(t, "RemoveID(two tags)", err, ErrConflict)
	if !strings.Contains(err.Error(), "u:1") || !strings.Contains(err.Error(), "u:2") {
		t.Errorf("RemoveID(two tags) = %v, want the names in it", err)
	}
	_, err = s.RemoveID(hashOf("nothing"))
	wantErr(t, "RemoveID(nothing)", err, iofs.ErrNotExist)
	_, err = s.cat.dropLayer(hashOf("a"))
	wantErr(t, "dropLayer(in use)", err, ErrConflict)
	_, err = s.cat.dropLayer(hashOf("nothing"))
	wantErr(t, "dropLayer(nothing)", err, iofs.ErrNotExist)
	_, err = s.Image(none)
	wantErr(t, "Image(none)", err, iofs.ErrNotExist)
	_, err = s.Image(Name{DanglingDir, "../.."})
	wantErr(t, "Image(bad ID)", err, iofs.ErrNotExist)
	agree(t, s.cat)
	if got, want := said(t, s, nil), 3; len(got) != want {
		t.Errorf("names after nothing but errors = %q", got)
	}
}

func TestFindID(t *testing.T) {
	s, _ := testCatalog(t)
	ids := map[string][]pulled{}
	for i := range 40 {
		p := imageOf(strings.Repeat("x", i+1), "base", strings.Repeat("y", i+1))
		keep(t, s.cat, Name{"u", strings.Repeat("t", i+1)}, p)
		ids[p.image.Config.Hex[:1]] = append(ids[p.image.Config.Hex[:1]], p)
	}
	for digit, list := range ids {
		_, err := s.FindID(digit)
		if (len(list) > 1) != errors.Is(err, ErrAmbiguous) || len(list) > 1 && !errors.Is(err, iofs.ErrNotExist) {
			t.Errorf("FindID(%s) of %d images = %v", digit, len(list), err)
		}
		for _, p := range list {
			for _, prefix := range []string{p.image.Config.Hex, p.image.Config.String(), p.image.Config.Hex[:20], "sha256:" + p.image.Config.Hex[:20]} {
				if got, err := s.FindID(prefix); err != nil || got.ID != p.image.Config || got.Manifests[0] != p.digest || len(got.Names) != 1 {
					t.Errorf("FindID(%s) = %+v, %v", prefix, got, err)
				}
			}
		}
	}
	for _, bad := range []string{"", "sha256:", "xyz", "../x", strings.Repeat("0", 65), "\xff", hashOf("nothing").Hex} {
		if _, err := s.FindID(bad); !errors.Is(err, iofs.ErrNotExist) || errors.Is(err, ErrAmbiguous) {
			t.Errorf("FindID(%q) = %v, want ErrNotExist", bad, err)
		}
	}
	// Two manifests with one ID, of which one has no name.
	a, b := imageOf("same", "1"), imageOf("same", "2")
	keep(t, s.cat, Name{"w", "1"}, a)
	keep(t, s.cat, Name{"w", "1"}, b)
	got, err := s.FindID(a.image.Config.Hex)
	if err != nil || len(got.Manifests) != 2 || got.Manifests[0] != b.digest {
		t.Errorf("FindID(two manifests) = %+v, %v, want %s first", got, err, b.digest)
	}
}

// Chain IDs are those of the image-spec: of two images with one base, the base's
// chain is one.
func TestChains(t *testing.T) {
	s, _ := testCatalog(t)
	keep(t, s.cat, Name{"u", "1"}, imageOf("A", "base", "a"))
	keep(t, s.cat, Name{"u", "2"}, imageOf("B", "base", "a", "b"))
	base, a := hashOf("diff base"), hashOf("diff a")
	second := sha256Hash([]byte(base.String() + " " + a.String()))
	list, err := s.Chains()
	if err != nil || len(list) != 3 {
		t.Fatalf("Chains() = %+v, %v, want three", list, err)
	}
	c, ok, err := s.Chain(base)
	if err != nil || !ok || c.Layers != 1 || len(c.Images) != 2 || c.Whole {
		t.Errorf("Chain(base) = %+v, %v, %v", c, ok, err)
	}
	c, ok, err = s.Chain(second)
	if err != nil || !ok || c.Layers != 2 || len(c.Images) != 2 || !c.Whole {
		t.Errorf("Chain(base a) = %+v, %v, %v", c, ok, err)
	}
	if _, ok, err := s.Chain(hashOf("nothing")); ok || err != nil {
		t.Errorf("Chain(nothing) = %v, %v", ok, err)
	}
	if _, err := s.Remove(Name{"u", "2"}); err != nil {
		t.Fatal(err)
	}
	if list, err = s.Chains(); err != nil || len(list) != 2 {
		t.Errorf("Chains() of what is left = %+v, %v, want two", list, err)
	}
}

// A view goes with its name when the name moves, and another one comes when the
// name comes back.
func TestViewsMove(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	l := gzipLayer(t, file("hello", "world"))
	h.push("app", "v1", l)
	h.push("app", "v2", l, gzipLayer(t, file("more", "x")))
	v1, v2, moved := h.name("app", "v1"), h.name("app", "v2"), h.name("team/moved", "x")
	first, second := h.root(v1), h.root(v2)
	if _, err := h.Move(v1, moved, false); err != nil {
		t.Fatal(err)
	}
	if root, err := h.Root(ctx, moved); root != first || err != nil {
		t.Errorf("Root of what was moved = %#x, %v, want %#x", root, err, first)
	}
	if n, ok := h.NameOf(first); n != moved || !ok {
		t.Errorf("NameOf = %v, %v, want %v", n, ok, moved)
	}
	_, err := h.Root(ctx, v1)
	wantErr(t, "Root of what was moved away", err, iofs.ErrNotExist)
	if _, err := h.Exchange(moved, v2); err != nil {
		t.Fatal(err)
	}
	if root, err := h.Root(ctx, moved); root != second || err != nil {
		t.Errorf("Root after the exchange = %#x, %v, want %#x", root, err, second)
	}
	if n, ok := h.NameOf(first); n != v2 || !ok {
		t.Errorf("NameOf after the exchange = %v, %v, want %v", n, ok, v2)
	}
	h.lookup(first, "hello")
	if _, err := h.Remove(v2); err != nil {
		t.Fatal(err)
	}
	h.lookup(first, "hello") // who is in it goes on
	if again := h.root(v1); again == first {
		t.Error("an image that was removed has its old directory number when it comes back")
	}
}

// A tag that has moved in its registry, and one that has not.
func TestUpdate(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	n := h.name("app", "v1")
	_, err := h.Update(ctx, n)
	wantErr(t, "Update of what is not here", err, iofs.ErrNotExist)
	base := gzipLayer(t, file("base", "12345"))
	h.push("app", "v1", base, gzipLayer(t, file("one", "1")))
	root := h.root(n)
	old, err := h.Image(n)
	if err != nil {
		t.Fatal(err)
	}
	ch, err := h.Update(ctx, n)
	wantChange(t, "Update of a tag that stays", ch, err, Change{})
	if same, err := h.Root(ctx, n); same != root || err != nil {
		t.Errorf("Root after an update that brought nothing = %#x, %v, want %#x", same, err, root)
	}
	h.push("app", "v1", base, gzipLayer(t, file("two", "22")))
	ch, err = h.Update(ctx, n)
	if err != nil {
		t.Fatal(err)
	}
	now, err := h.Image(n)
	if err != nil {
		t.Fatal(err)
	}
	wantChange(t, "Update of a tag that has moved", ch, nil, Change{Untagged: []Name{n}, Dangling: []v1.Hash{old.ID}, Image: now.Digest})
	h.lookup(h.root(n), "two")
	h.lookup(root, "one")
	ghost, err := h.Root(ctx, Name{DanglingDir, old.ID.Hex})
	if err != nil {
		t.Fatal(err)
	}
	h.lookup(ghost, "one")
	chain, err := h.Root(ctx, Name{ChainsDir, mustDiffID(t, base).Hex})
	if err != nil {
		t.Fatal(err)
	}
	h.lookup(chain, "base")
	var a Attr
	if ino, _, err := h.Lookup(ctx, chain, "two", &a); ino != 0 || err != nil {
		t.Errorf("Lookup in a chain of what a later layer has = %v, %v", ino, err)
	}
	if err := h.Settle(ctx, h.root(n)); err != nil {
		t.Fatal(err)
	}
	agree(t, h.cat)
	if now, err = h.Image(n); err != nil || now.Expanded != 7 || now.Shared != 5 || now.Unique != 2 || now.Usage != 1024 {
		t.Errorf("sizes = %+v, %v, want 7 bytes, 5 of them shared", now.Sizes, err)
	}
	sum, err := h.Totals()
	if err != nil || sum.Expanded != 8 || sum.Shared != 5 || sum.Dangling != 1 || sum.Reclaimable != 1 || sum.Arriving != 0 {
		t.Errorf("Totals() = %+v, %v", sum, err)
	}
	if _, err := h.Remove(Name{DanglingDir, old.ID.Hex}); err != nil {
		t.Fatal(err)
	}
	_, err = h.Root(ctx, Name{DanglingDir, old.ID.Hex})
	wantErr(t, "Root of a dangling image that was removed", err, iofs.ErrNotExist)
	if h.cache.Has(cache.Blob, old.Digest) || h.cache.Has(cache.Blob, old.ID) || !h.cache.Has(cache.Blob, now.Digest) {
		t.Error("the blobs of an image that was removed are here, or those of another are not")
	}
}

func mustDiffID(t *testing.T, l v1.Layer) v1.Hash {
	t.Helper()
	d, err := l.DiffID()
	if err != nil {
		t.Fatal(err)
	}
	return d
}
