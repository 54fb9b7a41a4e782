package main

import (
	"net"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func demoPull(t *testing.T, d *demo, tag string) v1.Image {
	t.Helper()
	ref, err := name.ParseReference(d.repository()+":"+tag, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(img); err != nil {
		t.Errorf("%s: %v", tag, err)
	}
	return img
}

func TestDemo(t *testing.T) {
	d, err := startDemo(0)
	if err != nil {
		t.Fatal(err)
	}
	second, err := startDemo(0) // the port is taken now, by d if by nobody else
	if err != nil {
		t.Fatal(err)
	}
	if second.host == d.host {
		t.Errorf("two registries at %s", d.host)
	}

	base, err := demoPull(t, d, "base").Layers()
	if err != nil || len(base) != 1 {
		t.Fatalf("base has %d layers, %v, want 1", len(base), err)
	}
	latest := demoPull(t, d, "latest")
	layers, err := latest.Layers()
	if err != nil || len(layers) != 2 {
		t.Fatalf("latest has %d layers, %v, want 2", len(layers), err)
	}
	low, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := base[0].Digest(); err != nil || got != low {
		t.Errorf("the tags do not share their layer: %v, %v (%v)", got, low, err)
	}
	manifest, err := latest.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	if manifest.Layers[0].Annotations["containerd.io/snapshot/stargz/toc.digest"] == "" {
		t.Error("the first layer has no digest of its table of contents")
	}
	want, err := latest.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := demoPull(t, second, "latest").Digest(); err != nil || got != want {
		t.Errorf("the image is another one at each start: %v, %v (%v)", got, want, err)
	}
	for _, d := range []*demo{second, d} {
		if err := d.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
		if c, err := net.Dial("tcp", "127.0.0.1:"+strings.TrimPrefix(d.host, "localhost:")); err == nil {
			c.Close()
			t.Errorf("%s still answers", d.host)
		}
	}
}

func TestDemoHints(t *testing.T) {
	d := &demo{host: "localhost:" + strconv.Itoa(demoPort)}
	hints := strings.Join(d.hints("/mnt"), "\n")
	if want := "ls /mnt/localhost:5055/demo/latest/etc"; !strings.Contains(hints, want) {
		t.Errorf("hints = %s, want %q in it", hints, want)
	}
}
