package images

import (
	"context"
	"fmt"
	iofs "io/fs"
	"slices"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/fetch"
	"github.com/imgfs/imgfs/unionfs"
)

// LayerInfo describes a layer.
type LayerInfo struct {
	Key        v1.Hash // what it is known by here: .imgfs/layers/<Key.Hex>
	Digest     v1.Hash // of the blob
	DiffID     v1.Hash
	MediaType  string
	Images     int // images that use it; 0: idle
	Compressed int64
	Expanded   int64 // -1 while it is not known
	Usage      int64 // in blocks of 512 bytes; -1 while it is not known
	Cached     int64
	Method     string // "eStargz", "zstd:chunked", "gzip", "zstd", "tar"; "" when not known yet
	Lazy       bool   // read by ranges
	Why        string // why not lazily, when it is not
	State      string // "indexed", "streaming", "not opened"
	Arrived    int64  // compressed bytes that have passed, while streaming
	Err        string // why it could not be opened, the last time
}

// The states of a layer.
const (
	stateIndexed   = "indexed"
	stateStreaming = "streaming"
	stateClosed    = "not opened"
)

// whyNot is why a layer of a format that is not lazy was streamed, where the
// reason is not remembered: it was before a restart.
const whyNot = "no table of contents announced"

// formatName is the format as users know it; "" when it is not known.
func formatName(f fetch.Format) string {
	switch f {
	case 0:
		return ""
	case fetch.FormatEstargz:
		return "eStargz"
	}
	return f.String()
}

// Layers returns all layers that are here, by key: those that images use and
// those that none uses any more.
func (s *Store) Layers() ([]LayerInfo, error) {
	recs, err := s.cat.layersHere()
	if err != nil {
		return nil, err
	}
	list := make([]LayerInfo, len(recs))
	for i, rec := range recs {
		list[i] = s.layerInfo(rec)
	}
	return list, nil
}

// Layer returns one of them.
func (s *Store) Layer(key v1.Hash) (LayerInfo, bool, error) {
	rec, ok, err := s.cat.layerHere(key)
	if err != nil || !ok {
		return LayerInfo{}, false, err
	}
	return s.layerInfo(rec), true, nil
}

// FindLayer returns the key of the layer that h means: h itself, or that of the
// one layer with this blob, where images say more of it than its digest. The error
// is fs.ErrNotExist when none is here, ErrAmbiguous when images disagree about the
// blob.
func (s *Store) FindLayer(h v1.Hash) (key v1.Hash, err error) {
	_, ok, err := s.cat.layerHere(h)
	if err != nil || ok {
		return h, err
	}
	recs, err := s.cat.layersHere()
	if err != nil {
		return key, err
	}
	recs = slices.DeleteFunc(recs, func(r layerRecord) bool { return r.Desc.Digest != h })
	switch len(recs) {
	case 0:
		return key, fmt.Errorf("images: finding layer %s: %w", h, iofs.ErrNotExist)
	case 1:
		return recs[0].Key, nil
	}
	return key, fmt.Errorf("images: %d layers have the blob %s, among them %s and %s: %w", len(recs), h, recs[0].Key, recs[1].Key, ErrAmbiguous)
}

// layerInfo joins what the catalogue, the cache and an open layer know.
func (s *Store) layerInfo(rec layerRecord) LayerInfo {
	li := LayerInfo{Key: rec.Key, Digest: rec.Desc.Digest, DiffID: rec.DiffID, MediaType: string(rec.Desc.MediaType),
		Images: rec.images(), Compressed: rec.Desc.Size, Cached: s.cache.StoredOf(rec.Key), State: stateClosed}
	li.Expanded, li.Usage = rec.sizes()
	s.mu.Lock()
	l := s.layers[rec.Seq]
	s.mu.Unlock()
	var st *layerState
	if l != nil {
		st = l.state.Load()
		if failed := l.failed.Load(); failed != nil {
			li.Err = *failed
		}
	}
	var format fetch.Format
	switch {
	case st != nil && st.idx == nil:
		li.State, li.Arrived, format = stateStreaming, st.progress(), st.pass.Format()
	case st != nil:
		li.State, format = stateIndexed, fetch.Format(st.idx.Meta().Format)
	default:
		if format = s.formatOnDisk(rec.Key); format != 0 {
			li.State = stateIndexed
		}
	}
	li.Method, li.Lazy = formatName(format), format.Lazy()
	if format != 0 && !li.Lazy {
		li.Why = whyNot
	}
	if l != nil && !li.Lazy {
		if why := l.why.Load(); why != nil {
			li.Why = *why
		}
	}
	return li
}

