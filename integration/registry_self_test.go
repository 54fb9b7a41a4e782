package integration

import (
	"testing"

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
