package images

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	iofs "io/fs"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// catalogVersion is the catalogue's format. A newer one is refused, untouched.
const catalogVersion = 1

// The catalogue's buckets.
var (
	bucketMeta   = []byte("meta")   // "version", and the last number given of each sequence
	bucketNames  = []byte("names")  // Name.key -> nameRecord
	bucketTombs  = []byte("tombs")  // Name.key -> time of removal
	bucketImages = []byte("images") // manifest digest -> imageRecord
	bucketUses   = []byte("uses")   // manifest digest 0x00 Name.key -> nothing: the names of an image
	bucketLayers = []byte("layers") // layerKey -> layerRecord
	bucketLayer  = []byte("layer")  // layer sequence -> layerKey
	bucketViews  = []byte("views")  // manifest digest 0x00 Name.key -> view sequence
	bucketView   = []byte("view")   // view sequence -> viewRecord
	bucketNodes  = []byte("nodes")  // path -> node number
	bucketNode   = []byte("node")   // node number -> path
	allBuckets   = [][]byte{bucketMeta, bucketNames, bucketTombs, bucketImages, bucketUses, bucketLayers, bucketLayer,
		bucketViews, bucketView, bucketNodes, bucketNode}
)

// nameRecord is what a name stands for.
type nameRecord struct {
	Image v1.Hash   `json:"image"` // manifest digest
	Top   v1.Hash   `json:"top"`   // what the registry answered: an index's digest, or the manifest's
	Time  time.Time `json:"time"`  // of the pull
}

// imageRecord is an image of one platform.
type imageRecord struct {
	Config   v1.Hash      `json:"config"` // the image ID
	Layers   []imageLayer `json:"layers"` // lowest first
	Created  time.Time    `json:"created"`
	Size     int64        `json:"size"` // compressed bytes of the layers
	Platform string       `json:"platform"`
}

type imageLayer struct {
	Seq  uint32        `json:"seq"`
	Desc v1.Descriptor `json:"desc"`
}

// layerRecord is a layer of any number of images.
type layerRecord struct {
	Seq      uint32        `json:"seq"`
	Key      v1.Hash       `json:"-"` // of this record, and of the layer's index and pack
	Desc     v1.Descriptor `json:"desc"`
	DiffID   v1.Hash       `json:"diffID"`
	Repos    []string      `json:"repos"`              // repositories that have the blob, the latest first
	Expanded *int64        `json:"expanded,omitempty"` // bytes of its regular files, once it was compiled
}

// maxRepos bounds the repositories remembered for a layer.
const maxRepos = 4

type viewRecord struct {
	Name  Name    `json:"name"`
	Image v1.Hash `json:"image"`
}

// catalog is the durable state: what is here, under which names, and which
// sequence numbers were given. Every method is one transaction.
type catalog struct{ db *bbolt.DB }

// openCatalog opens or makes the catalogue at path.
func openCatalog(path string) (*catalog, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: 5 * time.Second, FreelistType: bbolt.FreelistMapType})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, fmt.Errorf("images: opening the catalogue %q: another process has it open", path)
	}
	if err != nil {
		return nil, fmt.Errorf("images: opening the catalogue %q: %v; if it is damaged, remove it: what is cached stays, but tags have to be pulled again", path, err)
	}
	c := &catalog{db: db}
	if err := c.prepare(); err != nil {
		db.Close()
		return nil, fmt.Errorf("images: opening the catalogue %q: %w", path, err)
	}
	return c, nil
}

