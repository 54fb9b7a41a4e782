package main

import (
	"encoding/json"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// found is an image that is here, as an argument of a command named it.
type found struct {
	record
	name image // for an ID the first of its names
	byID bool  // the argument was an ID, not a name
}

// notHere reports an argument that stands for no image, in docker's words.
type notHere struct{ name string }

func (e notHere) Error() string { return "No such image: " + e.name }

// idForm is what may be the ID of an image, or the beginning of one.
var idForm = regexp.MustCompile(`^(sha256:)?[0-9a-f]{1,64}$`)

// resolve finds the image that arg stands for: a name, a name with a digest, a
// path below the mount, or an ID, whole or its beginning. A name wins over an ID.
// It never pulls. The error for an image that is not here is notHere.
func resolve(mount, arg string) (found, error) {
	if rel, ok := controlPath(mount, arg); ok {
		return resolveControl(mount, arg, rel)
	}
	want, err := parseImage(mount, arg)
	if err != nil && !idForm.MatchString(arg) {
		return found{}, err
	}
	if err == nil {
		r, err := recordAt(mount, want.path)
		if err == nil {
			return found{record: r, name: want}, nil
		}
		if !errors.Is(err, unix.ENOENT) {
			return found{}, err
		}
		// An image is here by the digest of its tag, too.
		if strings.Contains(want.path, "/@") {
			if r, ok := findDigest(mount, want); ok {
				return found{record: r, name: image{ref: want.ref, path: r.path()}}, nil
			}
		}
	}
	if idForm.MatchString(arg) {
		f, err := resolveID(mount, arg)
		if err == nil || !errors.As(err, new(notHere)) {
			return f, err
		}
	}
	if want.ref == "" || strings.HasPrefix(arg, "sha256:") {
		return found{}, notHere{arg}
	}
	return found{}, notHere{want.ref}
}

// controlPath is the path below the mount of an argument that names something in
// the control directory: another platform's image, or one by its ID.
func controlPath(mount, arg string) (rel string, ok bool) {
	abs := arg
	switch {
	case strings.HasPrefix(arg, control+"/"):
		abs = filepath.Join(mount, arg)
	case filepath.IsAbs(arg), strings.HasPrefix(arg, "./"), strings.HasPrefix(arg, "../"):
		var err error
		if abs, err = filepath.Abs(arg); err != nil {
			return "", false
		}
	default:
		return "", false
	}
	rel, err := filepath.Rel(mount, abs)
	return rel, err == nil && strings.HasPrefix(rel, control+"/")
}

func resolveControl(mount, arg, rel string) (found, error) {
	parts := strings.Split(rel, "/")
	switch {
	case (parts[1] == "ids" || parts[1] == "dangling") && len(parts) == 3 && idForm.MatchString(parts[2]):
		return resolveID(mount, parts[2])
	case parts[1] == "platforms" && len(parts) >= 5:
		r, err := recordAt(mount, rel)
		if errors.Is(err, unix.ENOENT) {
			return found{}, notHere{arg}
		}
		return found{record: r, name: imageOf(rel)}, err
	}
	return found{}, usagef("%q: not a path to an image, as %s/debian/12 is", arg, mount)
}

// errMoved reports that the first name of an image stands for another by now.
var errMoved = errors.New("its names are being changed; try again")

// resolveID finds an image by its ID or the beginning of it.
func resolveID(mount, id string) (f found, err error) {
	for range 5 {
		if f, err = readID(mount, id); err != errMoved {
			return f, err
		}
	}
	return found{}, fmt.Errorf("%q: %w", id, err)
}

// readID follows the link of an ID.
func readID(mount, id string) (found, error) {
	hex := strings.TrimPrefix(id, "sha256:")
	start := time.Now().Add(-time.Second)
	dir := filepath.Join(control, "ids")
	target, err := os.Readlink(filepath.Join(mount, dir, hex))
	if err != nil {
		if !errors.Is(err, unix.ENOENT) {
			return found{}, fmt.Errorf("%q: %w", id, cause(err))
		}
		if why := reason(mount, image{path: filepath.Join(dir, hex)}, start); strings.Contains(why, "ambiguous") {
			return found{}, fmt.Errorf("%q: %s", id, ambiguity(why))
		}
		return found{}, notHere{id}
	}
	path := filepath.Join(dir, target)
	r, err := recordAt(mount, path)
	if errors.Is(err, unix.ENOENT) || err == nil && !strings.HasPrefix(hexOf(r.ID), hex) {
		return found{}, errMoved // since the link was read
	}
	return found{record: r, name: imageOf(path), byID: true}, err
}

// ambiguity is what the server says of an ambiguous ID, without the words before
// and after, and with IDs as people see them.
func ambiguity(why string) string {
	why = why[strings.Index(why, "ambiguous"):]
	why = strings.TrimSuffix(why, ": "+iofs.ErrNotExist.Error())
	return wholeID.ReplaceAllStringFunc(why, shortHex)
}

var wholeID = regexp.MustCompile(`(sha256:)?[0-9a-f]{64}`)

// imageOf is the name of the image with this path below the mount.
func imageOf(path string) image {
	dir, base := filepath.Split(path)
	repo := strings.TrimSuffix(dir, "/")
	switch {
	case repo == filepath.Join(control, "dangling"):
		return image{ref: "sha256:" + base, path: path}
	case strings.HasPrefix(base, "@"):
		return image{ref: repo + base, path: path}
	}
	return image{ref: repo + ":" + base, path: path}
}

// metaPath is the path of a file that describes the image at path.
func metaPath(mount, path, file string) string {
	return filepath.Join(mount, control, "meta", path, file)
}

// recordAt is the record of the image at path below the mount. The error wraps
// unix.ENOENT when none is here.
func recordAt(mount, path string) (record, error) {
	var r record
	err := readMeta(mount, path, "size.json", &r)
	return r, err
}

// readMeta reads a JSON file that describes the image at path.
func readMeta(mount, path, file string, v any) error {
	return readJSON(metaPath(mount, path, file), v)
}

// readJSON reads a file of the mount.
func readJSON(file string, v any) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("%q: %w", file, cause(err))
	}
	if err := json.Unmarshal(text, v); err != nil {
		return fmt.Errorf("%q: %v", file, err)
	}
	return nil
}

