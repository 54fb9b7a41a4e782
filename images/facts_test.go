package images

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/fetch/registrytest"
)

// lazyLayer is an eStargz layer with chunks of 64 KiB.
func lazyLayer(t *testing.T, entries ...*tar.Header) mutate.Addendum {
	t.Helper()
	r, err := gzipLayer(t, entries...).Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	built, err := estargz.Build(io.NewSectionReader(bytes.NewReader(raw), 0, int64(len(raw))), estargz.WithChunkSize(64<<10))
	if err != nil {
		t.Fatal(err)
	}
	defer built.Close()
	blob, err := io.ReadAll(built)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(blob)), nil })
	if err != nil {
		t.Fatal(err)
	}
	return mutate.Addendum{Layer: l, Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: built.TOCDigest().String()}}
}

// pushAll pushes an image of layers with annotations.
func (h *hub) pushAll(repo, tag string, layers ...mutate.Addendum) v1.Image {
	h.t.Helper()
	img, err := mutate.Append(empty.Image, layers...)
	if err != nil {
		h.t.Fatal(err)
	}
	h.Push(h.t, repo+":"+tag, img)
	return img
}

// facts are the facts of ino, but for those with nothing to say.
func (h *hub) facts(ino Ino) map[string]string {
	h.t.Helper()
	all := map[string]string{}
	for _, f := range []string{"image", "id", "digest", "layer", "compressed", "size", "shared", "cached", "method", "error", "nonsense"} {
		v, ok, err := h.Fact(context.Background(), ino, f)
		if err != nil {
			h.t.Errorf("Fact(%v, %q) = %v", ino, f, err)
		}
		if ok {
			all[f] = v
		}
	}
	return all
}

func sameFacts(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	for f := range got {
		if got[f] != want[f] {
			t.Errorf("%s: %s is %q, want %q", what, f, got[f], want[f])
		}
	}
	for f := range want {
		if _, ok := got[f]; !ok {
			t.Errorf("%s: %s says nothing, want %q", what, f, want[f])
		}
	}
}

