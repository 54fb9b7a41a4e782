package integration

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	kgzip "github.com/klauspost/compress/gzip"
)

// growthFiles and growthLayers are the sizes of images whose cost is compared.
var (
	growthFiles  = []int{1_000, 10_000, 100_000, 1_000_000}
	growthLayers = []int{1, 10, 100, 127}
)

// growth is what one image costs.
type growth struct {
	n      int           // files, or layers
	index  time.Duration // from nothing to the whole tree listed: pass, index, merge
	first  time.Duration // the first ls, on a server that has just started
	find   time.Duration // find over everything, after that
	memory int64         // of the server, after that
}

// TestBenchGrowth is how cost grows with the files of an image and with its layers.
func TestBenchGrowth(t *testing.T) {
	dir := bench(t)
	out := table{title: "How cost grows", head: []string{"image", "pass, index and merge", "per file", "first `ls` after a restart", "`find` after that", "memory"},
		text: "Layers of plain gzip with files of a few bytes; the registry is on this machine, without a link. A tenth of the files of the first rows is in a second layer."}
	var byFiles, byLayers []growth
	for _, n := range growthFiles {
		g := growthOf(t, n, 2)
		byFiles = append(byFiles, g)
		out.add(g.row(fmt.Sprintf("%d files", n), n)...)
	}
	for _, n := range growthLayers {
		g := growthOf(t, 10_000, n)
		g.n = n
		byLayers = append(byLayers, g)
		out.add(g.row(fmt.Sprintf("10000 files in %d layers", n), 10_000)...)
	}
	a, b := byFiles[len(byFiles)-2], byFiles[len(byFiles)-1]
	ideal := float64(b.n) * math.Log(float64(b.n)) / (float64(a.n) * math.Log(float64(a.n)))
	out.after = fmt.Sprintf("From %d to %d files the first column grows %.1f-fold; n log n would be %.1f-fold.\n\n![How cost grows](benchmarks-growth.png)",
		a.n, b.n, float64(b.index)/float64(a.index), ideal)
	if have("gnuplot") {
		plotGrowth(t, dir, byFiles, byLayers)
	}
	out.save(t, dir, "growth")
}

func (g growth) row(name string, files int) []string {
	return []string{name, seconds(g.index), fmt.Sprintf("%.2g µs", float64(g.index.Microseconds())/float64(files)), seconds(g.first), seconds(g.find),
		fmt.Sprintf("%.0f MB", float64(g.memory)/1e6)}
}

// growthOf brings an image of that many files in that many layers.
func growthOf(t *testing.T, files, layers int) growth {
	t.Helper()
	r := startRegistry(t)
	var list []blob
	if layers == 2 {
		list = []blob{growthLayer(t, 0, files-files/10), growthLayer(t, files-files/10, files/10)}
	} else {
		for i := range layers {
			list = append(list, growthLayer(t, i*(files/layers), files/layers))
		}
	}
	img, err := newImage(list...)
	if err != nil {
		t.Fatal(err)
	}
	pushImage(t, fmt.Sprintf("%s/growth/f%d:l%d", backend.start(t), files, layers), img)
	m := startMount(t)
	root := m.path(r.host, fmt.Sprint("growth/f", files), fmt.Sprint("l", layers))
	g := growth{n: files}
	took := func(argv ...string) time.Duration {
		start := time.Now()
		swallow(t, argv[0], argv[1:]...)
		return time.Since(start)
	}
	g.index = took("ls", root)
	m.restart()
	g.first = took("ls", root)
	g.find = took("find", root)
	g.memory = m.rss()
	m.stop()
	return g
}

// growthLayer is a layer of n files, the first of which has the number from, a
// hundred in each directory.
func growthLayer(t *testing.T, from, n int) blob {
	t.Helper()
	var list []entry
	for i := from; i < from+n; i++ {
		if i == from || i%100 == 0 {
			list = append(list, dir(fmt.Sprintf("srv/%02d/%04d", i/10_000, i/100)))
		}
		list = append(list, file(fmt.Sprintf("srv/%02d/%04d/file-%d.txt", i/10_000, i/100, i), fmt.Sprintln(i)))
	}
	top := t.TempDir()
	archive, path := filepath.Join(top, "tar"), filepath.Join(top, "gz")
	if err := writeFile(archive, func(w io.Writer) error { return writeTar(w, list) }); err != nil {
		t.Fatal(err)
	}
	if err := compress(archive, path, func(w io.Writer) (io.WriteCloser, error) { return kgzip.NewWriterLevel(w, 1) }); err != nil {
		t.Fatal(err)
	}
	b := blob{Media: mediaGzip, Path: path}
	var err error
	if b.Diff, _, err = hashFile(archive); err == nil {
		b.Hash, b.Length, err = hashFile(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(archive)
	return b
}

// plotGrowth draws the curves beside n log n.
func plotGrowth(t *testing.T, dir string, byFiles, byLayers []growth) {
	t.Helper()
	data := func(list []growth) string {
		var b strings.Builder
		for _, g := range list {
			fmt.Fprintln(&b, g.n, g.index.Seconds(), g.first.Seconds(), g.find.Seconds(), float64(g.memory)/1e6)
		}
		return b.String()
	}
	last := byFiles[len(byFiles)-1]
	n := float64(last.n)
	script := fmt.Sprintf(`set terminal pngcairo size 1200,480 font "sans,10"
set output %q
$files << E
%sE
$layers << E
%sE
set multiplot layout 1,2
set logscale xy; set grid; set key top left; set ylabel "seconds, or MB"
set xlabel "files"
plot $files u 1:2 w lp t "pass, index, merge", $files u 1:3 w lp t "first ls after a restart", $files u 1:4 w lp t "find after that", $files u 1:5 w lp t "memory (MB)", %g*x*log(x) w l dt 2 t "n log n"
set xlabel "layers, of 10,000 files together"
plot $layers u 1:2 w lp t "pass, index, merge", $layers u 1:3 w lp t "first ls after a restart", $layers u 1:4 w lp t "find after that", $layers u 1:5 w lp t "memory (MB)"
`, filepath.Join(dir, "growth.png"), data(byFiles), data(byLayers), last.index.Seconds()/(n*math.Log(n)))
	cmd := exec.Command("gnuplot")
	cmd.Stdin = bytes.NewReader([]byte(script))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("gnuplot: %v\n%s", err, out)
	}
}
