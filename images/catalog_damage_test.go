package images

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"go.etcd.io/bbolt"
)

// blobMap is a blobSource; Open finds the names of its files in a directory.
type blobMap map[v1.Hash][]byte

func (m blobMap) Blob(h v1.Hash) ([]byte, bool, error) {
	data, ok := m[h]
	return data, ok, nil
}

// put keeps data beside the catalogue at path.
func (m blobMap) put(t *testing.T, path string, data []byte) v1.Hash {
	t.Helper()
	h := sha256Hash(data)
	m[h] = data
	dir := filepath.Join(filepath.Dir(path), "blobs", "sha256")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, h.Hex), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return h
}

// image makes blobs of an image with these layers.
func (m blobMap) image(t *testing.T, path string, layers ...string) pulled {
	t.Helper()
	cf := v1.ConfigFile{Architecture: "amd64", OS: "linux", RootFS: v1.RootFS{Type: "layers"},
		Created: v1.Time{Time: time.Unix(1700000000, 0).UTC()}}
	mf := v1.Manifest{SchemaVersion: 2, MediaType: "application/vnd.oci.image.manifest.v1+json"}
	for _, l := range layers {
		cf.RootFS.DiffIDs = append(cf.RootFS.DiffIDs, hashOf("diff "+l))
		cf.History = append(cf.History, v1.History{CreatedBy: l, Created: cf.Created})
		mf.Layers = append(mf.Layers, v1.Descriptor{Digest: hashOf(l), Size: int64(100 + len(l))})
	}
	raw := func(v any) []byte {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	config := raw(cf)
	mf.Config = v1.Descriptor{Digest: m.put(t, path, config), Size: int64(len(config))}
	p, ok := readImage(m.put(t, path, raw(mf)), m)
	if !ok {
		t.Fatal("the blobs that were just made are no image")
	}
	p.repo = "u"
	return p
}

// populated is a catalogue with names, a removed name, and a dangling image, with
// the blobs of all. It is closed.
func populated(t *testing.T) (path string, blobs blobMap, names []Name, want []string) {
	t.Helper()
	path, blobs = filepath.Join(t.TempDir(), "catalog.db"), blobMap{}
	c, _, err := openCatalog(path, blobs)
	if err != nil {
		t.Fatal(err)
	}
	names = []Name{{"u", "1"}, {"u", "2"}, {"u", "3"}, {"host.io/x/y", "latest"}, {PlatformsDir + "/linux-arm64/u", "1"}}
	a, b := blobs.image(t, path, "base", "a"), blobs.image(t, path, "base", "b")
	keep(t, c, names[0], a)
	keep(t, c, names[1], a)
	keep(t, c, names[3], b)
	keep(t, c, names[4], blobs.image(t, path, "arm"))
	keep(t, c, names[1], b)
	keep(t, c, names[2], blobs.image(t, path, "ghost"))
	keep(t, c, names[2], b)
	if _, err := c.remove(names[2]); err != nil {
		t.Fatal(err)
	}
	want = said(t, &Store{cat: c}, names)
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	return path, blobs, names, want
}

func asides(t *testing.T, path string) []string {
	t.Helper()
	list, err := filepath.Glob(path + ".damaged-*")
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestDamagedCatalog damages a catalogue in every way that Open can see: it is set
// aside as it was, and made again with all names.
func TestDamagedCatalog(t *testing.T) {
	overwrite := func(off, n int64) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			st, _ := f.Stat()
			if n < 0 {
				n = st.Size() - off
			}
			if _, err := f.WriteAt(bytes.Repeat([]byte{0xa5}, int(n)), off); err != nil {
				t.Fatal(err)
			}
		}
	}
	truncate := func(size func(int64) int64) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, size(st.Size())); err != nil {
				t.Fatal(err)
			}
		}
	}
	change := func(f func(*bbolt.Tx) error) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			db, err := bbolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(db.Update(f), db.Close()); err != nil {
				t.Fatal(err)
			}
		}
	}
	page := int64(os.Getpagesize())
	for name, damage := range map[string]func(*testing.T, string){
		"text":             func(t *testing.T, path string) { os.WriteFile(path, []byte("not a database"), 0o600) },
		"zeros":            func(t *testing.T, path string) { os.WriteFile(path, make([]byte, 8*page), 0o600) },
		"empty":            truncate(func(int64) int64 { return 0 }),
		"gone":             func(t *testing.T, path string) { os.Remove(path) },
		"one byte":         truncate(func(int64) int64 { return 1 }),
		"half":             truncate(func(n int64) int64 { return n / 2 }),
		"two pages":        truncate(func(int64) int64 { return 2 * page }),
		"meta pages":       overwrite(0, 2*page),
		"behind the metas": overwrite(2*page, -1),
		"no meta bucket":   change(func(tx *bbolt.Tx) error { return tx.DeleteBucket(bucketMeta) }),
		"no users":         change(func(tx *bbolt.Tx) error { return tx.DeleteBucket(bucketUsers) }),
		"no version": change(func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketMeta).Delete([]byte("version"))
		}),
		"totals": change(func(tx *bbolt.Tx) error { return tx.Bucket(bucketMeta).Put(totalsKey, []byte("{")) }),
	} {
		t.Run(name, func(t *testing.T) {
			path, blobs, names, want := populated(t)
			damage(t, path)
			bad, _ := os.ReadFile(path)
			c, said1, err := openCatalog(path, blobs)
			if err != nil || said1 == nil {
				t.Fatalf("openCatalog(damaged) = %v, %v, want a catalogue and what was damaged", said1, err)
			}
			t.Log(said1)
			if list := asides(t, path); name != "gone" {
				if len(list) != 1 {
					t.Fatalf("set aside: %q, want one file", list)
				}
				if kept, err := os.ReadFile(list[0]); err != nil || !bytes.Equal(kept, bad) && name != "behind the metas" {
					t.Errorf("what was set aside is not what was there: %v", err)
				}
			}
			if diff := cmp.Diff(want, said(t, &Store{cat: c}, names)); diff != "" {
				t.Errorf("names after the rebuild (-before +after):\n%s", diff)
			}
			agree(t, c)
			keep(t, c, Name{"u", "new"}, imageOf("new", "base", "new"))
			agree(t, c)
			if err := c.close(); err != nil {
				t.Fatal(err)
			}
			c, said1, err = openCatalog(path, blobs)
			if err != nil || said1 != nil {
				t.Fatalf("openCatalog(again) = %v, %v", said1, err)
			}
			c.close()
		})
	}
}

