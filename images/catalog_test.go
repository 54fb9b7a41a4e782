package images

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"go.etcd.io/bbolt"
)

func testCatalog(t *testing.T) (*Store, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "catalog.db")
	cat, _, err := openCatalog(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cat.close() })
	return &Store{cat: cat}, path
}

func hashOf(s string) v1.Hash { return sha256Hash([]byte(s)) }

// add records an image of the named layers under n.
func add(t *testing.T, c *catalog, n Name, layers ...string) pulled {
	t.Helper()
	p := pulled{digest: hashOf("image " + strings.Join(layers, " ")), repo: n.Repo}
	p.top, p.image.Config = p.digest, hashOf("config")
	for _, l := range layers {
		p.image.Layers = append(p.image.Layers, imageLayer{Desc: v1.Descriptor{Digest: hashOf(l), Size: 1}})
		p.diffIDs = append(p.diffIDs, hashOf("diff "+l))
	}
	if err := c.putLayers(&p); err != nil {
		t.Fatal(err)
	}
	if _, err := c.put(n, p); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCatalogSequences(t *testing.T) {
	s, path := testCatalog(t)
	a := add(t, s.cat, Name{"a", "1"}, "base", "a")
	b := add(t, s.cat, Name{"b", "1"}, "base", "b")
	if a.image.Layers[0].Seq != b.image.Layers[0].Seq || a.image.Layers[1].Seq == b.image.Layers[1].Seq {
		t.Errorf("layer sequences = %v and %v, want the first shared and the second not", a.image.Layers, b.image.Layers)
	}
	va, _ := s.cat.viewOf(Name{"a", "1"}, a.digest)
	add(t, s.cat, Name{"c", "1"}, "base", "a") // the same image under another name
	vc, _ := s.cat.viewOf(Name{"c", "1"}, a.digest)
	if va == 0 || vc == 0 || va == vc {
		t.Errorf("views of one image under two names = %d and %d, want two", va, vc)
	}
	if _, err := s.cat.remove(Name{"a", "1"}); err != nil {
		t.Fatal(err)
	}
	s.cat.close()
	cat, _, err := openCatalog(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer cat.close()
	again := add(t, cat, Name{"a", "1"}, "base", "a", "new")
	if again.image.Layers[0].Seq != a.image.Layers[0].Seq {
		t.Errorf("sequence of the base layer after a restart = %d, want %d", again.image.Layers[0].Seq, a.image.Layers[0].Seq)
	}
	for _, old := range []uint32{a.image.Layers[0].Seq, a.image.Layers[1].Seq, b.image.Layers[1].Seq} {
		if again.image.Layers[2].Seq == old {
			t.Errorf("sequence %d was given twice", old)
		}
	}
}

// After the last number of a view the first ones are given again, but for those
// that a name has, or somebody who opened it in this run.
func TestViewsWrap(t *testing.T) {
	s, path := testCatalog(t)
	cat := s.cat
	give := func(tag string) uint32 {
		t.Helper()
		p := add(t, cat, Name{"u", tag}, "base")
		seq, ok := cat.viewOf(Name{"u", tag}, p.digest)
		if !ok {
			t.Fatalf("%s has no view", tag)
		}
		return seq
	}
	for i := range uint32(4) {
		if got := give(fmt.Sprint(i)); got != i+1 {
			t.Fatalf("view %d has the number %d", i, got)
		}
	}
	if _, err := cat.remove(Name{"u", "1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := cat.write(func(t *txn) error { return setCounter(t.Bucket(bucketMeta), "view", maxSeq-1) }); err != nil {
		t.Fatal(err)
	}
	if got := give("last"); got != maxSeq {
		t.Errorf("the last number is %d, want %d", got, maxSeq)
	}
	if got := give("again"); got != 5 {
		t.Errorf("after the last number comes %d, want 5: 2 is of a view that somebody may have", got)
	}
	cat.close()
	cat, _, err := openCatalog(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer cat.close()
	if _, err := cat.write(func(t *txn) error { return setCounter(t.Bucket(bucketMeta), "view", maxSeq) }); err != nil {
		t.Fatal(err)
	}
	p := add(t, cat, Name{"u", "new"}, "base")
	if got, _ := cat.viewOf(Name{"u", "new"}, p.digest); got != 2 {
		t.Errorf("after a restart the number is %d, want 2, which nobody has", got)
	}
	if _, err := cat.write(func(t *txn) error {
		for range 10 {
			if n, err := t.nextView(5); err == nil {
				return fmt.Errorf("%d was given, though 1 to 5 are taken", n)
			}
		}
		return errUnchanged
	}); err != nil {
		t.Error(err)
	}
}

func TestCatalogRemove(t *testing.T) {
	s, _ := testCatalog(t)
	one, two := Name{"u", "1"}, Name{"u", "2"}
	p := add(t, s.cat, one, "l")
	add(t, s.cat, two, "l")
	if _, err := s.cat.remove(one); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := s.cat.image(p.digest); !ok || err != nil {
		t.Errorf("image while another name has it = %v, %v, want here", ok, err)
	}
	if here, removed, _ := s.Here(one); here || !removed {
		t.Errorf("Here(removed) = %v, %v, want false, true", here, removed)
	}
	if _, err := s.cat.remove(two); err != nil {
		t.Fatal(err)
	}
	if _, ok, _ := s.cat.image(p.digest); ok {
		t.Error("the image is here without a name")
	}
	if _, err := s.cat.remove(two); !errors.Is(err, iofs.ErrNotExist) {
		t.Errorf("remove(removed) = %v, want ErrNotExist", err)
	}
	add(t, s.cat, one, "l")
	if here, removed, _ := s.Here(one); !here || removed {
		t.Errorf("Here(brought back) = %v, %v, want true, false", here, removed)
	}
}

func TestChildren(t *testing.T) {
	s, _ := testCatalog(t)
	for _, n := range []Name{{"ubuntu", "18.04"}, {"ubuntu", "latest"}, {"ubuntu-core", "1"}, {"ubuntu/x", "1"},
		{"localhost:5000/a/b", "1"}, {"localhost:5000/a-b", "2"}, {"localhost:5000/a", "3"}, {"ubuntu", "@sha256:" + strings.Repeat("0", 64)}} {
		add(t, s.cat, n, "l")
	}
	for path, want := range map[string][2]string{
		"":                   {"localhost:5000 ubuntu ubuntu-core", ""},
		"ubuntu":             {"x", "18.04 latest"},
		"localhost:5000":     {"a a-b", ""},
		"localhost:5000/a":   {"b", "3"},
		"localhost:5000/a/b": {"", "1"},
		"nothing":            {"", ""},
	} {
		dirs, tags, err := s.Children(path)
		got := [2]string{strings.Join(dirs, " "), strings.Join(tags, " ")}
		if err != nil || got != want {
			t.Errorf("Children(%q) = %q, %v, want %q", path, got, err, want)
		}
	}
	if !s.HasPath("localhost:5000") || s.HasPath("localhost:500") || s.HasPath("ubunt") {
		t.Error("HasPath takes a prefix for a path, or misses one")
	}
}

func TestNodes(t *testing.T) {
	s, path := testCatalog(t)
	a, err := s.Node("ubuntu")
	if err != nil {
		t.Fatal(err)
	}
	b, _ := s.Node("debian")
	if again, _ := s.Node("ubuntu"); again != a || a == b || a < firstNode {
		t.Errorf("Node(ubuntu) = %d, then %d; Node(debian) = %d", a, again, b)
	}
	s.cat.close()
	cat, _, err := openCatalog(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer cat.close()
	s = &Store{cat: cat}
	if p, ok := s.NodePath(a); !ok || p != "ubuntu" {
		t.Errorf("NodePath(%d) after a restart = %q, %v", a, p, ok)
	}
	if _, ok := s.NodePath(99999); ok {
		t.Error("NodePath of a number that was never given is known")
	}
}

// A catalogue of a newer version is refused and not touched.
func TestCatalogVersion(t *testing.T) {
	s, path := testCatalog(t)
	err := s.cat.db.Update(func(tx *bbolt.Tx) error { return setCounter(tx.Bucket(bucketMeta), "version", catalogVersion+1) })
	if err != nil {
		t.Fatal(err)
	}
	s.cat.close()
	if _, _, err := openCatalog(path, nil); err == nil || !strings.Contains(err.Error(), "newer") {
		t.Errorf("openCatalog(newer) = %v, want a refusal", err)
	}
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	db.View(func(tx *bbolt.Tx) error {
		if v := counter(tx.Bucket(bucketMeta), "version"); v != catalogVersion+1 {
			t.Errorf("version after the refusal = %d", v)
		}
		return nil
	})
}

// What was looked up in vain is forgotten when the catalogue is opened again;
// what is here keeps its number, and no number is given twice.
func TestDropNodes(t *testing.T) {
	s, _ := testCatalog(t)
	add(t, s.cat, Name{"host.io/team/app", "1"}, "l")
	var last Ino
	numbers := map[string]Ino{}
	for _, path := range []string{"host.io", "host.io/team", "host.io/team/app", "nothing", "host.io/x"} {
		ino, err := s.Node(path)
		if err != nil {
			t.Fatal(err)
		}
		numbers[path], last = ino, ino
	}
	if err := s.dropNodes(); err != nil {
		t.Fatal(err)
	}
	for path, ino := range numbers {
		_, here := s.NodePath(ino)
		if want := strings.HasPrefix("host.io/team/app", path); here != want {
			t.Errorf("node of %q after dropNodes: known %v, want %v", path, here, want)
		}
	}
	if again, err := s.Node("nothing"); err != nil || again <= last {
		t.Errorf("Node(nothing) = %d, %v, want a number above %d", again, err, last)
	}
}