// namesOf are all names of the image at path, sorted.
func namesOf(mount, path string) ([]image, error) {
	var refs []string
	if err := readMeta(mount, path, "names.json", &refs); err != nil {
		return nil, err
	}
	var names []image
	for _, ref := range refs {
		if strings.HasPrefix(ref, control+"/") {
			names = append(names, platformImage(ref))
		} else if n, err := parseImage(mount, ref); err == nil {
			names = append(names, n)
		}
	}
	return names, nil
}

// platformImage is a name of an image for another platform, which is written as
// its repository's path, and then as docker writes tags and digests.
func platformImage(ref string) image {
	slash := strings.LastIndex(ref, "/") + 1
	dir, last := ref[:slash], ref[slash:]
	if repo, digest, ok := strings.Cut(last, "@"); ok {
		return image{ref: ref, path: dir + repo + "/@" + digest}
	}
	if i := strings.LastIndex(last, ":"); i >= 0 {
		return image{ref: ref, path: dir + last[:i] + "/" + last[i+1:]}
	}
	return image{ref: ref, path: ref}
}

// findDigest is the record of an image that a tag of the same repository brought
// here, by the digest of what the registry answered or of the manifest.
func findDigest(mount string, want image) (record, bool) {
	repo, digest, _ := strings.Cut(want.path, "/@")
	records, err := readImages(mount)
	if err != nil {
		return record{}, false
	}
	i := slices.IndexFunc(records, func(r record) bool {
		return r.Repository == repo && (r.Digest == digest || r.Manifest == digest)
	})
	if i < 0 {
		return record{}, false
	}
	return records[i], true
}

// hexOf is the hexadecimal part of a digest.
func hexOf(digest string) string { return strings.TrimPrefix(digest, "sha256:") }
