package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"mime"
	"net/http"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// What an image may be at most.
const (
	maxManifest = 4 << 20 // bytes of an index or a manifest, as registries have it
	maxConfig   = 8 << 20 // bytes of a config
	maxLayers   = 512     // of a manifest; overlayfs takes 500
	maxLayer    = 1 << 42 // bytes of a layer as it is stored
	maxEntries  = 1024    // of all indexes of an image together
	maxDepth    = 4       // of indexes in indexes, the first counted
	maxIndexes  = 32      // that are read for one image
)

// Image is what a reference names. It is immutable.
type Image struct {
	Ref         name.Reference
	Top         v1.Descriptor  // what the reference names: an index or a manifest
	Desc        v1.Descriptor  // the manifest of the platform's image
	TopRaw      []byte         // the bytes of Top
	RawManifest []byte         // the bytes of Desc
	RawConfig   []byte         // the bytes of Manifest.Config
	Manifest    *v1.Manifest   // RawManifest; its layers have sizes ≥ 0 and SHA-256 digests
	Config      *v1.ConfigFile // RawConfig; as many diffIDs as the manifest has layers
}

// accepts are the media types of manifests that we read.
var accepts = []string{
	string(types.OCIImageIndex), string(types.DockerManifestList),
	string(types.OCIManifestSchema1), string(types.DockerManifestSchema2),
}

func isManifest(m types.MediaType) bool {
	return m == types.OCIManifestSchema1 || m == types.DockerManifestSchema2
}

func isIndex(m types.MediaType) bool {
	return m == types.OCIImageIndex || m == types.DockerManifestList
}

// Resolve finds the image that ref names for the platform, whose zero fields
// mean this machine's. A reference to an image's manifest is that image whatever
// its platform. Manifests and config match their digests.
//
// Errors are *Error: ErrNotImage (no manifest that we know, or one beyond the
// limits), ErrPlatform (the index has none for the platform; the message lists
// what it has), and those of Blob.Range.
func (c *Client) Resolve(ctx context.Context, ref name.Reference, platform v1.Platform) (*Image, error) {
	return c.ResolveEarly(ctx, ref, platform, nil)
}

// ResolveEarly is Resolve. known, if not nil, is told the manifest as soon as it is
// known, before the config is asked for. It must not block.
func (c *Client) ResolveEarly(ctx context.Context, ref name.Reference, platform v1.Platform, known func(v1.Hash, *v1.Manifest)) (*Image, error) {
	ctx, cancel := c.bound(ctx)
	defer cancel()
	r := &resolver{c: c, repo: ref.Context(), want: normalize(platform), known: known}
	img, err := r.image(ctx, ref)
	if err != nil {
		return nil, err.named("resolve", ref.Name())
	}
	return img, nil
}

// resolver is one Resolve.
type resolver struct {
	c       *Client
	repo    name.Repository
	want    v1.Platform
	indexes int             // read
	entries []v1.Descriptor // of all of them
	known   func(v1.Hash, *v1.Manifest)
}

func (r *resolver) image(ctx context.Context, ref name.Reference) (*Image, *Error) {
	top, err := r.top(ctx, ref)
	if err != nil {
		return nil, err
	}
	doc := top
	if top.index != nil {
		if doc, err = r.pick(ctx, top.index, 1); err != nil {
			return nil, err
		}
		if doc == nil {
			return nil, fail(ErrPlatform, "wanted %s, there is: %s", r.want.String(), platforms(r.entries))
		}
	}
	if r.known != nil {
		r.known(doc.desc.Digest, doc.manifest)
	}
	config, raw, err := r.config(ctx, doc.manifest)
	if err != nil {
		return nil, err
	}
	return &Image{
		Ref: ref, Top: top.desc, TopRaw: top.raw, Desc: doc.desc, RawManifest: doc.raw,
		Manifest: doc.manifest, Config: config, RawConfig: raw,
	}, nil
}

// top gets what the reference names.
func (r *resolver) top(ctx context.Context, ref name.Reference) (*document, *Error) {
	var want *v1.Descriptor
	if d, ok := ref.(name.Digest); ok {
		h, err := v1.NewHash(d.DigestStr())
		if err != nil {
			return nil, fail(ErrNotImage, "%v", err)
		}
		want = &v1.Descriptor{Digest: h, Size: -1}
	}
	return r.get(ctx, ref.Identifier(), want)
}

