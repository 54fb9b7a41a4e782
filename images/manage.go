package images

import (
	"context"
	"errors"
	iofs "io/fs"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Failures of the operations below, beside those of io/fs.
var (
	// ErrConflict reports an image that cannot be removed as asked: several names
	// stand for it, or an image depends on it.
	ErrConflict = errors.New("in use by images")
	// ErrAmbiguous reports a prefix that several image IDs have.
	ErrAmbiguous = errors.New("ambiguous")
)

// Change is what an operation on names did.
type Change struct {
	Untagged []Name    // names that are gone, or stand for another image now
	Deleted  []v1.Hash // IDs of images that are no longer here
	Dangling []v1.Hash // IDs of images that have just lost their last name, and stay
	Image    v1.Hash   // manifest digest of the image that the name stands for now; zero when it is gone
}

// Update asks n's registry again. If the tag has moved, n stands for the new
// image, and the old one, if nothing else names it, is dangling. The change is
// zero when the tag has not moved. n must be here: else fs.ErrNotExist.
func (s *Store) Update(ctx context.Context, n Name) (Change, error) {
	rec, ok, _, err := s.cat.name(n)
	if err == nil && !ok {
		err = notHere("asking again for", n)
	}
	if err != nil || n.IsDigest() { // nothing else can have the digest
		return Change{}, err
	}
	ch, err := flight(ctx, s, "update "+n.String(), func(ctx context.Context) (Change, error) { return s.pull(ctx, n, true) })
	if ch.Image == rec.Image && len(ch.Untagged) == 0 {
		ch = Change{}
	}
	return ch, err
}

// Manifest returns the manifest digest of the image that n stands for; ok is
// false when none is here under n. n may also be {".imgfs/dangling", ID}, which may be
// ErrAmbiguous, and the digest of an image that another name in the same repository
// stands for.
func (s *Store) Manifest(n Name) (manifest v1.Hash, ok bool, err error) {
	err = s.cat.read(func(t *txn) error {
		if n.special() {
			manifest, _, err = t.specialImage(n)
		} else {
			var rec nameRecord
			rec, ok, err = t.lookup(n)
			if manifest = rec.Image; err == nil && !ok && n.IsDigest() {
				manifest, ok = t.sameDigest(n)
			}
			return err
		}
		if ok = err == nil; errors.Is(err, iofs.ErrNotExist) && !errors.Is(err, ErrAmbiguous) {
			return nil
		}
		return err
	})
	return manifest, ok, err
}

// FindID returns the image whose ID begins with prefix: hexadecimal digits, with
// or without "sha256:" before them. It is fs.ErrNotExist when there is none, and
// then also ErrAmbiguous, with some of the candidates in its text, when there are
// several. Its cost does not grow with the number of images.
func (s *Store) FindID(prefix string) (ImageID, error) { return s.cat.findID(prefix) }

// ImageID is an image by its ID, the digest of its config. Several manifests may
// have one config: one image in two compressions.
type ImageID struct {
	ID        v1.Hash
	Manifests []v1.Hash // at least one, those with names first
	Names     []Name    // all names of all of them, sorted
}

// Tag makes dst stand for the image with this manifest digest. The image that
// dst stood for, if that was its last name, is dangling. It is fs.ErrNotExist
// when the image is not here, fs.ErrInvalid when dst can be no name or is a digest.
func (s *Store) Tag(manifest v1.Hash, dst Name) (Change, error) {
	s.forgetMissing(dst)
	return s.cat.tag(manifest, dst)
}

// Move makes dst stand for what src stands for, and takes src away as Remove
// does, in one transaction. The directory numbers of src go with it: who is in
// src is in dst then. With replace dst may be here: its image is dangling if that
// was its last name; else that is fs.ErrExist. src and dst being the same changes
// nothing.
func (s *Store) Move(src, dst Name, replace bool) (Change, error) {
	return s.cat.move(src, dst, replace)
}

// Remove takes the name away, durably, and with the last tag of its image in a
// repository the names by digest there. The image goes with its last name;
// readers that have it open go on. The name stays unknown until Pull, Tag or Move
// brings it back. The error is fs.ErrNotExist when n is not here. n may also be
// {".imgfs/dangling", ID}: the dangling images with this ID, and no others.
func (s *Store) Remove(n Name) (Change, error) { return s.cat.remove(n) }

// Exchange swaps what a and b stand for, with their directory numbers.
func (s *Store) Exchange(a, b Name) (Change, error) { return s.cat.exchange(a, b) }

// RemoveID removes the image with this ID, named or dangling: all of its
// manifests. ErrConflict when more than one tag stands for it.
func (s *Store) RemoveID(id v1.Hash) (Change, error) { return s.cat.removeID(id) }

// Sizes are bytes of an image, or of all images. What cannot be known yet,
// because a layer still arrives, is -1.
type Sizes struct {
	Compressed int64 // of the layers, as they are in the registry
	Expanded   int64 // of the regular files of the layers, hard links once: what docker calls SIZE
	Usage      int64 // the same in blocks of 512 bytes: what du counts
	Shared     int64 // the part of Expanded in layers that another image has too
	Unique     int64 // Expanded - Shared
	Cached     int64 // of the layers' contents on this disk
}

// Totals are the counters of everything that is here. Reading them costs the same
// whatever is here.
type Totals struct {
	Images   int // manifests
	Tagged   int // images that have a name
	Dangling int // images that have none
	Names    int
	Layers   int // that an image uses, each once
	Idle     int // layers that no image uses and that are still on this disk
	Arriving int // layers in use whose size is not known yet; they count as 0 below

	Sizes             // each layer once
	SharedUsage int64 // as Shared, in blocks of 512 bytes
	// What goes when all dangling images are removed and all idle layers dropped.
	// Expanded has no idle layers, Cached has them.
	Reclaimable       int64 // of Expanded
	ReclaimableCached int64 // of Cached
	CacheLimit        int64
	CacheFree         int64 // what the file system has left
}

// Chain is an image as it was after one of its layers: an intermediate image.
type Chain struct {
	ID      v1.Hash // the chain ID of the image-spec
	Layers  int
	Created time.Time // of the history's step, when it says
	Images  []v1.Hash // manifest digests of the images that depend on it
	Whole   bool      // it is the whole of one of them
}

// CatalogReads counts the records that were read from the catalogue since Open.
func (s *Store) CatalogReads() int64 { return s.cat.reads.Load() }