func TestFacts(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	body := noise(200 << 10)
	lazy := lazyLayer(t, file("etc/", ""), file("etc/big", body), file("etc/empty", ""))
	plain := gzipLayer(t, file("usr/", ""), file("usr/hello", "world"))
	img := h.pushAll("app", "v1", lazy, mutate.Addendum{Layer: plain})
	h.pushAll("other", "v1", lazy)
	one, two := h.name("app", "v1"), h.name("other", "v1")
	root := h.root(one)
	if err := h.Settle(ctx, root); err != nil {
		t.Fatal(err)
	}
	h.root(two)
	manifest, _ := img.Digest()
	id, _ := img.ConfigName()
	etc := h.lookup(root, "etc")
	big, none := h.lookup(etc, "big"), h.lookup(etc, "empty")
	hello := h.lookup(h.lookup(root, "usr"), "hello")
	lazySize, _ := lazy.Layer.Size()
	plainSize, _ := plain.Size()
	expanded := int64(len(body) + 5)
	image := map[string]string{"image": one.String(), "id": id.String(), "digest": manifest.String(), "layer": digestOf(t, lazy.Layer).String(),
		"compressed": fmt.Sprint(lazySize + plainSize), "size": fmt.Sprint(expanded), "shared": fmt.Sprint(len(body)),
		"cached": "4096", "method": "eStargz"}
	sameFacts(t, "a directory of an image", h.facts(etc), image)
	image["layer"], image["method"] = digestOf(t, plain).String(), "gzip"
	sameFacts(t, "usr", h.facts(h.lookup(root, "usr")), image)

	both := []string{one.String(), two.String()}
	file := map[string]string{"image": strings.Join(both, " "), "digest": hashOf(body).String(), "layer": digestOf(t, lazy.Layer).String(),
		"size": fmt.Sprint(len(body)), "shared": fmt.Sprint(len(body)), "cached": "0", "method": "eStargz"}
	got := h.facts(big)
	file["compressed"] = got["compressed"] // noise with a few bytes for each gzip member
	if n := got["compressed"]; len(n) != 6 || n < "204800" || n > "206000" {
		t.Errorf("compressed of a file of %d bytes that do not compress = %q", len(body), n)
	}
	sameFacts(t, "a file of a lazy layer", got, file)
	if _, err := h.ReadAt(ctx, big, make([]byte, 10), 0); err != nil {
		t.Fatal(err)
	}
	if n, err := h.CachedBytes(ctx, big); err != nil || n == 0 || n%(64<<10) != 0 && n != int64(len(body)) {
		t.Errorf("CachedBytes after a read of its beginning = %d, %v", n, err)
	}
	for off := 0; off < len(body); off += 64 << 10 {
		if _, err := h.ReadAt(ctx, big, make([]byte, 10), int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	file["cached"] = fmt.Sprint(len(body))
	sameFacts(t, "a file that is here", h.facts(big), file)
	sameFacts(t, "a file of a plain layer", h.facts(hello), map[string]string{"image": one.String(), "digest": hashOf("world").String(),
		"layer": digestOf(t, plain).String(), "size": "5", "shared": "0", "cached": "5", "method": "gzip"})
	sameFacts(t, "an empty file", h.facts(none), map[string]string{"image": file["image"], "digest": hashOf("").String(),
		"layer": file["layer"], "compressed": "0", "size": "0", "shared": "0", "cached": "0", "method": "eStargz"})
	sameFacts(t, "a node of the namespace", h.facts(RootIno), nil)
	sameFacts(t, "a layer alone", h.facts(h.layerRoot(plain)), map[string]string{"image": one.String(), "digest": digestOf(t, plain).String(),
		"layer": digestOf(t, plain).String(), "compressed": fmt.Sprint(plainSize), "size": "5", "shared": "0", "cached": "4096", "method": "gzip"})
}

// TestDetails describes an image, then again when its manifest and config are gone
// from this disk.
func TestDetails(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	plain := gzipLayer(t, file("usr/hello", "world"))
	lazy := lazyLayer(t, file("etc/x", "y"))
	img := h.pushAll("app", "v1", lazy, mutate.Addendum{Layer: plain})
	n := h.name("app", "v1")
	if err := h.Settle(ctx, h.root(n)); err != nil {
		t.Fatal(err)
	}
	manifest, _ := img.RawManifest()
	config, _ := img.RawConfigFile()
	digest, _ := img.Digest()
	id, _ := img.ConfigName()
	for _, when := range []string{"from this disk", "from the registry", "from this disk again"} {
		before := h.Requests("manifests")
		d, err := h.Details(ctx, n)
		if err != nil {
			t.Fatalf("Details %s = %v", when, err)
		}
		if !bytes.Equal(d.RawManifest, manifest) || !bytes.Equal(d.RawConfig, config) || d.Digest != digest || d.ID != id {
			t.Errorf("Details %s = %+v", when, d)
		}
		if asked := h.Requests("manifests") - before; asked > 0 != (when == "from the registry") {
			t.Errorf("Details %s asks %d times", when, asked)
		}
		if len(d.Names) != 1 || d.Names[0] != n || len(d.Layers) != 2 {
			t.Fatalf("Details %s = names %v, %d layers", when, d.Names, len(d.Layers))
		}
		if l := d.Layers[0]; l.Method != "eStargz" || !l.Lazy || l.Why != "" || l.State != "indexed" || l.Digest != digestOf(t, lazy.Layer) {
			t.Errorf("the lazy layer is %+v", l)
		}
		if l := d.Layers[1]; l.Method != "gzip" || l.Lazy || l.Why == "" || l.State != "indexed" || l.Expanded != 5 || l.Usage != 512 || l.Cached != 4096 {
			t.Errorf("the plain layer is %+v", l)
		}
		if when == "from this disk" {
			h.remove(digest, id)
		}
	}
	all, err := h.Layers()
	if err != nil || len(all) != 2 {
		t.Fatalf("Layers() = %d, %v", len(all), err)
	}
	for _, l := range all {
		if one, ok, err := h.Layer(l.Key); one != l || !ok || err != nil {
			t.Errorf("Layer(%s) = %+v, %v, %v, Layers says %+v", l.Key, one, ok, err, l)
		}
	}
	if _, ok, err := h.Layer(hashOf("none")); ok || err != nil {
		t.Errorf("Layer of none = %v, %v", ok, err)
	}
}

// remove takes blobs from this disk.
func (h *hub) remove(blobs ...v1.Hash) {
	h.t.Helper()
	for _, b := range blobs {
		if err := h.cache.Remove(cache.Blob, b); err != nil {
			h.t.Fatal(err)
		}
	}
}

// TestDetailsDangling describes an image that has no name any more, and whose
// manifest is asked for where its layers were.
func TestDetailsDangling(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	n := h.name("app", "v1")
	img := h.push("app", "v1", gzipLayer(t, file("old", "1")))
	h.root(n)
	h.push("app", "v1", gzipLayer(t, file("new", "2")))
	if _, err := h.Update(ctx, n); err != nil {
		t.Fatal(err)
	}
	id, _ := img.ConfigName()
	digest, _ := img.Digest()
	raw, _ := img.RawManifest()
	h.remove(digest, id)
	dangling := Name{DanglingDir, id.Hex}
	d, err := h.Details(ctx, dangling)
	if err != nil || !bytes.Equal(d.RawManifest, raw) || len(d.Names) != 0 || !d.Dangling {
		t.Fatalf("Details of a dangling image = %+v, %v", d, err)
	}
	root, err := h.Root(ctx, dangling)
	if err != nil {
		t.Fatal(err)
	}
	if got := h.facts(root); got["image"] != "<none>" || got["id"] != id.String() || got["size"] != "1" {
		t.Errorf("facts of a dangling image are %v", got)
	}
	h.remove(digest, id)
	h.Add(&registrytest.Fault{Status: 404})
	if _, err := h.Details(ctx, dangling); err == nil {
		t.Error("Details of an image whose manifest is nowhere succeeds")
	}
}

// TestErrorFact breaks a layer, and reads why.
func TestErrorFact(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	l := gzipLayer(t, file("first", "1"), file("rest", noise(4<<20)))
	h.push("app", "v1", l)
	stall := &registrytest.Fault{Path: digestOf(t, l).String(), Stall: 1 << 20}
	h.Add(stall)
	root := h.root(h.name("app", "v1"))
	first := h.lookup(root, "first")
	if _, ok, err := h.Fact(ctx, first, "error"); ok || err != nil {
		t.Errorf("an error before there is one: %v, %v", ok, err)
	}
	h.Clear()
	h.Add(&registrytest.Fault{Path: digestOf(t, l).String(), Status: 404})
	stall.Release()
	lay, err := h.layer(first.seq())
	if err != nil {
		t.Fatal(err)
	}
	st := lay.state.Load()
	lay.stop() // as a broken connection that cannot be resumed
	<-st.settled
	for _, ino := range []Ino{root, first} {
		if v, ok, err := h.Fact(ctx, ino, "error"); !ok || v == "" || err != nil {
			t.Errorf("Fact(error) = %q, %v, %v", v, ok, err)
		}
	}
	if li, ok, err := h.Layer(digestOf(t, l)); !ok || err != nil || li.Err == "" || li.State != stateClosed {
		t.Errorf("Layer = %+v, %v, %v", li, ok, err)
	}
}

// The images of a file are those that have a name now, at most 16.
func TestFactNames(t *testing.T) {
	h := newHub(t)
	h.push("app", "v1", gzipLayer(t, file("hello", "world")))
	one, two := h.name("app", "v1"), h.name("app", "v2")
	root := h.root(one)
	if err := h.Settle(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	hello := h.lookup(root, "hello")
	keep := func(n Name) {
		t.Helper()
		if _, err := h.cat.write(func(tx *txn) error {
			rec, _, err := tx.lookup(one)
			if err == nil {
				err = tx.name(n, rec)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	keep(two)
	if got := h.facts(hello)["image"]; got != one.String()+" "+two.String() {
		t.Errorf("the images are %q", got)
	}
	if _, err := h.cat.remove(two); err != nil {
		t.Fatal(err)
	}
	if got := h.facts(hello)["image"]; got != one.String() {
		t.Errorf("the images are %q after one was removed", got)
	}
	for i := range 20 {
		keep(h.name("app", fmt.Sprint("t", i)))
	}
	if got := strings.Fields(h.facts(hello)["image"]); len(got) != maxFactNames {
		t.Errorf("the images are %q", got)
	}
}
