package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	iofs "io/fs"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/fetch"
)

// negativeTTL is how long "no such image" is remembered: long enough for the
// many lookups of one command, short enough for an image that was just pushed.
const negativeTTL = 30 * time.Second

// maxNegative bounds the remembered negative answers.
const maxNegative = 10000

// negative is a remembered answer of a registry: the name is not there.
type negative struct {
	until time.Time
	err   error
}

// The failures of a registry that have no sentinel in io/fs. Beside them a pull
// can fail with io/fs.ErrNotExist (no such repository, tag or platform),
// ErrPermission (credentials refused, registry not allowed), ErrInvalid (the
// name, or what it names, is no image) and context.DeadlineExceeded.
var (
	ErrRateLimit   = fetch.ErrRateLimit
	ErrUnreachable = fetch.ErrUnreachable
)

// emptyBlob is the digest of nothing.
var emptyBlob = sha256Hash(nil)

func sha256Hash(data []byte) v1.Hash {
	sum := sha256.Sum256(data)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
}

// Here reports whether an image is here under n, and whether n was removed and
// not brought back.
func (s *Store) Here(n Name) (here, removed bool, err error) {
	_, here, removed, err = s.cat.name(n)
	return here, removed, err
}

// Pull asks n's registry for the image and records it under n, durably. Layers
// that have an index are compiled when Pull returns, those that have none are on
// their way. If another image was here under n, the new one takes its place.
func (s *Store) Pull(ctx context.Context, n Name) error {
	if !n.Valid() {
		return fmt.Errorf("images: pulling %q: not a name of an image: %w", n, iofs.ErrInvalid)
	}
	_, err := flight(ctx, s, "pull "+n.String(), func(ctx context.Context) (struct{}, error) {
		return struct{}{}, s.pull(ctx, n)
	})
	return err
}

func (s *Store) pull(ctx context.Context, n Name) (err error) {
	progress := s.pulls.begin(n)
	defer func() { progress.end(err) }()
	ref, err := n.reference()
	if err != nil {
		return fmt.Errorf("images: pulling %q: %v: %w", n, err, iofs.ErrInvalid)
	}
	res, err := s.client.Resolve(ctx, ref, s.platform)
	if err != nil {
		if errors.Is(err, iofs.ErrNotExist) {
			s.rememberMissing(n, err)
		}
		return err
	}
	p, err := s.describe(n, res)
	if err != nil {
		return err
	}
	for h, data := range map[v1.Hash][]byte{p.top: res.TopRaw, p.digest: res.RawManifest, res.Manifest.Config.Digest: res.RawConfig} {
		if err := s.cache.PutBlob(h, data); err != nil && !isFull(err) {
			return err
		}
	}
	if err := s.cat.putLayers(&p); err != nil {
		return err
	}
	im, err := s.newImage(p.digest, p.image)
	if err != nil {
		return err
	}
	if im, err = s.keep(im); err != nil {
		return err
	}
	progress.bring(im.layers)
	if _, err := im.open(ctx); err != nil {
		if errors.Is(err, iofs.ErrNotExist) { // the image is there, though not all of it
			return fmt.Errorf("images: pulling %q: %v", n, err)
		}
		return err
	}
	for _, l := range im.layers {
		l.from.add(n.Repo)
	}
	s.mu.Lock()
	delete(s.negative, n)
	s.mu.Unlock()
	return s.cat.put(n, p)
}

// describe turns what a registry said into what the catalogue keeps.
func (s *Store) describe(n Name, res *fetch.Image) (pulled, error) {
	p := pulled{top: res.Top.Digest, digest: res.Desc.Digest, repo: n.Repo}
	p.image = imageRecord{Config: res.Manifest.Config.Digest, Created: res.Config.Created.Time,
		Platform: res.Config.OS + "/" + res.Config.Architecture}
	if res.Config.Variant != "" {
		p.image.Platform += "/" + res.Config.Variant
	}
	if len(res.Manifest.Layers) > maxLayers {
		return p, fmt.Errorf("images: %q has %d layers, the limit is %d: %w", n, len(res.Manifest.Layers), maxLayers, iofs.ErrInvalid)
	}
	for i, desc := range res.Manifest.Layers {
		if (desc.Size == 0) != (desc.Digest == emptyBlob) {
			return p, fmt.Errorf("images: %q has a layer %s of %d bytes: %w", n, desc.Digest, desc.Size, iofs.ErrInvalid)
		}
		p.image.Layers = append(p.image.Layers, imageLayer{Desc: desc})
		p.diffIDs = append(p.diffIDs, res.Config.RootFS.DiffIDs[i])
		p.image.Size += desc.Size
	}
	if len(p.image.Layers) == 0 { // an image of nothing still has a root directory
		p.image.Layers = []imageLayer{{Desc: v1.Descriptor{Digest: emptyBlob}}}
		p.diffIDs = []v1.Hash{emptyBlob}
	}
	return p, nil
}

// Remove takes the name away, durably. The image goes with its last name;
// readers that have it open go on. The name stays unknown until Pull brings it
// back. The error is fs.ErrNotExist when n is not here.
func (s *Store) Remove(n Name) (Change, error) { return Change{}, s.cat.remove(n) }

// Missing returns the error that said, not long ago, that n's registry does not
// have n; nil when nothing is remembered.
func (s *Store) Missing(n Name) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if neg, ok := s.negative[n]; ok && time.Now().Before(neg.until) {
		return neg.err
	}
	return nil
}

func (s *Store) rememberMissing(n Name, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	shrink(s.negative, func(neg negative) time.Time { return neg.until })
	s.negative[n] = negative{until: time.Now().Add(negativeTTL), err: err}
}
