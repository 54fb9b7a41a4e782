package integration

import (
	"bytes"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// TestCorpus makes every image in every format, pushes it and reads it back, so
// that a fault of the corpus is not taken for one of the mount.
func TestCorpus(t *testing.T) {
	need(t, "docker-registry", "skopeo", "debootstrap", "tar")
	r := startRegistry(t)
	for image := range images {
		for _, format := range formats {
			t.Run(image+"/"+format, func(t *testing.T) {
				if !used(image, format) {
					t.Skip("no test uses it")
				}
				path := r.push(t, image, format)
				ref, err := name.ParseReference(tagSpelling(path))
				if err != nil {
					t.Fatal(err)
				}
				img, err := remote.Image(ref)
				if err != nil {
					t.Fatal(err)
				}
				if image == "nginx" && format == "gzip" {
					if err := validate.Image(img); err != nil {
						t.Error(err)
					}
				}
				m, err := img.Manifest()
				if err != nil {
					t.Fatal(err)
				}
				var total int64
				for _, l := range m.Layers {
					total += l.Size
				}
				t.Logf("%s: %d layers, %d bytes", path, len(m.Layers), total)
			})
		}
	}
}

// used reports whether a test uses the image in that format: the large ones are
// not made in all.
func used(image, format string) bool {
	switch image {
	case "python", "nginx", "plain":
		return true
	case "big":
		return format == "gzip" || format == "estargz" || format == "zstdchunked"
	}
	return format == "gzip" || format == "estargz"
}

// TestProxy checks what the other tests count with.
func TestProxy(t *testing.T) {
	r := startSmall(t)
	data := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	b := bytesBlob(mediaTar, data, data)
	r.pushBlobs(t, "app/v1", b)
	url := "http://" + r.host + "/v2/app/blobs/" + b.Hash.String()
	get := func(rang string) []byte {
		req, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if rang != "" {
			req.Header.Set("Range", rang)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return body
	}
	r.reset()
	if got := get("bytes=100-199"); !bytes.Equal(got, data[100:200]) {
		t.Errorf("a range of 100 bytes gives %d bytes", len(got))
	}
	get("")
	if n, sum, blobs := r.traffic(); n != 2 || sum != int64(len(data))+100 || blobs[b.Hash.String()] != 2 {
		t.Errorf("traffic = %d requests, %d bytes, %v, want 2 and %d\n%s", n, sum, blobs, len(data)+100, r.describe())
	}
	free := r.stallAfter(t, b.Hash, 1000)
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	more := make(chan int)
	go func() { n, _ := resp.Body.Read(make([]byte, 1)); more <- n }()
	select {
	case <-more:
		t.Error("a stalled body goes on")
	case <-time.After(200 * time.Millisecond):
	}
	free()
	if n := <-more; n != 1 {
		t.Errorf("a freed body gives %d bytes, want 1", n)
	}
	r.answer("/manifests/v1", "text/html", []byte("no"))
	if resp, err := http.Get("http://" + r.host + "/v2/app/manifests/v1"); err != nil || resp.Header.Get("Content-Type") != "text/html" {
		t.Errorf("a lie is not told: %v", err)
	}
	r.stop()
	if _, err := http.Get(url); err == nil {
		t.Error("a stopped registry answers")
	}
}
