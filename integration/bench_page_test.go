package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// benchParts are the tables of the page, in order.
var benchParts = []string{"link", "cold-100M", "cold-1G", "last-100M", "last-1G", "last-unlimited", "warm", "memory", "growth"}

// TestBenchZPage makes docs/benchmarks.md of the tables that are there: those of this
// run, and of earlier ones in the same directory. It runs after the others.
func TestBenchZPage(t *testing.T) {
	dir := bench(t)
	var page bytes.Buffer
	intro, err := os.ReadFile("testdata/benchmarks.md")
	if err != nil {
		t.Fatal(err)
	}
	page.Write(bytes.Replace(intro, []byte("MACHINE"), []byte(machine()), 1))
	for _, p := range benchParts {
		data, err := os.ReadFile(filepath.Join(dir, p+".md"))
		if os.IsNotExist(err) {
			t.Logf("no table %s", p)
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		page.WriteString("\n")
		page.Write(data)
	}
	if err := os.WriteFile("../docs/benchmarks.md", page.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	plot, err := os.ReadFile(filepath.Join(dir, "growth.png"))
	if err == nil {
		err = os.WriteFile("../docs/benchmarks-growth.png", plot, 0o644)
	}
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
}

// TestBenchLink compares the link that the benchmarks use with the ideal time of one
// blob over it.
func TestBenchLink(t *testing.T) {
	dir := bench(t)
	out := table{title: "The link", head: []string{"link", "blob", "ideal", "measured"}, text: "One `curl` of the largest layer."}
	for _, l := range benchLinks {
		r := startRegistry(t)
		r.through(l.link)
		b := &coldBench{t: t, image: benchImages[0], r: r}
		b.push("gzip")
		blob := openCorpus(t).layer(t, "base", "gzip")
		var samples []sample
		for range benchRuns(t) {
			samples = append(samples, timed(func() {
				mustRun(t, "curl", "-sf", "-o", "/dev/null", "http://"+r.host+"/v2/debian/blobs/"+blob.Hash.String())
			}))
		}
		out.add(l.link.String(), megabytes(blob.Length), seconds(l.link.ideal(blob.Length)), seconds(median(samples).time))
	}
	out.save(t, dir, "link")
}
