package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// fakeMount is a directory that looks like a mount with some images: what the
// commands read is there, what they change is not followed up.
type fakeMount struct {
	t       *testing.T
	dir     string
	records []record
}

// id is an image ID that begins with a word of hexadecimal digits.
func id(begin string) string { return "sha256:" + begin + strings.Repeat("0", 64-len(begin)) }

func newFakeMount(t *testing.T, records ...record) *fakeMount {
	t.Helper()
	m := &fakeMount{t: t, dir: t.TempDir(), records: records}
	m.write(".imgfs/images.json", records)
	m.write(".imgfs/errors.json", json.RawMessage(`{}`))
	names := map[string][]string{}
	for _, r := range records {
		if !r.Dangling {
			names[r.ID] = append(names[r.ID], r.ref())
		}
	}
	for _, r := range records {
		if err := os.MkdirAll(filepath.Join(m.dir, r.path()), 0o755); err != nil {
			t.Fatal(err)
		}
		slices.Sort(names[r.ID])
		m.write(".imgfs/meta/"+r.path()+"/size.json", r)
		m.write(".imgfs/meta/"+r.path()+"/names.json", names[r.ID])
		for _, prefix := range []string{hexOf(r.ID), hexOf(r.ID)[:12], hexOf(r.ID)[:3]} {
			m.link(r, prefix)
		}
	}
	return m
}

// link makes the entry of ids for a beginning of an image's ID; the first image
// that has it wins.
func (m *fakeMount) link(r record, prefix string) {
	m.t.Helper()
	target := "../../" + r.path()
	if r.Dangling {
		target = "../dangling/" + hexOf(r.ID)
	}
	file := filepath.Join(m.dir, ".imgfs/ids", prefix)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Symlink(target, file); err != nil && !os.IsExist(err) {
		m.t.Fatal(err)
	}
}

func (m *fakeMount) write(path string, v any) {
	m.t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		m.t.Fatal(err)
	}
	file := filepath.Join(m.dir, path)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		m.t.Fatal(err)
	}
}

var fakeTime = time.Date(2020, time.March, 1, 12, 0, 0, 0, time.UTC)

// seedRecords are images as in docker's own documentation: two tags of one image,
// one image that has lost its tag.
func seedRecords() []record {
	return []record{
		{Repository: "mongo", Tag: "3.2", ID: id("fb885d89ea5c"), Digest: id("d1"), Manifest: id("e1"), Created: fakeTime.Add(3 * time.Hour), Size: 300e6, Shared: 100e6, Unique: 200e6, Compressed: 90e6, Cached: 1e6},
		{Repository: "redis", Tag: "latest", ID: id("a4fe14ff1981"), Digest: id("d2"), Manifest: id("e2"), Created: fakeTime.Add(2 * time.Hour), Size: 105e6},
		{Repository: "ubuntu", Tag: "18.04", ID: id("329ed837d508"), Digest: id("d3"), Manifest: id("e3"), Created: fakeTime.Add(time.Hour), Size: 63e6},
		{Repository: "ubuntu", Tag: "latest", ID: id("329ed837d508"), Digest: id("d3"), Manifest: id("e3"), Created: fakeTime.Add(time.Hour), Size: 63e6},
		{Repository: "ubuntu", Tag: noTag, ID: id("329ed837d508"), Digest: id("d3"), Manifest: id("e3"), Created: fakeTime.Add(time.Hour), Size: 63e6},
		{Repository: noTag, Tag: noTag, Dangling: true, ID: id("0a4fe1111111"), Manifest: id("e4"), Created: fakeTime, Size: 299e6},
	}
}
