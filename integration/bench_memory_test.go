package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
)

// TestBenchMemory is the server's memory after walks over ever more images, and
// after all of them were read.
func TestBenchMemory(t *testing.T) {
	dir := bench(t)
	out := table{title: "Memory of the server", head: []string{"images", "walked (`find`)", "read whole (`tar c`)"},
		text: "Resident memory in MB, two seconds after. Each image is one of the seven, in eStargz, with a layer of its own on top."}
	const most = 50
	r := startRegistry(t)
	host := backend.start(t)
	c := openCorpus(t)
	var roots []string
	m := startMount(t)
	for i := range most {
		image := benchImages[i%len(benchImages)]
		var layers []blob
		for _, l := range image.layerNames() {
			layers = append(layers, c.layer(t, l, "estargz"))
		}
		archive := tarball(t, file(fmt.Sprintf("srv/variant-%d", i), fmt.Sprint(i)))
		layers = append(layers, bytesBlob(types.OCILayer, gzipped(archive), archive))
		img, err := newImage(layers...)
		if err != nil {
			t.Fatal(err)
		}
		ref := fmt.Sprintf("memory/v%d", i)
		pushImage(t, host+"/"+ref+":latest", img)
		roots = append(roots, m.path(r.host, ref, "latest"))
	}
	resident := func() string {
		time.Sleep(2 * time.Second) // what was fetched is over
		return fmt.Sprintf("%.0f", float64(m.rss())/1e6)
	}
	out.add("0", resident(), "")
	var names int
	walked := map[int]string{}
	for i, root := range roots {
		names += strings.Count(mustRun(t, "find", root), "\n")
		if n := i + 1; n == 1 || n == 5 || n == most {
			walked[n] = resident()
		}
	}
	read := map[int]string{}
	for i, root := range roots {
		swallow(t, "tar", "-C", root, "-c", ".")
		if n := i + 1; n == 1 || n == 5 || n == most {
			read[n] = resident()
		}
	}
	for _, n := range []int{1, 5, most} {
		out.add(fmt.Sprint(n), walked[n], read[n])
	}
	out.after = fmt.Sprintf("The walks saw %d names. What was read whole was read after all %d had been walked.", names, most)
	out.save(t, dir, "memory")
}