// TestDamagedAnywhere overwrites random places: Open works, or everything that is
// asked afterwards answers or fails, and the process lives.
func TestDamagedAnywhere(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector's build ends the process at bbolt's pointers into a damaged page, where others panic")
	}
	path, blobs, names, _ := populated(t)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rebuilt := 0
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 3))
		bad := slices.Clone(good)
		for range 1 + r.IntN(64) {
			bad[r.IntN(len(bad))] ^= byte(1 + r.IntN(255))
		}
		path := filepath.Join(t.TempDir(), "catalog.db")
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		c, damage, err := openCatalog(path, blobs)
		if err != nil {
			t.Logf("seed %d: %v", seed, err)
			continue
		}
		if damage != nil {
			rebuilt++
		}
		s := &Store{cat: c}
		s.List()
		s.Totals()
		s.Chains()
		s.FindID("0")
		for _, n := range names {
			s.Remove(n)
			s.Children(n.Repo)
		}
		c.check(t.Context(), false, func(string, string) {})
		c.close() // bbolt's own would wait for ever, after some panics
	}
	t.Logf("%d of 40 were rebuilt", rebuilt)
}

// TestJournalAfterKill: the catalogue is damaged while it is open, and the journal
// has been appended to, the last line cut short.
func TestJournalAfterKill(t *testing.T) {
	path, blobs, names, _ := populated(t)
	c, _, err := openCatalog(path, blobs)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.move(names[0], Name{"u", "moved"}, false); err != nil {
		t.Fatal(err)
	}
	if _, err := c.exchange(Name{"u", "moved"}, names[1]); err != nil {
		t.Fatal(err)
	}
	names = append(names, Name{"u", "moved"})
	want := said(t, &Store{cat: c}, names)
	journal, err := os.ReadFile(journalPath(path))
	if err != nil {
		t.Fatal(err)
	}
	c.close()
	os.WriteFile(path, []byte("gone"), 0o600)
	os.WriteFile(journalPath(path), append(journal, "\x00\x00\n"+`{"op":"gone","name":{"Re`...), 0o600)
	c, damage, err := openCatalog(path, blobs)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if !strings.Contains(damage.Error(), "2 lines") {
		t.Errorf("damage = %v, want two lines that could not be read", damage)
	}
	if diff := cmp.Diff(want, said(t, &Store{cat: c}, names)); diff != "" {
		t.Errorf("names after the rebuild (-before +after):\n%s", diff)
	}
	agree(t, c)
}

