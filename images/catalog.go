package images

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"go.etcd.io/bbolt"
)

// catalogVersion is the catalogue's format. An older one is migrated, a newer one
// is refused, untouched.
const catalogVersion = 2

// The catalogue's buckets. Keys are texts joined by 0x00, numbers are 8 bytes,
// the highest first.
var (
	bucketMeta     = []byte("meta")     // "version", the last number given of each sequence, "totals"
	bucketNames    = []byte("names")    // Name.key -> nameRecord
	bucketTombs    = []byte("tombs")    // Name.key -> time of removal
	bucketImages   = []byte("images")   // manifest digest -> imageRecord
	bucketUses     = []byte("uses")     // manifest digest 0x00 Name.key -> nothing: the names of an image
	bucketIDs      = []byte("ids")      // hex of the config's digest 0x00 manifest digest -> nothing
	bucketDangling = []byte("dangling") // manifest digest -> danglingRecord: images without a name
	bucketChains   = []byte("chains")   // hex of the chain ID 0x00 manifest digest -> chainRecord
	bucketLayers   = []byte("layers")   // layerKey -> layerRecord
	bucketLayer    = []byte("layer")    // layer sequence -> layerKey
	bucketUsers    = []byte("users")    // layer sequence, manifest digest -> nothing: the images of a layer
	bucketHere     = []byte("here")     // layerKey -> nothing: layers in use or idle
	bucketIdle     = []byte("idle")     // layerKey -> nothing: layers that no image uses, and that were not dropped
	bucketSpare    = []byte("spare")    // layerKey -> nothing: layers that only dangling images use
	bucketArriving = []byte("arriving") // layerKey -> nothing: layers in use whose size is not known
	bucketViews    = []byte("views")    // manifest digest 0x00 Name.key -> view sequence; with no digest for what is in .imgfs
	bucketView     = []byte("view")     // view sequence -> viewRecord
	bucketRetired  = []byte("retired")  // view sequence -> nothing: views of names that are gone
	bucketNodes    = []byte("nodes")    // path -> node number
	bucketNode     = []byte("node")     // node number -> path

	bucketsV1 = [][]byte{bucketMeta, bucketNames, bucketTombs, bucketImages, bucketUses, bucketLayers, bucketLayer,
		bucketViews, bucketView, bucketNodes, bucketNode}
	allBuckets = append(bucketsV1[:len(bucketsV1):len(bucketsV1)], bucketIDs, bucketDangling, bucketChains, bucketUsers,
		bucketHere, bucketIdle, bucketSpare, bucketArriving, bucketRetired)
)

// nameRecord is what a name stands for.
type nameRecord struct {
	Image v1.Hash   `json:"image"` // manifest digest
	Top   v1.Hash   `json:"top"`   // what the registry answered: an index's digest, or the manifest's
	Time  time.Time `json:"time"`  // of the pull
}

// danglingRecord is what is known of an image that has lost its last name.
type danglingRecord struct {
	Name Name      `json:"name"` // the last
	Top  v1.Hash   `json:"top"`
	Time time.Time `json:"time"` // of the pull
	Lost time.Time `json:"lost"` // when it lost the name
}

// imageRecord is an image of one platform. The sizes count each distinct layer
// once, those that are not known yet as 0.
type imageRecord struct {
	Config   v1.Hash      `json:"config"` // the image ID
	Layers   []imageLayer `json:"layers"` // lowest first
	Created  time.Time    `json:"created"`
	Steps    []time.Time  `json:"steps,omitempty"` // when each layer was made, when the history says
	Size     int64        `json:"size"`            // compressed bytes of the layers
	Platform string       `json:"platform"`

	Unknown  int   `json:"unknown"` // layers whose size is not known yet
	Expanded int64 `json:"expanded"`
	Usage    int64 `json:"usage"`
	Shared   int64 `json:"shared"` // of Expanded, in layers that other images have too
}

type imageLayer struct {
	Seq  uint32        `json:"seq"`
	Key  v1.Hash       `json:"key"` // of the layerRecord
	Desc v1.Descriptor `json:"desc"`
}

// layerRecord is a layer of any number of images. It stays for ever: its sequence
// is in inode numbers.
type layerRecord struct {
	Seq    uint32        `json:"seq"`
	Key    v1.Hash       `json:"-"` // of this record, and of the layer's index and pack
	Desc   v1.Descriptor `json:"desc"`
	DiffID v1.Hash       `json:"diffID"`
	Repos  []string      `json:"repos"`           // repositories that have the blob, the latest first
	Sizes  *layerSizes   `json:"sizes,omitempty"` // once it was compiled

	Images int  `json:"images"`         // images that have it
	Named  int  `json:"named"`          // those of them that have a name
	Idle   bool `json:"idle,omitempty"` // no image has it, and it was not dropped
}

