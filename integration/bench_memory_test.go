package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
)

// TestBenchMemory is the server's memory after walks over images, and after these
// were read.
func TestBenchMemory(t *testing.T) {
	dir := bench(t)
	out := table{title: "Memory of the server", head: []string{"images", "names", "walked (`find`)", "then read whole (`tar c`)"},
		text: "Resident memory in MB, 25 seconds after, of a new server for each line. Each image is one of the seven, in eStargz, with a layer of its own on top."}
	counts := []int{0, 1, 5, 50}
	r := startRegistry(t)
	refs := memoryImages(t, counts[len(counts)-1])
	for _, n := range counts {
		m := startMount(t)
		resident := func() string {
			time.Sleep(25 * time.Second) // what passed through is given back
			return fmt.Sprintf("%.0f", float64(m.rss())/1e6)
		}
		names := 0
		for _, ref := range refs[:n] {
			names += strings.Count(mustRun(t, "find", m.path(r.host, ref, "latest")), "\n")
		}
		walked := resident()
		for _, ref := range refs[:n] {
			swallow(t, "tar", "-C", m.path(r.host, ref, "latest"), "-c", ".")
		}
		out.add(fmt.Sprint(n), fmt.Sprint(names), walked, resident())
		t.Logf("%d images: %v", n, out.rows[len(out.rows)-1])
		m.stop()
	}
	out.save(t, dir, "memory")
}

// memoryImages pushes n images to the backend: each one of the benchmark's, in
// eStargz, with a layer of its own on top.
func memoryImages(t *testing.T, n int) (refs []string) {
	host := backend.start(t)
	c := openCorpus(t)
	for i := range n {
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
		refs = append(refs, ref)
	}
	return refs
}