// Without a journal all images come back, without names.
func TestRebuildWithoutJournal(t *testing.T) {
	path, blobs, names, _ := populated(t)
	os.WriteFile(path, []byte("gone"), 0o600)
	os.Remove(journalPath(path))
	c, damage, err := openCatalog(path, blobs)
	if err != nil || damage == nil {
		t.Fatal(damage, err)
	}
	defer c.close()
	for _, line := range said(t, &Store{cat: c}, names) {
		if !strings.HasPrefix(line, "dangling ") {
			t.Errorf("after a rebuild without a journal: %s", line)
		}
	}
	sum, err := (&Store{cat: c}).Totals()
	if err != nil || sum.Images != 4 || sum.Dangling != 4 {
		t.Errorf("Totals() = %+v, %v, want 4 dangling images", sum, err)
	}
	agree(t, c)
}

// A journal does not grow for ever, and says the same when it is written anew.
func TestJournalRewrite(t *testing.T) {
	path, blobs, names, _ := populated(t)
	c, _, err := openCatalog(path, blobs)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	c.db.NoSync = true
	fresh := c.journal.fresh
	for c.journal.size >= c.journal.fresh && c.journal.size < 8*slack {
		before := c.journal.size
		if _, err := c.exchange(names[0], names[1]); err != nil {
			t.Fatal(err)
		}
		c.journal.append(c, slices.Repeat([]journalLine{{Op: journalName, Name: &names[0], Image: hashOf("x")}}, 100))
		if c.journal.size < before {
			break
		}
	}
	if c.journal.size > fresh+100 {
		t.Errorf("the journal has %d bytes, want about the %d that it began with", c.journal.size, fresh)
	}
}

// TestCatalogMigration opens a catalogue as version 1 wrote it.
func TestCatalogMigration(t *testing.T) {
	path, blobs, names, want := populated(t)
	asV1(t, path)
	c, damage, err := openCatalog(path, blobs)
	if err != nil || damage != nil {
		t.Fatal(damage, err)
	}
	agree(t, c)
	s := &Store{cat: c}
	if diff := cmp.Diff(want, said(t, s, names)); diff != "" {
		t.Errorf("names after the migration (-before +after):\n%s", diff)
	}
	info, err := s.Image(names[0])
	if err != nil || info.Expanded != -1 || info.Compressed != 104+101 {
		t.Errorf("Image after the migration = %+v, %v", info, err)
	}
	if ch, ok, err := s.Chain(hashOf("diff base")); !ok || err != nil || ch.Created.IsZero() || len(ch.Images) != 2 {
		t.Errorf("Chain after the migration = %+v, %v, %v", ch, ok, err)
	}
	if _, ok := c.viewOf(names[0], info.Digest); !ok {
		t.Error("a view is lost")
	}
	if _, err := c.remove(names[0]); err != nil {
		t.Fatal(err)
	}
	agree(t, c)
	c.close()
	if c, damage, err = openCatalog(path, blobs); err != nil || damage != nil {
		t.Fatal(damage, err)
	}
	c.close()
}

