package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	iofs "io/fs"
	"strings"
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
	_, err := flight(ctx, s, "pull "+n.String(), func(ctx context.Context) (Change, error) { return s.pull(ctx, n, false) })
	return err
}

// pull is Pull. With update, n must be here when the answer has come.
func (s *Store) pull(ctx context.Context, n Name, update bool) (ch Change, err error) {
	progress := s.pulls.begin(n)
	defer func() { progress.end(err) }()
	platform := s.platform
	if dir, _ := splitPlatform(n.Repo); dir != "" {
		if platform, err = parsePlatform(strings.ReplaceAll(dir, "-", "/")); err != nil {
			return Change{}, fmt.Errorf("%v: %w", err, iofs.ErrInvalid)
		}
	}
	ref, err := n.reference()
	if err != nil {
		return Change{}, fmt.Errorf("images: pulling %q: %v: %w", n, err, iofs.ErrInvalid)
	}
	var expected v1.Hash
	defer func() { s.dropHeld(expected) }() // what the image's opening has not taken
	res, err := s.client.ResolveEarly(ctx, ref, platform, func(digest v1.Hash, m *v1.Manifest) {
		expected = digest
		s.expect(ref.Context(), digest, m)
	})
	if err != nil {
		if errors.Is(err, iofs.ErrNotExist) {
			s.rememberMissing(n, err)
		}
		return Change{}, err
	}
	if n.Repo != n.Registry().Repo && res.Top.Digest == res.Desc.Digest && !runsOn(platform, res.Config) {
		err := fmt.Errorf("images: pulling %q: no image for the platform %s, it is for %.64q: %w", n, platform.String(),
			res.Config.OS+"/"+res.Config.Architecture, iofs.ErrNotExist)
		s.rememberMissing(n, err)
		return Change{}, err
	}
	p, err := describe(res.Manifest, res.Config)
	if err != nil {
		return Change{}, fmt.Errorf("images: pulling %q: %w", n, err)
	}
	p.top, p.digest, p.repo, p.update = res.Top.Digest, res.Desc.Digest, n.Registry().Repo, update
	// A removal of the same image, under its last other name, may end before put
	// begins: then the blobs are gone, and kept again.
	p.blobs = func() error {
		for h, data := range map[v1.Hash][]byte{p.top: res.TopRaw, p.digest: res.RawManifest, p.image.Config: res.RawConfig} {
			if err := s.cache.PutBlob(h, data); err != nil && !isFull(err) {
				return err
			}
		}
		return nil
	}
	if err := p.blobs(); err != nil {
		return Change{}, err
	}
	if err := s.cat.putLayers(&p); err != nil {
		return Change{}, err
	}
	im, err := s.newImage(imageKey{digest: p.digest}, p.image)
	if err != nil {
		return Change{}, err
	}
	if im, err = s.keep(im); err != nil {
		return Change{}, err
	}
	progress.bring(im.layers)
	if _, err := im.open(ctx); err != nil {
		if errors.Is(err, iofs.ErrNotExist) { // the image is there, though not all of it
			return Change{}, fmt.Errorf("images: pulling %q: %v", n, err)
		}
		return Change{}, err
	}
	for _, l := range im.layers {
		l.from.add(p.repo)
	}
	s.forgetMissing(n)
	if ch, err = s.cat.put(n, p); err != nil {
		return ch, err
	}
	for _, l := range im.layers {
		if err := l.reuse(); err != nil {
			s.log.Warn("a layer index is not kept", "layer", l.key().String(), "err", err)
		}
	}
	return ch, nil
}

// runsOn reports whether a config is of an image for the platform, or does not say.
// A name without a platform takes any image that is the only one.
func runsOn(p v1.Platform, cf *v1.ConfigFile) bool {
	return (cf.OS == "" || strings.EqualFold(cf.OS, p.OS)) &&
		(cf.Architecture == "" || architecture(cf.Architecture) == architecture(p.Architecture))
}

// architecture is the name that Go has for what others call differently.
func architecture(s string) string {
	switch s = strings.ToLower(s); s {
	case "x86_64", "x86-64":
		return "amd64"
	case "i386", "i686":
		return "386"
	case "aarch64":
		return "arm64"
	case "armhf", "armel":
		return "arm"
	}
	return s
}

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

func (s *Store) forgetMissing(n Name) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.negative, n)
}
