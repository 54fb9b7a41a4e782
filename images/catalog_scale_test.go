package images

import (
	"fmt"
	"testing"
)

// TestCatalogReads counts what operations read of catalogues of very different
// sizes: no more of the larger one.
func TestCatalogReads(t *testing.T) {
	const few, many = 100, 10000
	reads := map[string][2]int64{}
	for i, n := range []int{few, many} {
		s, _ := testCatalog(t)
		s.cat.db.NoSync = true
		var last pulled
		for j := range n {
			last = imageOf(fmt.Sprint("config", j), "base", fmt.Sprint("mid", j%50), fmt.Sprint("top", j))
			keep(t, s.cat, Name{fmt.Sprint("r", j%500), fmt.Sprint("t", j)}, last)
		}
		count := func(what string, f func() error) {
			t.Helper()
			before := s.CatalogReads()
			if err := f(); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			both := reads[what]
			both[i] = s.CatalogReads() - before
			reads[what] = both
		}
		name := Name{fmt.Sprint("r", (n-1)%500), fmt.Sprint("t", n-1)}
		count("Totals", func() error { _, err := s.Totals(); return err })
		count("FindID", func() error { _, err := s.FindID(last.image.Config.Hex); return err })
		count("Image", func() error { _, err := s.Image(name); return err })
		count("Tag", func() error { _, err := s.Tag(last.digest, Name{"tagged", "x"}); return err })
		count("Move", func() error { _, err := s.Move(Name{"tagged", "x"}, Name{"moved", "x"}, false); return err })
		count("Exchange", func() error { _, err := s.Exchange(Name{"moved", "x"}, name); return err })
		count("untag", func() error { _, err := s.Remove(Name{"moved", "x"}); return err })
		count("Remove", func() error { _, err := s.Remove(name); return err })
		count("put", func() error {
			p := imageOf("new", "base", "mid1", "new")
			if err := s.cat.putLayers(&p); err != nil {
				return err
			}
			_, err := s.cat.put(Name{"new", "1"}, p)
			return err
		})
		before := s.CatalogReads()
		list, err := s.List()
		if err != nil || len(list) != n {
			t.Fatalf("List() has %d images, %v, want %d", len(list), err, n)
		}
		if got, most := s.CatalogReads()-before, int64(2*n+2); got > most {
			t.Errorf("List() of %d images reads %d records, want %d at most", n, got, most)
		}
		agree(t, s.cat)
	}
	const most = 80 // an image of three layers
	for what, n := range reads {
		if n[1] > n[0] || n[1] > most || n[1] == 0 {
			t.Errorf("%s reads %d records with %d images, %d with %d, want no more, and %d at most", what, n[0], few, n[1], many, most)
		}
	}
	t.Log(reads)
}