// asV1 turns a catalogue into one of version 1.
func asV1(t *testing.T, path string) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		images, layers := map[string][]byte{}, map[string][]byte{}
		err := tx.Bucket(bucketImages).ForEach(func(k, v []byte) error {
			var rec imageRecord
			if err := json.Unmarshal(v, &rec); err != nil {
				return err
			}
			type layerV1 struct {
				Seq  uint32        `json:"seq"`
				Desc v1.Descriptor `json:"desc"`
			}
			old := struct {
				Config   v1.Hash   `json:"config"`
				Layers   []layerV1 `json:"layers"`
				Created  time.Time `json:"created"`
				Size     int64     `json:"size"`
				Platform string    `json:"platform"`
			}{Config: rec.Config, Created: rec.Created, Size: rec.Size, Platform: rec.Platform}
			for _, l := range rec.Layers {
				old.Layers = append(old.Layers, layerV1{l.Seq, l.Desc})
			}
			images[string(k)], _ = json.Marshal(old)
			return nil
		})
		err = errors.Join(err, tx.Bucket(bucketLayers).ForEach(func(k, v []byte) error {
			var rec layerRecord
			if err := json.Unmarshal(v, &rec); err != nil {
				return err
			}
			n := int64(1234)
			layers[string(k)], _ = json.Marshal(struct {
				Seq      uint32        `json:"seq"`
				Desc     v1.Descriptor `json:"desc"`
				DiffID   v1.Hash       `json:"diffID"`
				Repos    []string      `json:"repos"`
				Expanded *int64        `json:"expanded,omitempty"`
			}{rec.Seq, rec.Desc, rec.DiffID, rec.Repos, &n})
			return nil
		}))
		for k, v := range images {
			err = errors.Join(err, tx.Bucket(bucketImages).Put([]byte(k), v))
		}
		for k, v := range layers {
			err = errors.Join(err, tx.Bucket(bucketLayers).Put([]byte(k), v))
		}
		for _, name := range allBuckets[len(bucketsV1):] {
			err = errors.Join(err, tx.DeleteBucket(name))
		}
		return errors.Join(err, tx.Bucket(bucketMeta).Delete(totalsKey), setCounter(tx.Bucket(bucketMeta), "version", 1))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

