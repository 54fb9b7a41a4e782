package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// record is one entry of .imgfs/images.json. Sizes are bytes; -1 while a layer
// still arrives.
type record struct {
	Repository string    `json:"repository"` // "<none>" for a dangling image
	Tag        string    `json:"tag"`        // "<none>" for an image that is here by its digest alone, too
	Dangling   bool      `json:"dangling"`
	ID         string    `json:"id"`
	Digest     string    `json:"digest"`   // of what the registry answers: the index's, or the manifest's
	Manifest   string    `json:"manifest"` // of the manifest for the mount's platform
	Created    time.Time `json:"created"`
	Pulled     time.Time `json:"pulled"`
	Size       int64     `json:"size"`       // expanded
	Compressed int64     `json:"compressed"` // in the registry
	Usage      int64     `json:"usage"`      // expanded, in blocks of 512 bytes
	Shared     int64     `json:"shared"`     // of size, in layers that another image has too
	Unique     int64     `json:"unique"`     // the rest of size
	Cached     int64     `json:"cached"`     // on this disk
	Layers     int       `json:"layers"`
	Platform   string    `json:"platform"`
}

// noTag stands for the tag of an image that has none.
const noTag = "<none>"

// names reports whether the record is the image's.
func (r record) names(mount string, want image) bool {
	if r.Tag == noTag {
		return want.path == r.Repository+"/@"+r.Digest || want.path == r.Repository+"/@"+r.Manifest
	}
	got, err := parseImage(mount, r.ref())
	return err == nil && got.path == want.path
}

// ref is the record's name, as docker pull takes it; for a dangling image its ID.
func (r record) ref() string {
	switch {
	case r.Dangling:
		return r.ID
	case r.Tag == noTag:
		return r.Repository + "@" + r.Digest
	}
	return r.Repository + ":" + r.Tag
}

// path is where the image is below the mount.
func (r record) path() string {
	switch {
	case r.Dangling:
		return filepath.Join(control, "dangling", hexOf(r.ID))
	case r.Tag == noTag:
		return r.Repository + "/@" + r.Digest
	}
	return r.Repository + "/" + r.Tag
}

// readImages lists the images that are here.
func readImages(mount string) ([]record, error) {
	text, err := os.ReadFile(filepath.Join(mount, control, "images.json"))
	if err != nil {
		if errors.Is(err, unix.ENOTCONN) {
			return nil, fmt.Errorf("mount %q: its server has died; 'imgfs umount %s', then mount it again", mount, mount)
		}
		return nil, fmt.Errorf("mount %q: list of images: %w", mount, cause(err))
	}
	var records []record
	if err := json.Unmarshal(text, &records); err != nil {
		return nil, fmt.Errorf("mount %q: list of images: %v", mount, err)
	}
	return records, nil
}

// findImage is the record of want, if it is here.
func findImage(mount string, want image) (record, bool) {
	records, err := readImages(mount)
	if err != nil {
		return record{}, false
	}
	for _, r := range records {
		if r.names(mount, want) {
			return r, true
		}
	}
	return record{}, false
}

// reason is what the server noted about a failure for the image since a time;
// "" when it noted none.
func reason(mount string, want image, since time.Time) string {
	text, err := os.ReadFile(filepath.Join(mount, control, "errors.json"))
	if err != nil {
		return ""
	}
	found := ""
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		var e struct {
			Time   time.Time `json:"time"`
			Name   string    `json:"name"`
			Reason string    `json:"reason"`
		}
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Time.Before(since) {
			continue
		}
		// The name is the image's, or that of a directory on the way to it.
		got, err := parseImage(mount, e.Name)
		if (err == nil && strings.HasPrefix(want.path+"/", got.path+"/")) || strings.HasPrefix(want.path+"/", e.Name+"/") {
			found = oneLine(e.Reason)
		}
	}
	// The server names the image again, with the room that it was in.
	if _, rest, ok := strings.Cut(found, `": `); ok && strings.HasPrefix(found, `fetch: resolve "`) {
		return rest
	}
	return found
}
