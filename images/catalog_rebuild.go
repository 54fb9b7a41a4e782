package images

import (
	"bytes"
	"errors"
	"fmt"
	iofs "io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// replaceCatalog makes another catalogue of what the blobs and the journal say, and
// puts it in the place of a damaged one, which it sets aside. Until the new one is
// whole a crash leaves the old one and the journal, to begin again. lost says that
// there is none at all.
func replaceCatalog(path string, blobs blobSource, lost bool, why error) (c *catalog, damage, err error) {
	aside := path + ".damaged-" + now().Format("20060102T150405.000Z")
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return nil, nil, err
	}
	var h history
	bad := 0
	if f, err := os.Open(journalPath(path)); err == nil {
		h, bad = replayJournal(f)
		f.Close()
	} else {
		h, _ = replayJournal(bytes.NewReader(nil))
	}
	if c, err = tryCatalog(fresh, blobs, false); err != nil {
		return nil, nil, err
	}
	names, dangling, err := c.rebuild(&h, blobs, filepath.Join(filepath.Dir(path), "blobs", "sha256"))
	if err == nil {
		err = replace(path, fresh, aside)
	}
	if err != nil {
		c.close()
		return nil, nil, fmt.Errorf("rebuilding it: %w", err)
	}
	lostNames := len(h.names) - names
	what := "is missing"
	if !lost {
		reason, _, _ := strings.Cut(why.Error(), "\n")
		what = fmt.Sprintf("is set aside as %q (%s)", aside, reason)
	}
	return c, fmt.Errorf("images: the catalogue %q %s: it was made again, with %d names and %d dangling images; %d names are lost, and %d lines of the journal could not be read",
		path, what, names, dangling, lostNames, bad), nil
}

// replace renames fresh to path, and what is at path, if anything, to aside.
func replace(path, fresh, aside string) error {
	if err := os.Link(path, aside); err != nil && !errors.Is(err, iofs.ErrNotExist) {
		if err := os.Rename(path, aside); err != nil { // no links here
			return err
		}
	}
	if err := os.Rename(fresh, path); err != nil {
		return err
	}
	syncParent(path)
	return nil
}

// rebuild fills an empty catalogue with the images whose manifest and config are
// in dir, and the names that h has for them.
func (c *catalog) rebuild(h *history, blobs blobSource, dir string) (names, dangling int, err error) {
	found := map[v1.Hash]pulled{}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return 0, 0, err
	}
	for _, e := range entries {
		digest, err := v1.NewHash("sha256:" + e.Name())
		if err != nil || blobs == nil {
			continue
		}
		if p, ok := readImage(digest, blobs); ok {
			found[digest] = p
		}
	}
	repos := map[v1.Hash]string{}
	for _, d := range slices.Collect(maps.Keys(h.dangling)) {
		_, repos[d] = splitPlatform(h.dangling[d].Name.Repo)
	}
	for n, rec := range h.names {
		_, repos[rec.Image] = splitPlatform(n.Repo)
	}
	_, err = c.write(func(t *txn) error {
		for _, digest := range sortedHashes(found) {
			p := found[digest]
			p.repo = repos[digest]
			if err := t.putLayers(&p); err != nil && err != errUnchanged {
				return err
			}
			if err := t.addImage(digest, p.image, p.diffIDs); err != nil {
				return err
			}
		}
		for n, rec := range h.names {
			if _, ok := found[rec.Image]; !ok {
				continue
			}
			names++
			if err := t.name(n, rec); err != nil {
				return err
			}
		}
		for n, at := range h.tombs {
			if err := t.Bucket(bucketTombs).Put(n.key(), []byte(at.Format(timeFormat))); err != nil {
				return err
			}
		}
		for digest := range found {
			if t.used(digest) {
				continue
			}
			if h.deleted[digest] {
				if err := t.deleteImage(digest); err != nil {
					return err
				}
				continue
			}
			dangling++
			d, ok := h.dangling[digest]
			if !ok {
				d = danglingRecord{Top: digest, Lost: now()}
			}
			if err := t.store(bucketDangling, hashKey(digest), d); err != nil {
				return err
			}
		}
		return nil
	})
	return names, dangling, err
}

func sortedHashes[V any](m map[v1.Hash]V) []v1.Hash {
	return slices.SortedFunc(maps.Keys(m), func(a, b v1.Hash) int { return bytes.Compare([]byte(a.Hex), []byte(b.Hex)) })
}

// readImage makes an image of a manifest and a config that were kept.
func readImage(digest v1.Hash, blobs blobSource) (p pulled, ok bool) {
	raw, ok, err := blobs.Blob(digest)
	if err != nil || !ok {
		return p, false
	}
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil || m.Config.Digest.Hex == "" || m.SchemaVersion != 2 {
		return p, false
	}
	if raw, ok, err = blobs.Blob(m.Config.Digest); err != nil || !ok {
		return p, false
	}
	cf, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil || len(cf.RootFS.DiffIDs) != len(m.Layers) {
		return p, false
	}
	for _, l := range m.Layers {
		if l.Digest.Algorithm != "sha256" {
			return p, false
		}
	}
	p, err = describe(m, cf)
	p.digest, p.top = digest, digest
	return p, err == nil
}

// describe turns a manifest and a config into what the catalogue keeps.
func describe(m *v1.Manifest, cf *v1.ConfigFile) (p pulled, err error) {
	p.image = imageRecord{Config: m.Config.Digest, Created: cf.Created.Time, Platform: cf.OS + "/" + cf.Architecture,
		Steps: steps(cf, len(m.Layers))}
	if cf.Variant != "" {
		p.image.Platform += "/" + cf.Variant
	}
	if len(m.Layers) > maxLayers {
		return p, fmt.Errorf("it has %d layers, the limit is %d: %w", len(m.Layers), maxLayers, iofs.ErrInvalid)
	}
	for i, desc := range m.Layers {
		if (desc.Size == 0) != (desc.Digest == emptyBlob) || desc.Size < 0 {
			return p, fmt.Errorf("it has a layer %s of %d bytes: %w", desc.Digest, desc.Size, iofs.ErrInvalid)
		}
		p.image.Layers = append(p.image.Layers, imageLayer{Desc: desc})
		p.diffIDs = append(p.diffIDs, cf.RootFS.DiffIDs[i])
	}
	if len(p.image.Layers) == 0 { // an image of nothing still has a root directory
		p.image.Layers = []imageLayer{{Desc: v1.Descriptor{Digest: emptyBlob}}}
		p.diffIDs = []v1.Hash{emptyBlob}
		p.image.Steps = []time.Time{cf.Created.Time}
	}
	return p, nil
}
