package images

import (
	"context"
	"encoding/hex"
	"errors"
	iofs "io/fs"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/imgfs/imgfs/fetch"
	"github.com/imgfs/imgfs/unionfs"
)

// A fact is what user.imgfs.<name> says. Of a directory of an image most are of
// the image, of a directory of a layer alone those of the layer, of a file those
// of the file:
//
//	            directory of an image     of a layer alone          a file
//	image       its name                  names of open images that have the layer
//	id          of the config             -                         -
//	digest      of the manifest           of the blob               of the content
//	layer       blob that set the path    the blob                  the blob
//	compressed  of all layers             of the blob               of its chunks, where that is known
//	size        expanded                  expanded                  of the content
//	shared      in layers that other images have too                its size, if they have its layer, else 0
//	cached      bytes on this disk        bytes on this disk        bytes on this disk
//	method      of the layer that set the path
//	error       why a layer could not be opened, if so

// maxFactNames bounds how many names of images the fact of a file lists.
const maxFactNames = 16

// Fact returns what user.imgfs.<name> says of an inode: image, id, digest, layer,
// compressed, size, shared, cached, method, error. ok is false when there is
// nothing to say, or no such fact.
func (s *Store) Fact(ctx context.Context, ino Ino, name string) (value string, ok bool, err error) {
	switch ino.Kind() {
	case KindDir:
		value, err = s.imageFact(ctx, ino, name)
	case KindFile:
		value, err = s.fileFact(ctx, ino, name)
	case KindLayer:
		if !ino.isWhiteout() || name == "layer" {
			value, err = s.layerFact(ino, name)
		}
	}
	return value, err == nil && value != "", err
}

func (s *Store) imageFact(ctx context.Context, dir Ino, name string) (string, error) {
	v, err := s.view(dir.seq())
	if err != nil {
		return "", err
	}
	switch name {
	case "image":
		if n := v.Name(); !n.special() {
			return n.String(), nil
		}
		return "<none>", nil
	case "id", "digest":
		switch {
		case v.image.depth > 0: // an intermediate image has neither
		case name == "id":
			return v.image.rec.Config.String(), nil
		default:
			return v.image.digest.String(), nil
		}
	case "layer", "method":
		l, err := s.setBy(ctx, dir)
		if err != nil {
			return "", err
		}
		if name == "layer" {
			return l.rec.Desc.Digest.String(), nil
		}
		return s.layerInfo(l.rec).Method, nil
	case "compressed", "size", "shared", "cached":
		sizes, err := s.sizesNow(v.image)
		if err != nil {
			return "", err
		}
		return number(map[string]int64{"compressed": sizes.Compressed, "size": sizes.Expanded, "shared": sizes.Shared,
			"cached": sizes.Cached}[name]), nil
	case "error":
		for _, l := range v.image.layers {
			if failed := l.failed.Load(); failed != nil {
				return *failed, nil
			}
		}
	}
	return "", nil
}

// sizesNow returns the sizes of an image as they are now, whether it is still here
// or not.
func (s *Store) sizesNow(im *image) (z Sizes, err error) {
	if im.depth == 0 {
		if rec, ok, err := s.cat.image(im.digest); err != nil || ok {
			return s.sizes(&rec), err
		}
	}
	for _, il := range im.rec.distinct() {
		rec, ok, err := s.cat.layer(il.Seq)
		if err != nil || !ok {
			return z, err
		}
		z.Compressed += rec.Desc.Size
		z.Cached += s.cache.StoredOf(rec.Key)
		expanded, usage := rec.sizes()
		if expanded < 0 || z.Expanded < 0 {
			z.Expanded, z.Usage, z.Shared, z.Unique = -1, -1, -1, -1
			continue
		}
		z.Expanded += expanded
		z.Usage += usage
		if rec.images() > 1 {
			z.Shared += expanded
		}
		z.Unique = z.Expanded - z.Shared
	}
	return z, nil
}

// setBy returns the layer that directory dir has its attributes from. It waits
// until no layer is arriving any more.
func (s *Store) setBy(ctx context.Context, dir Ino) (l *layer, err error) {
	err = s.withImage(ctx, dir, func(v *View, st *imageState) error {
		if st.tree == nil {
			return errSettled
		}
		ref, err := v.ref(dir)
		if err != nil {
			return err
		}
		if ref, err = st.tree.Source(ref); err != nil {
			return err
		}
		l = v.image.layers[ref.Layer]
		return nil
	})
	return l, err
}

