package cache

import (
	"crypto/sha256"
	"fmt"
	"io"
	iofs "io/fs"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Location is where a content lies whole: in the pack of a layer, at Off, in the
// NChunks chunks from FirstChunk.
type Location struct {
	Pack       v1.Hash
	Off, Size  int64
	FirstChunk uint32
	NChunks    uint32
}

// Shared is a content and its place, for [Cache.ShareMany].
type Shared struct {
	Digest [32]byte
	Location
}

// place is a Location as the table has it.
type place struct {
	pack   key
	epoch  uint64 // of the pack: a place in a pack that was emptied since is void
	off    int64
	size   int64
	first  uint32
	chunks uint32
}

// Share notes that the content with this digest lies at l, for whichever layer
// asks for it. It is a hint: it may be forgotten, its chunks need not be here.
//
// The caller vouches that bytes in those chunks hash to digest: it computed the
// digest itself over the whole content (a streaming pass), or the content is one
// chunk and digest is that chunk's, or [Pack.VerifyContent] said so. A table of
// contents that says so is not enough: it would let one image put its bytes
// under the digest of another's.
func (c *Cache) Share(digest [32]byte, l Location) error {
	return c.ShareMany([]Shared{{digest, l}})
}

// ShareMany is Share for many contents, with a write for each bucket instead of each content.
func (c *Cache) ShareMany(all []Shared) error {
	recs := make([]record, 0, len(all))
	epochs := make(map[string]uint64)
	for i := range all {
		l := &all[i].Location
		k, err := keyOf(l.Pack)
		if err != nil || !validRange(l.Off, l.Size) || l.NChunks == 0 || uint64(l.FirstChunk)+uint64(l.NChunks) > maxChunks {
			return fmt.Errorf("cache: sharing %x: bad place %+v: %w", all[i].Digest, *l, iofs.ErrInvalid)
		}
		epoch, ok := epochs[l.Pack.Hex]
		if !ok {
			_, epoch = c.lookup(k)
			epochs[l.Pack.Hex] = epoch
		}
		if epoch == 0 {
			continue // no such pack
		}
		recs = append(recs, record{all[i].Digest, place{k, epoch, l.Off, l.Size, l.FirstChunk, l.NChunks}})
	}
	if err := c.table.insert(recs); err != nil {
		return fmt.Errorf("cache: sharing %d contents: %w", len(recs), notKept(err))
	}
	return nil
}

// packEpoch is the epoch of a pack that exists and is loaded, else 0.
func (c *Cache) packEpoch(k key) uint64 {
	c.mu.Lock()
	p := c.packs[k]
	c.mu.Unlock()
	if p == nil {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.epoch
}

// lookup returns the pack k, its map loaded, and its epoch; nil and 0 when there
// is none. Right after Open a pack may have to be loaded for that.
func (c *Cache) lookup(k key) (*Pack, uint64) {
	epoch := c.packEpoch(k)
	c.mu.Lock()
	p := c.packs[k]
	c.mu.Unlock()
	if p == nil || epoch != 0 {
		return p, epoch
	}
	if c.acquire(p) != nil {
		return nil, 0
	}
	c.release(p)
	return p, c.packEpoch(k)
}

// Find tells where a content lies, when that is known. Its chunks may have been
// evicted; ask the pack.
func (c *Cache) Find(digest [32]byte) (Location, bool) {
	var r place
	if !c.table.find(digest, &r) {
		return Location{}, false
	}
	if _, epoch := c.lookup(r.pack); epoch != r.epoch {
		return Location{}, false
	}
	return Location{Pack: r.pack.hash(), Off: r.off, Size: r.size, FirstChunk: r.first, NChunks: r.chunks}, true
}

// ReadShared fills b with the bytes at off of the content, from whichever pack
// has all of it. ok is false when none has; b's bytes mean nothing then. Reading
// past the end of the content is a miss.
func (c *Cache) ReadShared(digest [32]byte, b []byte, off int64) (ok bool, err error) {
	var r place
	if !c.table.find(digest, &r) {
		return false, nil
	}
	if off < 0 || int64(len(b)) > r.size || off > r.size-int64(len(b)) {
		return false, nil
	}
	p, epoch := c.lookup(r.pack)
	if epoch != r.epoch || c.acquire(p) != nil { // waits for a map that is being loaded
		return false, nil
	}
	defer c.release(p)
	ok, err = p.ReadAt(b, r.off+off, r.first, r.chunks)
	// A pack emptied and filled again in between has another epoch.
	return ok && c.packEpoch(r.pack) == r.epoch, err
}

// HasShared reports whether some pack has the content with this digest, of size
// bytes, whole. It may be evicted the moment after.
func (c *Cache) HasShared(digest [32]byte, size int64) bool {
	var r place
	if !c.table.find(digest, &r) || r.size != size {
		return false
	}
	p, epoch := c.lookup(r.pack)
	return p != nil && epoch == r.epoch && p.present(r.first, r.chunks)
}

// VerifyContent reads a content from the pack and reports whether it is all here
// and hashes to digest.
func (p *Pack) VerifyContent(digest [32]byte, l Location) (bool, error) {
	if !validRange(l.Off, l.Size) {
		return false, nil
	}
	sum := sha256.New()
	r := &packReader{p: p, l: l}
	if _, err := io.CopyBuffer(struct{ io.Writer }{sum}, r, make([]byte, 256<<10)); err != nil {
		if err == errMiss {
			return false, nil
		}
		return false, err
	}
	return [32]byte(sum.Sum(nil)) == digest, nil
}

var errMiss = fmt.Errorf("not here: %w", iofs.ErrNotExist)

// packReader reads a content from start to end.
type packReader struct {
	p  *Pack
	l  Location
	at int64
}

func (r *packReader) Read(b []byte) (int, error) {
	b = b[:min(int64(len(b)), r.l.Size-r.at)]
	if len(b) == 0 {
		return 0, io.EOF
	}
	ok, err := r.p.ReadAt(b, r.l.Off+r.at, r.l.FirstChunk, r.l.NChunks)
	if err != nil {
		return 0, err
	}
	if !ok {
		return 0, errMiss
	}
	r.at += int64(len(b))
	return len(b), nil
}