// layerSizes is what a compiled layer's regular files amount to, each inode once.
type layerSizes struct {
	Expanded int64 `json:"expanded"`
	Usage    int64 `json:"usage"` // in blocks of 512 bytes
}

// here reports whether the layer counts as something that is here.
func (r *layerRecord) here() bool { return r.Images > 0 || r.Idle }

func (r *layerRecord) images() int { return r.Images }

// sizes returns what the layer amounts to, -1 while that is not known.
func (r *layerRecord) sizes() (expanded, usage int64) {
	if r.Sizes == nil {
		return -1, -1
	}
	return r.Sizes.Expanded, r.Sizes.Usage
}

// chainRecord is an image after one of its layers.
type chainRecord struct {
	Depth   int       `json:"depth"`
	Whole   bool      `json:"whole,omitempty"`
	Created time.Time `json:"created"`
}

// maxRepos bounds the repositories remembered for a layer.
const maxRepos = 4

type viewRecord struct {
	Name  Name    `json:"name"`
	Image v1.Hash `json:"image"`
	Depth int     `json:"depth,omitempty"` // with its first layers only; 0: with all
}

// catalog is the durable state: what is here, under which names, and which
// sequence numbers were given. Every method is one transaction.
type catalog struct {
	db    *bbolt.DB
	file  *os.File     // db's, which has its lock
	reads atomic.Int64 // records that were read

	// applied is told what a transaction has done, before the next one begins.
	applied func(*effects)

	mu      sync.Mutex // held for a whole write and what follows it, so that all see the same order
	journal *journal   // nil: none
	broken  error      // why nothing can be written any more

	suspects
}

// txn is a transaction. It counts what it reads, and keeps the totals.
type txn struct {
	*bbolt.Tx
	c       *catalog
	ctx     context.Context // nil, or what ends its scans
	totals  *totals         // once they were needed
	effects effects
}

// effects are what a transaction means to others than the catalogue.
type effects struct {
	Change
	lines  []journalLine
	idle   map[v1.Hash]bool // layers that became idle, or are no more
	spare  map[v1.Hash]bool // the same for layers that only dangling images use
	moved  map[uint32]Name  // views that have another name now
	orphan []v1.Hash        // blobs that nothing refers to any more
	stacks [][]v1.Hash      // layers of images that are gone, lowest first
}

// guard makes an error of the panics with which bbolt answers damage, and of the
// faults in a file that is shorter than it says. It is to be deferred with the
// result of debug.SetPanicOnFault(true).
func guard(before bool, err *error) {
	debug.SetPanicOnFault(before)
	if r := recover(); r != nil {
		*err = fmt.Errorf("images: the catalogue is %w: %v\n%s", errPanicked, r, debug.Stack())
	}
}

// read calls f in a reading transaction.
func (c *catalog) read(f func(t *txn) error) (err error) {
	defer func() { c.suspect(err) }()
	defer guard(debug.SetPanicOnFault(true), &err)
	return c.db.View(func(tx *bbolt.Tx) error { return f(&txn{Tx: tx, c: c}) })
}

// errUnchanged ends a write that has nothing to write.
var errUnchanged = errors.New("images: nothing has changed")

// write calls f in a writing transaction, which is durable when write returns.
func (c *catalog) write(f func(t *txn) error) (Change, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.writeLocked(f)
}

func (c *catalog) writeLocked(f func(t *txn) error) (ch Change, err error) {
	if c.broken != nil {
		return Change{}, c.broken
	}
	t := &txn{c: c}
	err = c.update(t, f)
	if errors.Is(err, errPanicked) { // the panic may have left bbolt's locks held
		c.broken = err
	}
	if err == errUnchanged {
		return t.effects.Change, nil
	}
	if err != nil {
		return Change{}, err
	}
	c.journal.append(c, t.effects.lines)
	if c.applied != nil {
		c.applied(&t.effects)
	}
	return t.effects.Change, nil
}

func (c *catalog) update(t *txn, f func(t *txn) error) (err error) {
	defer func() { c.suspect(err) }()
	defer guard(debug.SetPanicOnFault(true), &err)
	return c.db.Update(func(tx *bbolt.Tx) error {
		t.Tx = tx
		if err := f(t); err != nil {
			return err
		}
		return t.saveTotals()
	})
}