// get gets a manifest or an index. want, if not nil, is what it must be (its
// size, unless negative).
func (r *resolver) get(ctx context.Context, ident string, want *v1.Descriptor) (*document, *Error) {
	cl := &call{
		repo:   r.repo.RepositoryStr(),
		path:   "manifests/" + ident,
		accept: accepts,
		scope:  pullScope(r.repo.RepositoryStr()),
		tag:    want == nil,
	}
	var kind string
	var sum v1.Hash
	raw, err := r.c.document(ctx, r.repo.Registry, cl, maxManifest, func(b []byte, h http.Header) *Error {
		kind, sum = h.Get("Content-Type"), hashOf(b)
		e := fail(ErrDigest, "manifest %s is other bytes, %d of them", ident, len(b))
		e.next = true
		switch said := h.Get("Docker-Content-Digest"); {
		case want != nil && (sum != want.Digest || want.Size >= 0 && want.Size != int64(len(b))):
			return e
		case want == nil && len(said) == len(sum.String()) && said != sum.String():
			return e
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	doc, err := parseDocument(raw, kind)
	if err != nil {
		return nil, err
	}
	doc.desc = v1.Descriptor{MediaType: doc.kind, Size: int64(len(raw)), Digest: sum}
	return doc, nil
}

func hashOf(b []byte) v1.Hash {
	s := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(s[:])}
}

// pick finds the platform's image in an index: among its own entries first,
// then in the indexes it lists, then whatever it lists without a platform. It is
// nil if there is none.
func (r *resolver) pick(ctx context.Context, index *v1.IndexManifest, depth int) (*document, *Error) {
	if len(r.entries)+len(index.Manifests) > maxEntries {
		return nil, fail(ErrNotImage, "more than %d entries in its indexes", maxEntries)
	}
	r.entries = append(r.entries, index.Manifests...)
	if i := choose(r.want, index.Manifests); i >= 0 {
		return r.entry(ctx, index.Manifests[i])
	}
	for _, d := range index.Manifests {
		if !isIndex(d.MediaType) || !anyPlatform(d) && suits(r.want, normalizeEntry(d.Platform)) == 0 {
			continue
		}
		if r.indexes++; depth >= maxDepth || r.indexes > maxIndexes {
			return nil, fail(ErrNotImage, "indexes in indexes, %d deep, %d in all", depth, r.indexes)
		}
		doc, err := r.entry(ctx, d)
		if err != nil {
			return nil, err
		}
		if doc, err = r.pick(ctx, doc.index, depth+1); doc != nil || err != nil {
			return doc, err
		}
	}
	for _, d := range index.Manifests {
		if anyPlatform(d) && isManifest(d.MediaType) && !attestation(d) {
			return r.entry(ctx, d)
		}
	}
	return nil, nil
}

// entry gets what an index lists, and holds it to the media type it is listed with.
func (r *resolver) entry(ctx context.Context, d v1.Descriptor) (*document, *Error) {
	doc, err := r.get(ctx, d.Digest.String(), &d)
	if err != nil {
		return nil, err
	}
	if isIndex(d.MediaType) != (doc.index != nil) {
		return nil, fail(ErrNotImage, "manifest %s is not of the type its index says", d.Digest)
	}
	d.Size = int64(len(doc.raw))
	doc.desc = d
	return doc, nil
}

// document is a manifest or an index: one of the two is not nil.
type document struct {
	desc     v1.Descriptor
	raw      []byte
	kind     types.MediaType
	manifest *v1.Manifest
	index    *v1.IndexManifest
}

// parseDocument reads a manifest or an index, whose Content-Type was header.
// What could be taken for both is refused, so that no two readers see two images.
func parseDocument(raw []byte, header string) (*document, *Error) {
	var shape struct {
		SchemaVersion int64           `json:"schemaVersion"`
		MediaType     types.MediaType `json:"mediaType"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
		Manifests     json.RawMessage `json:"manifests"`
		FSLayers      json.RawMessage `json:"fsLayers"`
	}
	if err := json.Unmarshal(raw, &shape); err != nil {
		return nil, fail(ErrNotImage, "the manifest is no JSON that we know: %v", err)
	}
	doc := &document{raw: raw, kind: shape.MediaType}
	if doc.kind == "" {
		if t, _, err := mime.ParseMediaType(header); err == nil && (isIndex(types.MediaType(t)) || isManifest(types.MediaType(t))) {
			doc.kind = types.MediaType(t)
		}
	}
	image, index := shape.Config != nil || shape.Layers != nil, shape.Manifests != nil
	switch {
	case shape.SchemaVersion == 1 || shape.FSLayers != nil ||
		doc.kind == types.DockerManifestSchema1 || doc.kind == types.DockerManifestSchema1Signed:
		return nil, fail(ErrNotImage, "a manifest of Docker schema 1, which has been given up")
	case image == index, doc.kind != "" && !isManifest(doc.kind) && !isIndex(doc.kind),
		isManifest(doc.kind) && index, isIndex(doc.kind) && image:
		return nil, fail(ErrNotImage, "a document of type %q, neither an image nor an index", clip(string(doc.kind)))
	case index:
		if doc.kind == "" {
			doc.kind = types.OCIImageIndex
		}
		return doc, doc.parseIndex()
	}
	if doc.kind == "" {
		doc.kind = types.OCIManifestSchema1
	}
	return doc, doc.parseManifest()
}

func (doc *document) parseIndex() *Error {
	m, err := v1.ParseIndexManifest(bytes.NewReader(doc.raw))
	if err != nil {
		return fail(ErrNotImage, "the index: %v", err)
	}
	if len(m.Manifests) > maxEntries {
		return fail(ErrNotImage, "an index of %d entries", len(m.Manifests))
	}
	for _, d := range m.Manifests {
		if e := checkDescriptor(d, maxManifest); e != nil {
			return e
		}
	}
	doc.index = m
	return nil
}

func (doc *document) parseManifest() *Error {
	m, err := v1.ParseManifest(bytes.NewReader(doc.raw))
	if err != nil {
		return fail(ErrNotImage, "the manifest: %v", err)
	}
	switch m.Config.MediaType {
	case types.OCIConfigJSON, types.DockerConfigJSON, "", "application/octet-stream", "application/json":
	default:
		return fail(ErrNotImage, "an artifact of type %q", clip(string(m.Config.MediaType)))
	}
	if len(m.Layers) > maxLayers {
		return fail(ErrNotImage, "%d layers, more than %d", len(m.Layers), maxLayers)
	}
	if e := checkDescriptor(m.Config, maxConfig); e != nil {
		return e
	}
	for _, d := range m.Layers {
		if e := checkDescriptor(d, maxLayer); e != nil {
			return e
		}
	}
	doc.manifest = m
	return nil
}

func checkDescriptor(d v1.Descriptor, limit int64) *Error {
	if d.Digest.Algorithm != "sha256" || len(d.Digest.Hex) != sha256.Size*2 {
		return fail(ErrNotImage, "a descriptor without a SHA-256 digest")
	}
	if d.Size < 0 || d.Size > limit {
		return fail(ErrNotImage, "%s has %d bytes, more than the limit of %d, or less than none", d.Digest, d.Size, limit)
	}
	return nil
}

// config gets and checks an image's config.
func (r *resolver) config(ctx context.Context, m *v1.Manifest) (*v1.ConfigFile, []byte, *Error) {
	raw := m.Config.Data
	if int64(len(raw)) != m.Config.Size || hashOf(raw) != m.Config.Digest {
		cl := r.c.Blob(r.repo, m.Config).call(Demand, 0, m.Config.Size)
		var err *Error
		raw, err = r.c.document(ctx, r.repo.Registry, cl, m.Config.Size, func(b []byte, _ http.Header) *Error {
			if int64(len(b)) != m.Config.Size || hashOf(b) != m.Config.Digest {
				e := fail(ErrDigest, "config %s is other bytes", m.Config.Digest)
				e.next = true
				return e
			}
			return nil
		})
		if err != nil {
			return nil, nil, err
		}
	}
	config, err := parseConfig(raw, len(m.Layers))
	return config, raw, err
}

// parseConfig reads the config of an image with that many layers.
func parseConfig(raw []byte, layers int) (*v1.ConfigFile, *Error) {
	config, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return nil, fail(ErrNotImage, "the config: %v", err)
	}
	if len(config.RootFS.DiffIDs) != layers {
		return nil, fail(ErrNotImage, "%d layers with %d diffIDs", layers, len(config.RootFS.DiffIDs))
	}
	for _, h := range config.RootFS.DiffIDs {
		if e := checkDescriptor(v1.Descriptor{Digest: h}, 0); e != nil {
			return nil, e
		}
	}
	return config, nil
}