// A newer catalogue is refused, and nothing beside it is touched either.
func TestNewerCatalogUntouched(t *testing.T) {
	path, blobs, _, _ := populated(t)
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error { return setCounter(tx.Bucket(bucketMeta), "version", catalogVersion+1) })
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	before, journal := read(t, path), read(t, journalPath(path))
	if _, _, err := openCatalog(path, blobs); err == nil || !strings.Contains(err.Error(), "newer") {
		t.Errorf("openCatalog(newer) = %v, want a refusal", err)
	}
	if !bytes.Equal(before, read(t, path)) || !bytes.Equal(journal, read(t, journalPath(path))) || len(asides(t, path)) > 0 {
		t.Error("a newer catalogue was touched")
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// The store that opens a damaged catalogue tells who watches it, and shows its
// images as before, sizes and all.
func TestOpenDamaged(t *testing.T) {
	h := newHub(t)
	h.push("app", "v1", gzipLayer(t, file("hello", "world")))
	n := h.name("app", "v1")
	dir := t.TempDir()
	open := func() *Store {
		s, err := Open(Options{Dir: dir, CacheSize: 1 << 30, Timeout: 10 * time.Second, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	if err := s.Pull(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	root, err := s.Root(t.Context(), n)
	if err == nil {
		err = s.Settle(t.Context(), root)
	}
	before, err2 := s.Image(n)
	if err := errors.Join(err, err2, s.Close()); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "catalog.db"), 5000); err != nil {
		t.Fatal(err)
	}
	s = open()
	defer s.Close()
	var events []Event
	s.Watch(func(e Event) { events = append(events, e) })
	if len(events) != 1 || events[0].Err == nil || !strings.Contains(events[0].Err.Error(), "made again, with 1 names") {
		t.Errorf("events = %v, want one that says what happened", events)
	}
	after, err := s.Image(n)
	if err != nil || before.Expanded != 5 || after.Expanded != before.Expanded || after.Cached != before.Cached {
		t.Errorf("Image after the rebuild = %+v, %v, want %+v", after, err, before)
	}
	agree(t, s.cat)
}

// FuzzJournal: whatever a journal says, reading it ends, and what it gives has
// names that are names.
func FuzzJournal(f *testing.F) {
	f.Add([]byte(`{"op":"name","name":{"Repo":"u","Tag":"1"},"image":"sha256:` + strings.Repeat("0", 64) + `"}` + "\n{}\n{"))
	f.Add([]byte(`{"op":"dangling","name":{"Repo":"","Tag":""},"image":"x"}`))
	f.Add(bytes.Repeat([]byte("x"), 3*maxJournalLine))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, bad := replayJournal(bytes.NewReader(data))
		if bad > bytes.Count(data, []byte("\n"))+1 {
			t.Errorf("%d bad lines in %d", bad, bytes.Count(data, []byte("\n"))+1)
		}
		for n := range h.names {
			if !n.Valid() {
				t.Errorf("the name %v", n)
			}
		}
	})
}

// A source of blobs that fails does not stop a rebuild.
type noBlobs struct{}

func (noBlobs) Blob(v1.Hash) ([]byte, bool, error) { return nil, false, iofs.ErrPermission }

func TestRebuildWithoutBlobs(t *testing.T) {
	path, _, _, _ := populated(t)
	os.WriteFile(path, []byte("gone"), 0o600)
	c, damage, err := openCatalog(path, noBlobs{})
	if err != nil || damage == nil || !strings.Contains(damage.Error(), fmt.Sprint(4, " names are lost")) {
		t.Fatalf("openCatalog = %v, %v, want 4 names lost", damage, err)
	}
	defer c.close()
	agree(t, c)
}

// A catalogue that could not be made again is left as it was, with its journal, for
// the next time.
func TestRebuildInterrupted(t *testing.T) {
	path, blobs, names, want := populated(t)
	if err := os.Truncate(path, 100); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(filepath.Dir(path), "blobs")
	if err := errors.Join(os.Rename(dir, dir+" away"), os.WriteFile(dir, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if c, _, err := openCatalog(path, blobs); err == nil {
		c.close()
		t.Fatal("a catalogue was made without a directory of blobs")
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 100 || len(asides(t, path)) != 0 {
		t.Errorf("the damaged catalogue was touched: %v, set aside: %v", err, asides(t, path))
	}
	if err := errors.Join(os.Remove(dir), os.Rename(dir+" away", dir)); err != nil {
		t.Fatal(err)
	}
	for round := range 2 {
		c, damage, err := openCatalog(path, blobs)
		if err != nil {
			t.Fatal(err)
		}
		if (damage != nil) != (round == 0) || len(asides(t, path)) != 1 {
			t.Errorf("opened %d times: damage = %v, set aside: %v", round+1, damage, asides(t, path))
		}
		if diff := cmp.Diff(want, said(t, &Store{cat: c}, names)); diff != "" {
			t.Errorf("opened %d times (-want +got):\n%s", round+1, diff)
		}
		c.close()
	}
}

// Lines that were not written whole are in the journal once there is room.
func TestJournalStale(t *testing.T) {
	s, path := testCatalog(t)
	add(t, s.cat, Name{"a", "1"}, "base")
	s.cat.journal.f.Close() // writing fails
	add(t, s.cat, Name{"b", "1"}, "base")
	add(t, s.cat, Name{"c", "1"}, "base")
	h, bad := replayJournal(bytes.NewReader(read(t, journalPath(path))))
	if len(h.names) != 3 || bad != 0 {
		t.Errorf("the journal has the names %v, and %d bad lines", h.names, bad)
	}
}