// formatOnDisk is the format of a layer that has its index on this disk, else 0.
// It is remembered: the index of a layer never says another.
func (s *Store) formatOnDisk(key v1.Hash) fetch.Format {
	if !s.cache.Has(cache.Index, key) {
		return 0
	}
	s.mu.Lock()
	f, ok := s.formats[key]
	s.mu.Unlock()
	if ok {
		return f
	}
	idx, err := unionfs.Open(s.cache.Path(cache.Index, key))
	if err != nil {
		return 0 // its next use says so, and makes it again
	}
	defer idx.Close()
	f = fetch.Format(idx.Meta().Format)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.formats[key] = f
	return f
}

// Details are everything that is known of an image.
type Details struct {
	Info
	Names       []Name // all of the image, sorted
	RawManifest []byte
	RawConfig   []byte
	Layers      []LayerInfo // lowest first
}

// Details returns them for the image that n stands for ({".imgfs/dangling", ID}
// too). It is fs.ErrNotExist when none is here. A manifest or config that is no
// longer on this disk is asked for in the registry.
func (s *Store) Details(ctx context.Context, n Name) (Details, error) {
	info, err := s.Image(n)
	if err != nil {
		return Details{}, err
	}
	rec, ok, err := s.cat.image(info.Digest)
	if err != nil {
		return Details{}, err
	}
	if !ok {
		return Details{}, fmt.Errorf("images: describing %q: %w", n, iofs.ErrNotExist)
	}
	d := Details{Info: info, Names: s.cat.names(info.Digest)}
	for _, il := range rec.Layers {
		lrec, ok, err := s.cat.layer(il.Seq)
		if err != nil {
			return Details{}, err
		}
		if !ok {
			return Details{}, fmt.Errorf("images: describing %q: the catalogue has no layer %d", n, il.Seq)
		}
		d.Layers = append(d.Layers, s.layerInfo(lrec))
	}
	if d.RawManifest, d.RawConfig, err = s.documents(ctx, n, info.Digest, rec); err != nil {
		return Details{}, fmt.Errorf("images: describing %q: %w", n, err)
	}
	return d, nil
}

// documents returns the manifest and the config of an image, from this disk or
// else from the first repository that has them.
func (s *Store) documents(ctx context.Context, n Name, digest v1.Hash, rec imageRecord) (manifest, config []byte, err error) {
	manifest, hasManifest, err := s.cache.Blob(digest)
	if err != nil {
		return nil, nil, err
	}
	config, hasConfig, err := s.cache.Blob(rec.Config)
	if err != nil || hasManifest && hasConfig {
		return manifest, config, err
	}
	failed := fmt.Errorf("no repository known for the image: %w", iofs.ErrNotExist)
	for i, repo := range s.reposOf(n, digest, rec) {
		res, err := s.client.Resolve(ctx, repo.Digest(digest.String()), s.platform)
		if err == nil && (res.Desc.Digest != digest || res.Manifest.Config.Digest != rec.Config) {
			err = fmt.Errorf("%s has another image under %s: %w", repo, digest, fetch.ErrDigest)
		}
		if err != nil {
			if i == 0 {
				failed = err
			}
			continue
		}
		for h, data := range map[v1.Hash][]byte{digest: res.RawManifest, rec.Config: res.RawConfig} {
			if err := s.cache.PutBlob(h, data); err != nil && !isFull(err) {
				return nil, nil, err
			}
		}
		return res.RawManifest, res.RawConfig, nil
	}
	return nil, nil, failed
}

// maxAsked bounds the repositories that are asked for one thing.
const maxAsked = 8

// reposOf returns repositories that may have an image: those of its names, then
// those that have its layers.
func (s *Store) reposOf(n Name, digest v1.Hash, rec imageRecord) (repos []name.Repository) {
	seen := map[string]bool{}
	add := func(repo name.Repository) {
		if !seen[repo.Name()] && len(repos) < maxAsked {
			seen[repo.Name()] = true
			repos = append(repos, repo)
		}
	}
	for _, n := range append([]Name{n}, s.cat.names(digest)...) {
		if n.special() { // no registry has it under this name
			continue
		}
		if ref, err := n.reference(); err == nil {
			add(ref.Context())
		}
	}
	for _, il := range rec.Layers {
		lrec, ok, err := s.cat.layer(il.Seq)
		if err != nil || !ok {
			continue
		}
		for _, r := range lrec.Repos {
			if ref, err := (Name{Repo: r, Tag: "latest"}).reference(); err == nil {
				add(ref.Context())
			}
		}
	}
	return repos
}