// prepare checks the version, and makes the buckets of a new catalogue.
func (c *catalog) prepare() error {
	var version uint64
	err := c.db.View(func(tx *bbolt.Tx) error {
		if b := tx.Bucket(bucketMeta); b != nil {
			version = counter(b, "version")
		}
		return nil
	})
	if err != nil || version == catalogVersion {
		return err
	}
	if version > catalogVersion {
		return fmt.Errorf("it has version %d, this program knows %d: use a newer imgfs", version, catalogVersion)
	}
	return c.db.Update(func(tx *bbolt.Tx) error {
		for _, name := range allBuckets {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return setCounter(tx.Bucket(bucketMeta), "version", catalogVersion)
	})
}

func (c *catalog) close() error { return c.db.Close() }

func counter(b *bbolt.Bucket, name string) uint64 {
	if v := b.Get([]byte(name)); len(v) == 8 {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

func setCounter(b *bbolt.Bucket, name string, n uint64) error { return b.Put([]byte(name), seqKey(n)) }

// next gives the next number of a sequence, from 1, and remembers it.
func next(tx *bbolt.Tx, name string, limit uint64) (uint64, error) {
	b := tx.Bucket(bucketMeta)
	n := counter(b, name) + 1
	if n > limit {
		return 0, fmt.Errorf("images: no number left for another %s (limit %d)", name, limit)
	}
	return n, setCounter(b, name, n)
}

func seqKey(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func load(tx *bbolt.Tx, bucket, key []byte, v any) (bool, error) {
	data := tx.Bucket(bucket).Get(key)
	if data == nil {
		return false, nil
	}
	if err := json.Unmarshal(data, v); err != nil {
		return false, fmt.Errorf("images: catalogue entry %s %q: %v", bucket, key, err)
	}
	return true, nil
}

func store(tx *bbolt.Tx, bucket, key []byte, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return tx.Bucket(bucket).Put(key, data)
}

func useKey(image v1.Hash, n Name) []byte {
	return append([]byte(image.String()+"\x00"), n.key()...)
}

// name returns what n stands for, and whether it was removed and not brought back.
func (c *catalog) name(n Name) (rec nameRecord, ok, removed bool, err error) {
	err = c.db.View(func(tx *bbolt.Tx) error {
		removed = tx.Bucket(bucketTombs).Get(n.key()) != nil
		ok, err = load(tx, bucketNames, n.key(), &rec)
		return err
	})
	return rec, ok, removed, err
}

// pulled is what a pull brought: the image, and where it came from.
type pulled struct {
	top, digest v1.Hash
	image       imageRecord
	diffIDs     []v1.Hash // of image.Layers
	repo        string
}

// putLayers records the layers of p, and gives sequences to those that are new.
func (c *catalog) putLayers(p *pulled) error {
	return c.db.Update(func(tx *bbolt.Tx) error {
		for i := range p.image.Layers {
			l := &p.image.Layers[i]
			rec, err := putLayer(tx, l.Desc, p.diffIDs[i], p.repo)
			if err != nil {
				return err
			}
			l.Seq = rec.Seq
		}
		return nil
	})
}

// put records what a pull brought under n. The layers have their sequences; the
// view gets its own here.
func (c *catalog) put(n Name, p pulled) error {
	return c.db.Update(func(tx *bbolt.Tx) error {
		if err := store(tx, bucketImages, []byte(p.digest.String()), p.image); err != nil {
			return err
		}
		if err := dropName(tx, n); err != nil {
			return err
		}
		rec := nameRecord{Image: p.digest, Top: p.top, Time: time.Now().UTC()}
		if err := store(tx, bucketNames, n.key(), rec); err != nil {
			return err
		}
		if err := tx.Bucket(bucketUses).Put(useKey(p.digest, n), []byte{}); err != nil {
			return err
		}
		if err := tx.Bucket(bucketTombs).Delete(n.key()); err != nil {
			return err
		}
		return putView(tx, n, p.digest)
	})
}

// putLayer records a layer. What an image says of it, its size and its diffID, is
// proved when the layer arrives, not before. So an image that says something else
// than an earlier one gets a layer of its own: one of them is wrong, and must not
// stand in the way of the other.
func putLayer(tx *bbolt.Tx, desc v1.Descriptor, diffID v1.Hash, repo string) (rec layerRecord, err error) {
	key := layerKey(desc)
	ok, err := load(tx, bucketLayers, []byte(key.String()), &rec)
	if err == nil && ok && (rec.Desc.Size != desc.Size || rec.DiffID != diffID) {
		key = sha256Hash(fmt.Appendf(nil, "%s %d %s", key, desc.Size, diffID))
		rec = layerRecord{}
		ok, err = load(tx, bucketLayers, []byte(key.String()), &rec)
	}
	if err != nil {
		return rec, err
	}
	if !ok {
		seq, err := next(tx, "layer", maxSeq)
		if err != nil {
			return rec, err
		}
		rec = layerRecord{Seq: uint32(seq), Desc: desc, DiffID: diffID}
		if err := tx.Bucket(bucketLayer).Put(seqKey(seq), []byte(key.String())); err != nil {
			return rec, err
		}
	}
	repos := []string{repo}
	for _, r := range rec.Repos {
		if r != repo && len(repos) < maxRepos {
			repos = append(repos, r)
		}
	}
	rec.Key, rec.Repos = key, repos
	return rec, store(tx, bucketLayers, []byte(key.String()), rec)
}

func putView(tx *bbolt.Tx, n Name, image v1.Hash) error {
	key := useKey(image, n)
	if tx.Bucket(bucketViews).Get(key) != nil {
		return nil
	}
	seq, err := next(tx, "view", maxSeq)
	if err != nil {
		return err
	}
	if err := tx.Bucket(bucketViews).Put(key, seqKey(seq)); err != nil {
		return err
	}
	return store(tx, bucketView, seqKey(seq), viewRecord{Name: n, Image: image})
}

// dropName takes n from the image that it names, if any.
func dropName(tx *bbolt.Tx, n Name) error {
	var old nameRecord
	ok, err := load(tx, bucketNames, n.key(), &old)
	if err != nil || !ok {
		return err
	}
	if err := tx.Bucket(bucketNames).Delete(n.key()); err != nil {
		return err
	}
	return tx.Bucket(bucketUses).Delete(useKey(old.Image, n))
}

// used reports whether image has a name.
func used(tx *bbolt.Tx, image v1.Hash) bool {
	prefix := []byte(image.String() + "\x00")
	k, _ := tx.Bucket(bucketUses).Cursor().Seek(prefix)
	return k != nil && bytes.HasPrefix(k, prefix)
}

// remove takes n away. The image goes with its last name. Layers stay: what no
// image uses is evicted when there is need. The error is fs.ErrNotExist when n
// is not here.
func (c *catalog) remove(n Name) error {
	return c.db.Update(func(tx *bbolt.Tx) error {
		var rec nameRecord
		ok, err := load(tx, bucketNames, n.key(), &rec)
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("images: removing %q: %w", n, iofs.ErrNotExist)
		}
		if err := dropName(tx, n); err != nil {
			return err
		}
		if err := tx.Bucket(bucketTombs).Put(n.key(), []byte(time.Now().UTC().Format(time.RFC3339))); err != nil {
			return err
		}
		if used(tx, rec.Image) {
			return nil
		}
		return tx.Bucket(bucketImages).Delete([]byte(rec.Image.String()))
	})
}

// image returns the record of the image with this manifest digest.
func (c *catalog) image(digest v1.Hash) (rec imageRecord, ok bool, err error) {
	err = c.db.View(func(tx *bbolt.Tx) error {
		ok, err = load(tx, bucketImages, []byte(digest.String()), &rec)
		return err
	})
	return rec, ok, err
}

// names returns the names of an image.
func (c *catalog) names(digest v1.Hash) (list []Name) {
	prefix := []byte(digest.String() + "\x00")
	c.db.View(func(tx *bbolt.Tx) error {
		cur := tx.Bucket(bucketUses).Cursor()
		for k, _ := cur.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, _ = cur.Next() {
			list = append(list, parseKey(k[len(prefix):]))
		}
		return nil
	})
	return list
}

// layer returns the record of the layer with this sequence number.
func (c *catalog) layer(seq uint32) (rec layerRecord, ok bool, err error) {
	err = c.db.View(func(tx *bbolt.Tx) error {
		key := tx.Bucket(bucketLayer).Get(seqKey(uint64(seq)))
		if key == nil {
			return nil
		}
		if ok, err = load(tx, bucketLayers, key, &rec); err == nil && ok {
			rec.Key, err = v1.NewHash(string(key))
		}
		return err
	})
	return rec, ok, err
}

// setExpanded records the expanded size of a layer, once it was compiled.
func (c *catalog) setExpanded(layer v1.Hash, n int64) error {
	return c.db.Update(func(tx *bbolt.Tx) error {
		var rec layerRecord
		ok, err := load(tx, bucketLayers, []byte(layer.String()), &rec)
		if err != nil || !ok {
			return err
		}
		rec.Expanded = &n
		return store(tx, bucketLayers, []byte(layer.String()), rec)
	})
}

// view returns the name and image that the view with this sequence shows.
func (c *catalog) view(seq uint32) (rec viewRecord, ok bool, err error) {
	err = c.db.View(func(tx *bbolt.Tx) error {
		ok, err = load(tx, bucketView, seqKey(uint64(seq)), &rec)
		return err
	})
	return rec, ok, err
}

// viewOf returns the sequence of the view of image under n.
func (c *catalog) viewOf(n Name, image v1.Hash) (seq uint32, ok bool) {
	c.db.View(func(tx *bbolt.Tx) error {
		if v := tx.Bucket(bucketViews).Get(useKey(image, n)); len(v) == 8 {
			seq, ok = uint32(binary.BigEndian.Uint64(v)), true
		}
		return nil
	})
	return seq, ok
}
