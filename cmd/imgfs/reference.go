package main

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

// image is a name of an image, in docker's spelling and as a path of the mount.
type image struct {
	ref  string // "debian:12", "localhost:5000/team/app:v1"
	path string // below the mount: "debian/12", "localhost:5000/team/app/v1"
}

// parseImage reads what docker pull takes, or a path to an image below mount
// ("/…", "./…" or "../…").
func parseImage(mount, text string) (image, error) {
	if filepath.IsAbs(text) || strings.HasPrefix(text, "./") || strings.HasPrefix(text, "../") {
		return imageAtPath(mount, text)
	}
	ref, err := name.ParseReference(text)
	if err != nil {
		return image{}, usagef("%q: not a name of an image (%v)", text, err)
	}
	repo := ref.Context().RepositoryStr()
	if ref.Context().RegistryStr() == name.DefaultRegistry {
		if short, ok := strings.CutPrefix(repo, "library/"); ok && !strings.Contains(short, "/") {
			repo = short
		}
	} else {
		repo = ref.Context().RegistryStr() + "/" + repo
	}
	if digest, ok := ref.(name.Digest); ok {
		return image{repo + "@" + digest.DigestStr(), repo + "/@" + digest.DigestStr()}, nil
	}
	return image{repo + ":" + ref.Identifier(), repo + "/" + ref.Identifier()}, nil
}

// imageAtPath is the image whose directory is path.
func imageAtPath(mount, path string) (image, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return image{}, fmt.Errorf("%q: %w", path, err)
	}
	rel, err := filepath.Rel(mount, abs)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return image{}, fmt.Errorf("%q: not below the mount %q", path, mount)
	}
	repo, tag := filepath.Split(rel)
	// No tag has a colon: this is docker's spelling, which is a path here, too.
	if strings.IndexAny(tag, ":@") > 0 {
		return parseImage(mount, rel)
	}
	repo = strings.TrimSuffix(repo, "/")
	if repo == "" || strings.HasPrefix(repo, control) {
		return image{}, usagef("%q: not a path to an image, as %s/debian/12 is", path, mount)
	}
	sep := ":"
	if strings.HasPrefix(tag, "@") {
		sep = ""
	}
	return image{repo + sep + tag, rel}, nil
}
