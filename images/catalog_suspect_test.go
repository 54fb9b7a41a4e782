package images

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// spoil overwrites the first byte of all records that begin so.
func spoil(t *testing.T, path, begin string) {
	t.Helper()
	data := read(t, path)
	if !bytes.Contains(data, []byte(begin)) {
		t.Fatalf("nothing in the catalogue begins with %s", begin)
	}
	data = bytes.ReplaceAll(data, []byte(begin), []byte("x"+begin[1:]))
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestSuspectCatalog spoils records that Open does not read: the first that meets
// one leaves a marker, the next Open makes all again.
func TestSuspectCatalog(t *testing.T) {
	path, blobs, names, want := populated(t)
	spoil(t, path, `{"config":`)
	journal := read(t, journalPath(path))
	c, damage, err := openCatalog(path, blobs)
	if err != nil || damage != nil {
		t.Fatal(damage, err)
	}
	if _, err := os.Stat(markerPath(path)); err == nil {
		t.Error("there is a marker before anything was read")
	}
	if _, err := (&Store{cat: c}).Image(names[0]); err == nil {
		t.Error("a spoiled record is read")
	}
	if _, err := os.Stat(markerPath(path)); err != nil {
		t.Errorf("after a spoiled record was met: %v", err)
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(journal, read(t, journalPath(path))) {
		t.Error("a suspect catalogue has rewritten the journal")
	}
	for round := range 2 {
		c, damage, err = openCatalog(path, blobs)
		if err != nil || (damage != nil) != (round == 0) || len(asides(t, path)) != 1 {
			t.Fatalf("opened %d times: %v, %v, set aside: %q", round+1, damage, err, asides(t, path))
		}
		if diff := cmp.Diff(want, said(t, &Store{cat: c}, names)); diff != "" {
			t.Errorf("names after the rebuild (-before +after):\n%s", diff)
		}
		agree(t, c)
		if _, err := os.Stat(markerPath(path)); err == nil {
			t.Error("the marker is still there")
		}
		if err := c.close(); err != nil {
			t.Fatal(err)
		}
	}
}

// What the journal is made of is read by Open itself.
func TestSuspectNames(t *testing.T) {
	path, blobs, names, want := populated(t)
	spoil(t, path, `{"image":`)
	c, damage, err := openCatalog(path, blobs)
	if err != nil || damage == nil {
		t.Fatalf("openCatalog = %v, %v, want what was damaged", damage, err)
	}
	defer c.close()
	if diff := cmp.Diff(want, said(t, &Store{cat: c}, names)); diff != "" {
		t.Errorf("names after the rebuild (-before +after):\n%s", diff)
	}
}

// A panic in a read is damage as well.
func TestSuspectPanic(t *testing.T) {
	path, blobs, _, _ := populated(t)
	c, _, err := openCatalog(path, blobs)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.read(func(*txn) error { panic("invalid page") }); err == nil {
		t.Error("a panic is no error")
	}
	if _, err := os.Stat(markerPath(path)); err != nil {
		t.Error(err)
	}
	c.close()
	c, damage, err := openCatalog(path, blobs)
	if err != nil || damage == nil {
		t.Fatalf("openCatalog = %v, %v, want what was damaged", damage, err)
	}
	c.close()
}

// TestCheckSuspect checks a store whose catalogue has a spoiled record.
func TestCheckSuspect(t *testing.T) {
	h := newHub(t)
	h.push("app", "v1", gzipLayer(t, file("hello", "world")))
	n := h.name("app", "v1")
	if err := h.Settle(context.Background(), h.root(n)); err != nil {
		t.Fatal(err)
	}
	if _, err := h.cat.write(func(tx *txn) error {
		return tx.scan(bucketImages, nil, func(k, _ []byte) error {
			if err := tx.Bucket(bucketImages).Put(bytes.Clone(k), []byte("x")); err != nil {
				return err
			}
			return errStop
		})
	}); err != nil {
		t.Fatal(err)
	}
	for _, repair := range []bool{false, true} {
		var found []Finding
		c, err := h.Check(t.Context(), repair, func(f Finding) { found = append(found, f) })
		if err != nil || len(found) != 1 || found[0].Kind != "catalogue" || found[0].Repaired ||
			!strings.Contains(found[0].Problem, "is rebuilt at the next start") {
			t.Errorf("Check(%v) = %v, found %+v", repair, err, found)
		}
		if c.Blobs != 2 || c.Indexes != 1 || c.Packs != 1 {
			t.Errorf("Check(%v) has looked at %+v", repair, c)
		}
		if _, err := os.Stat(filepath.Join(h.o.Dir, "catalog.suspect")); err != nil {
			t.Error(err)
		}
	}
	h.reopen()
	if here, _, err := h.Here(n); !here || err != nil {
		t.Errorf("Here after a restart = %v, %v", here, err)
	}
	agree(t, h.cat)
}
