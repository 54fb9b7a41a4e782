package fs

import (
	"strings"
	"testing"

	"github.com/imgfs/imgfs/images"
)

const someDigest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestSpelling(t *testing.T) {
	for _, c := range []struct{ dir, name, target string }{
		{"", "ubuntu:18.04", "ubuntu/18.04"},
		{"", "redis:7", "redis/7"},
		{"", "ubuntu@" + someDigest, "ubuntu/@" + someDigest},
		{"", "ubuntu:18.04@" + someDigest, "ubuntu/@" + someDigest},
		{"bitnami", "redis:7.2", "redis/7.2"},
		{"localhost:5000/team", "app:v1", "app/v1"},
		{"localhost:5000", "app:8080", "app/8080"},
		{"", "docker.io", "."},
		{"", "library", "."},
		{"", "localhost:5000", ""},
		{"", "myhost:5000", ""},
		{"", "ubuntu", ""},
		{"", "Ubuntu:18.04", ""},
		{"", "ubuntu:", ""},
		{"", ":18.04", ""},
		{"", "ubuntu:-x", ""},
		{"", "@" + someDigest, ""},
		{"", "ubuntu@sha256:12", ""},
		{"a/b", "c:1", ""}, // too deep for Docker Hub
	} {
		target, ok := spelling(c.dir, c.name)
		if !ok {
			target = ""
		}
		if target != c.target {
			t.Errorf("spelling(%q, %q) = %q, want %q", c.dir, c.name, target, c.target)
		}
	}
}

// What is taken for docker's spelling leads to a name that can be an image, in
// the same directory, and the path of the link is read back as the same link.
func FuzzSpelling(f *testing.F) {
	for _, s := range []string{"ubuntu:18.04", "a@" + someDigest, "a:b@" + someDigest, "localhost:5000", "..", "a/b:c", "docker.io", "a:1:2", "@:"} {
		f.Add("", s)
		f.Add("localhost:5000/x", s)
	}
	f.Fuzz(func(t *testing.T, dir, name string) {
		if name == "" || strings.ContainsAny(name, "/\x00") || len(name) > 255 {
			return // the kernel sends no such name
		}
		target, ok := spelling(dir, name)
		if !ok || target == "." {
			return
		}
		repo, tag, _ := strings.Cut(target, "/")
		n := images.Name{Repo: join(dir, repo), Tag: tag}
		if !n.Valid() {
			t.Errorf("spelling(%q, %q) = %q, which is no image's name", dir, name, target)
		}
		if strings.Contains(tag, "/") || repo == ".." || repo == "." {
			t.Errorf("spelling(%q, %q) = %q leaves its directory", dir, name, target)
		}
		if again, ok := linkTarget(join(dir, name)); !ok || again != target {
			t.Errorf("linkTarget(%q) = %q, %v, want %q", join(dir, name), again, ok, target)
		}
	})
}
