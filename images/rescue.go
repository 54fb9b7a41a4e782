package images

import (
	"errors"
	iofs "io/fs"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// rescue copies, out of the pack of a layer that is about to be dropped, what layers
// that images use have only there: a content is stored once, in the pack of the
// layer that brought it first. What cannot be copied is fetched again when it is
// read.
func (s *Store) rescue(dropped v1.Hash) error {
	if s.cache.StoredOf(dropped) == 0 {
		return nil
	}
	recs, err := s.cat.layersHere()
	if err != nil || len(recs) > maxRescue {
		return err
	}
	for _, rec := range recs {
		if err := s.ctx.Err(); err != nil {
			return err
		}
		if rec.Key == dropped || rec.images() == 0 || !s.shares(rec.Key, dropped) {
			continue
		}
		l, err := s.layer(rec.Seq)
		if errors.Is(err, iofs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		st, err := l.open(s.ctx)
		if err != nil {
			s.log.Warn("what it shares with a layer that is dropped is not kept", "layer", rec.Key.String(), "err", err)
			continue
		}
		if st.idx == nil {
			continue // it is arriving, and keeps what it brings
		}
		if err := s.rescueInto(st, dropped); err != nil && !isFull(err) {
			return err
		}
	}
	return nil
}

// maxRescue is the most layers that are looked through for one that is dropped:
// each of them costs its index.
const maxRescue = 2048

// shares reports whether a layer has a content that is in the pack of another.
func (s *Store) shares(layer, other v1.Hash) bool {
	idx, err := unionfs.Open(s.cache.Path(cache.Index, layer))
	if err != nil {
		return false
	}
	defer idx.Close()
	for k := range idx.Stats().Contents {
		ci, err := idx.ContentByNumber(k)
		if err != nil {
			return false
		}
		if at, ok := s.cache.Find(ci.Digest); ok && ci.NChunks > 0 && at.Pack == other {
			return true
		}
	}
	return false
}

// rescueInto copies what st's layer has in the pack of another into its own.
func (s *Store) rescueInto(st *layerState, dropped v1.Hash) error {
	for k := range st.idx.Stats().Contents {
		ci, err := st.idx.ContentByNumber(k)
		if err != nil {
			return err
		}
		if ci.NChunks == 0 {
			continue
		}
		at, ok := s.cache.Find(ci.Digest)
		if !ok || at.Pack != dropped || st.pack.Has(ci.FirstChunk, ci.NChunks) {
			continue
		}
		if whole, err := s.copyChunks(st, &ci); err != nil {
			return err
		} else if whole {
			_ = s.cache.Share(ci.Digest, cache.Location{Pack: st.pack.Hash(), Off: ci.PackOff, Size: ci.Size, // a hint
				FirstChunk: ci.FirstChunk, NChunks: ci.NChunks})
		}
	}
	return nil
}

// copyChunks copies a content chunk by chunk; whole is false when not all of it was
// there.
func (s *Store) copyChunks(st *layerState, ci *unionfs.ContentInfo) (whole bool, err error) {
	whole = true
	for n := ci.FirstChunk; n < ci.FirstChunk+ci.NChunks; n++ {
		c, size, err := st.idx.Chunk(n)
		if err != nil {
			return false, err
		}
		if c.BlobLen == 0 || st.pack.Has(n, 1) {
			whole = whole && c.BlobLen > 0
			continue // a hole has no bytes
		}
		buf := make([]byte, size)
		if ok, err := s.cache.ReadShared(ci.Digest, buf, c.Off); !ok || err != nil {
			return false, nil
		}
		if err := st.pack.Put(n, ci.PackOff+c.Off, buf, c.Digest); err != nil {
			return false, err
		}
	}
	return whole, nil
}
