package fetch

import (
	"context"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/unionfs"
)

// CheckPack reads every chunk of a layer that is in its pack and compares it with
// its digest in the layer's index. It calls bad for each that does not match or
// cannot be read, and returns how many it has read. It changes nothing. A pack of
// another layout has nothing of the layer; its next use empties it.
//
// Errors are unionfs.ErrDamaged and ctx's.
func CheckPack(ctx context.Context, idx *unionfs.Index, pack *cache.Pack, bad func(chunk uint32, err error)) (chunks int, err error) {
	if pack.Layout() != layout(Format(idx.Meta().Format)) {
		return 0, nil
	}
	buf := make([]byte, 256<<10)
	for i := range idx.Stats().Contents {
		ci, err := idx.ContentByNumber(i)
		if err != nil {
			return chunks, err
		}
		if ci.NChunks == 0 || pack.Count(ci.FirstChunk, ci.NChunks) == 0 {
			continue
		}
		for n := ci.FirstChunk; n < ci.FirstChunk+ci.NChunks; n++ {
			if err := ctx.Err(); err != nil {
				return chunks, err
			}
			c, size, err := idx.Chunk(n)
			if err != nil {
				return chunks, err
			}
			if c.BlobLen == 0 { // a hole has no bytes
				continue
			}
			here, err := pack.VerifyChunk(buf, n, ci.PackOff+c.Off, size, c.Digest)
			if here {
				chunks++
			}
			if err != nil {
				bad(n, err)
			}
		}
	}
	return chunks, nil
}
