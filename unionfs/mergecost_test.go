package unionfs

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func randomBytes(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, seed))
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	return data
}

// wide is a layer with dirs directories of files files each, below top.
func wide(top string, dirs, files int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s/ ", top)
	for d := range dirs {
		fmt.Fprintf(&b, "%s/d%d/ ", top, d)
		for f := range files {
			fmt.Fprintf(&b, "%s/d%d/f%d ", top, d, f)
		}
	}
	return b.String()
}

// mergeVisits counts the directories whose children a merge asks for.
func mergeVisits(t testing.TB, specs ...string) int {
	t.Helper()
	layers := memLayers(specs...)
	if _, err := mergeTree(t, layers); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, l := range layers {
		n += l.(*memLayer).visits
	}
	return n
}

// TestMergeCost: what a merge looks at grows with the directories in common, not
// with the files.
func TestMergeCost(t *testing.T) {
	const common = "usr/ usr/d1/ usr/d1/new usr/d2/ usr/d2/new"
	small := mergeVisits(t, wide("usr", 10, 1), common)
	large := mergeVisits(t, wide("usr", 1000, 20), common)
	if small != large {
		t.Errorf("directories visited: %d for 10 directories, %d for 1000, want the same", small, large)
	}
	if want := 3 * 2 * 2; large > want { // root, usr, d1, d2 in two layers: once by the upper, once each when written
		t.Errorf("directories visited = %d, want at most %d", large, want)
	}
	apart := mergeVisits(t, wide("a", 1000, 5), wide("b", 1000, 5))
	if apart > 4 {
		t.Errorf("directories visited with nothing in common = %d, want at most 4", apart)
	}
	same := mergeVisits(t, wide("a", 100, 5), wide("a", 100, 5))
	if want := 3 * 102; same != want {
		t.Errorf("directories visited with all in common = %d, want %d", same, want)
	}
}

func TestMergeManyLayers(t *testing.T) {
	var specs []string
	for k := range 200 {
		specs = append(specs, fmt.Sprintf("etc/ etc/f%d etc/d/ etc/d/g%d .wh.x%d", k, k, k-1))
	}
	tree, err := mergeTree(t, memLayers(specs...))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	walkTree(t, tree, func(string, Ref) { n++ })
	if n != 402 {
		t.Errorf("%d entries, want 402", n)
	}
}

func TestMergeDeep(t *testing.T) {
	deep := strings.Repeat("d/", 1000)
	spec := ""
	for i := range 1000 {
		spec += deep[:2*i+2] + " "
	}
	layers := memLayers(spec, spec, spec+deep+"f")
	tree, err := mergeTree(t, layers)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	walkTree(t, tree, func(string, Ref) { n++ })
	if n != 1001 {
		t.Errorf("%d entries, want 1001", n)
	}
	// Each layer hangs its directories below those of the last by a symbolic link.
	specs := []string{spec + "l->" + deep}
	for range 6 {
		specs = append(specs, "l/"+deep+"x .wh.l", "l->"+strings.Repeat(deep, len(specs)/2+1))
	}
	if _, err := mergeTree(t, memLayers(specs...)); err != nil && !strings.Contains(err.Error(), "nested deeper") {
		t.Error(err)
	}
}

// TestMergeLongNames: the names of a directory that are more than maxNameBuffer.
func TestMergeLongNames(t *testing.T) {
	var b strings.Builder
	const n = 2*maxNameBuffer/250 + 1
	for i := range n {
		fmt.Fprintf(&b, "d/%0*d ", 250, i)
	}
	tree, err := mergeTree(t, memLayers("d/ d/x", "d/ "+b.String()))
	if err != nil {
		t.Fatal(err)
	}
	got := 0
	walkTree(t, tree, func(string, Ref) { got++ })
	if got != n+2 {
		t.Errorf("%d entries, want %d", got, n+2)
	}
}

// TestMergeNoName: a symbolic link to what could not be a name.
func TestMergeNoName(t *testing.T) {
	for n, want := range map[int]bool{MaxName: true, MaxName + 1: false} {
		name := strings.Repeat("n", n)
		tree, err := mergeTree(t, memLayers("l->"+name, "l/x"))
		if err != nil {
			t.Fatal(err)
		}
		ref, ok, err := tree.Lookup(tree.Root(), name)
		if ok != want || err != nil {
			t.Errorf("Lookup of %d bytes = %v, %v, %v, want %v", n, ref, ok, err, want)
		}
	}
}

func BenchmarkMerge(b *testing.B) {
	for _, bb := range []struct {
		name         string
		lower, upper string
	}{
		{"overlap=100/files=5e3", wide("usr", 1000, 5), wide("usr", 100, 5)},
		{"overlap=100/files=5e4", wide("usr", 1000, 50), wide("usr", 100, 5)},
		{"overlap=1000/files=5e3", wide("usr", 1000, 5), wide("usr", 1000, 5)},
		{"overlap=1000/files=5e4", wide("usr", 1000, 50), wide("usr", 1000, 5)},
	} {
		b.Run(bb.name, func(b *testing.B) {
			layers := realLayers(b, bb.lower, bb.upper)
			dir := b.TempDir()
			for b.Loop() {
				mergeTo(b, dir, layers)
			}
		})
	}
}

func BenchmarkTreeLookup(b *testing.B) {
	tree, err := mergeTree(b, realLayers(b, wide("usr", 1000, 5), wide("usr", 100, 5)))
	if err != nil {
		b.Fatal(err)
	}
	usr, _, _ := tree.Lookup(tree.Root(), "usr")
	for _, name := range []string{"d5", "d700", "none"} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				dir, ok, err := tree.Lookup(usr, name)
				if err != nil {
					b.Fatal(err)
				}
				if ok {
					tree.Lookup(dir, "f3")
				}
			}
		})
	}
}