func counter(b *bbolt.Bucket, name string) uint64 {
	if v := b.Get([]byte(name)); len(v) == 8 {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

func setCounter(b *bbolt.Bucket, name string, n uint64) error { return b.Put([]byte(name), seqKey(n)) }

// next gives the next number of a sequence, from 1, and remembers it.
func (t *txn) next(name string, limit uint64) (uint64, error) {
	t.c.reads.Add(1)
	b := t.Bucket(bucketMeta)
	n := counter(b, name) + 1
	if n > limit {
		return 0, fmt.Errorf("images: no number left for another %s (limit %d)", name, limit)
	}
	return n, setCounter(b, name, n)
}

func seqKey(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func hashKey(h v1.Hash) []byte { return []byte(h.String()) }

func useKey(image v1.Hash, n Name) []byte {
	return append([]byte(image.String()+"\x00"), n.key()...)
}

// viewKey is the key of n's view in bucketViews. What is in .imgfs shows one image
// at a time, whichever that is.
func viewKey(image v1.Hash, n Name) []byte {
	if n.special() {
		return append([]byte{0}, n.key()...)
	}
	return useKey(image, n)
}

func userKey(seq uint32, image v1.Hash) []byte {
	return append(seqKey(uint64(seq)), image.String()...)
}

// name returns what n stands for, and whether it was removed and not brought back.
func (c *catalog) name(n Name) (rec nameRecord, ok, removed bool, err error) {
	err = c.read(func(t *txn) error {
		removed = t.get(bucketTombs, n.key()) != nil
		ok, err = t.load(bucketNames, n.key(), &rec)
		return err
	})
	return rec, ok, removed, err
}

// image returns the record of the image with this manifest digest.
func (c *catalog) image(digest v1.Hash) (rec imageRecord, ok bool, err error) {
	err = c.read(func(t *txn) error {
		ok, err = t.load(bucketImages, hashKey(digest), &rec)
		return err
	})
	return rec, ok, err
}

// names returns the names of an image.
func (c *catalog) names(digest v1.Hash) (list []Name) {
	c.read(func(t *txn) error {
		list = t.namesOf(digest)
		return nil
	})
	return list
}

// namesOfLayer returns names of the images that have the layer with this sequence
// number, limit at most.
func (c *catalog) namesOfLayer(seq uint32, limit int) (list []Name, err error) {
	err = c.read(func(t *txn) error {
		user := seqKey(uint64(seq))
		return t.scan(bucketUsers, user, func(k, _ []byte) error {
			prefix := append(bytes.Clone(k[len(user):]), 0)
			if err := t.scan(bucketUses, prefix, func(k, _ []byte) error {
				list = append(list, parseKey(k[len(prefix):]))
				if len(list) >= limit {
					return errStop
				}
				return nil
			}); err != nil {
				return err
			}
			if len(list) >= limit {
				return errStop
			}
			return nil
		})
	})
	return list, err
}

// layer returns the record of the layer with this sequence number.
func (c *catalog) layer(seq uint32) (rec layerRecord, ok bool, err error) {
	err = c.read(func(t *txn) error {
		key := t.get(bucketLayer, seqKey(uint64(seq)))
		if key == nil {
			return nil
		}
		if ok, err = t.load(bucketLayers, key, &rec); err == nil && ok {
			rec.Key, err = v1.NewHash(string(key))
		}
		return err
	})
	return rec, ok, err
}

// layerHere returns the record of a layer that is in use or idle.
func (c *catalog) layerHere(key v1.Hash) (rec layerRecord, ok bool, err error) {
	err = c.read(func(t *txn) error {
		rec, ok, err = t.layer(key)
		ok = ok && rec.here()
		return err
	})
	return rec, ok, err
}

// dropLayer takes a layer that no image uses from those that are here. The error
// is fs.ErrNotExist when it is not, ErrConflict when an image uses it.
func (c *catalog) dropLayer(key v1.Hash) (rec layerRecord, err error) {
	_, err = c.write(func(t *txn) error {
		var ok bool
		if rec, ok, err = t.layer(key); err != nil {
			return err
		}
		if !ok || !rec.here() {
			return fmt.Errorf("images: dropping layer %s: %w", key, iofs.ErrNotExist)
		}
		if rec.Images > 0 {
			return fmt.Errorf("images: dropping layer %s: %w", key, ErrConflict)
		}
		_, rec, err = t.changeLayer(key, func(r *layerRecord) { r.Idle = false })
		return err
	})
	return rec, err
}

// layersHere returns the records of all layers that are in use or idle, by key.
func (c *catalog) layersHere() (list []layerRecord, err error) {
	err = c.read(func(t *txn) error {
		return t.scan(bucketHere, nil, func(k, _ []byte) error {
			key, err := v1.NewHash(string(k))
			if err != nil {
				return err
			}
			rec, _, err := t.layer(key)
			list = append(list, rec)
			return err
		})
	})
	return list, err
}

// keys returns the layer keys in one of bucketIdle, bucketSpare, bucketArriving.
func (c *catalog) keys(bucket []byte) (list []v1.Hash, err error) {
	err = c.read(func(t *txn) error {
		return t.scan(bucket, nil, func(k, _ []byte) error {
			key, err := v1.NewHash(string(k))
			list = append(list, key)
			return err
		})
	})
	return list, err
}