// layerFact says of a layer what does not depend on the file.
func (s *Store) layerFact(ino Ino, name string) (string, error) {
	l, err := s.layer(ino.seq())
	if errors.Is(err, iofs.ErrNotExist) {
		return "", ErrStale
	}
	if err != nil {
		return "", err
	}
	switch name {
	case "image":
		var list []string
		names, err := s.cat.namesOfLayer(ino.seq(), maxFactNames)
		for _, n := range names {
			list = append(list, n.String())
		}
		slices.Sort(list)
		return strings.Join(list, " "), err
	case "layer", "digest":
		return l.rec.Desc.Digest.String(), nil
	}
	rec, ok, err := s.cat.layer(ino.seq())
	if err != nil || !ok {
		return "", err
	}
	li := s.layerInfo(rec)
	switch name {
	case "compressed":
		return number(li.Compressed), nil
	case "size":
		return number(li.Expanded), nil
	case "shared":
		if li.Images < 2 {
			return "0", nil
		}
		return number(li.Expanded), nil
	case "cached":
		return number(li.Cached), nil
	case "method":
		return li.Method, nil
	case "error":
		return li.Err, nil
	}
	return "", nil
}

// fileFact says what a file is. Of a file that has no content most is nothing.
func (s *Store) fileFact(ctx context.Context, ino Ino, name string) (value string, err error) {
	switch name {
	case "image", "layer", "method", "error":
		return s.layerFact(ino, name)
	case "digest", "size", "compressed", "shared", "cached":
	default:
		return "", nil
	}
	var a Attr
	if _, err := s.Stat(ctx, ino, &a); err != nil || a.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return "", err
	}
	switch name {
	case "size":
		return number(a.Size), nil
	case "shared":
		rec, _, err := s.cat.layer(ino.seq())
		if rec.images() < 2 {
			return "0", err
		}
		return number(a.Size), err
	case "cached":
		n, err := s.CachedBytes(ctx, ino)
		return number(n), err
	}
	err = s.withLayer(ctx, ino, func(src unionfs.Layer, id unionfs.ID) error {
		ci, err := src.Content(id)
		if err != nil {
			return err
		}
		if ci.Size > 0 && ci.NChunks == 0 {
			return iofs.ErrClosed // its bytes have not passed: wait
		}
		if name == "digest" {
			value = "sha256:" + hex.EncodeToString(ci.Digest[:])
			return nil
		}
		value, err = compressed(src, &ci)
		return err
	})
	return value, err
}

// compressed is what the frames of a content take in the layer's blob, where each
// is a file's own; else "".
func compressed(src unionfs.Layer, ci *unionfs.ContentInfo) (string, error) {
	idx, ok := src.(*unionfs.Index)
	if !ok || !fetch.Format(idx.Meta().Format).Lazy() {
		return "", nil
	}
	sum, last := int64(0), int64(-1)
	for n := range ci.NChunks {
		c, _, err := idx.Chunk(ci.FirstChunk + n)
		if err != nil {
			return "", err
		}
		if c.BlobLen > 0 && c.BlobOff != last {
			sum, last = sum+c.BlobLen, c.BlobOff
		}
	}
	return number(sum), nil
}

// number is n as a fact; what is not known (-1) is none.
func number(n int64) string {
	if n < 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

// manyChunks is from how many chunks on it is estimated how much of a content is
// here.
const manyChunks = 4096

// CachedBytes is how many bytes of a file's content are on this disk: in the pack
// of its layer, or, when nothing of it is there, in the pack of another layer that
// has the same content whole. Of a content of very many chunks that is here in
// part it is an estimate.
func (s *Store) CachedBytes(ctx context.Context, ino Ino) (bytes int64, err error) {
	if ino.Kind() != KindFile {
		return 0, nil
	}
	l, err := s.layer(ino.seq())
	if errors.Is(err, iofs.ErrNotExist) {
		return 0, ErrStale
	}
	if err != nil {
		return 0, err
	}
	st, err := l.open(ctx)
	if err != nil {
		return 0, err
	}
	ci, err := st.source().Content(unionfs.FileID(ino.index()))
	if err != nil || ci.NChunks == 0 {
		if errors.Is(err, iofs.ErrInvalid) || errors.Is(err, iofs.ErrClosed) {
			err = nil // no regular file, or it has not passed
		}
		return 0, err
	}
	if st.idx == nil {
		if st.pack.Staged() {
			return ci.Size, nil
		}
		return 0, nil
	}
	here := st.pack.Count(ci.FirstChunk, ci.NChunks)
	switch {
	case here == ci.NChunks:
		return ci.Size, nil
	case here == 0:
		if s.cache.HasShared(ci.Digest, ci.Size) {
			return ci.Size, nil
		}
		return 0, nil
	case ci.NChunks > manyChunks:
		return int64(float64(ci.Size) * float64(here) / float64(ci.NChunks)), nil
	}
	for n := ci.FirstChunk; n < ci.FirstChunk+ci.NChunks; n++ {
		if !st.pack.Has(n, 1) {
			continue
		}
		_, size, err := st.idx.Chunk(n)
		if err != nil {
			return 0, err
		}
		bytes += size
	}
	return bytes, nil
}
