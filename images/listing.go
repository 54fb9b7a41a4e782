package images

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"go.etcd.io/bbolt"
)

// Children lists what is directly below path ("" is the mount's root), each
// sorted: the names of registries, namespaces and repositories, and the tags of
// the repository that path itself is. Digests are not listed. Its cost grows
// with what it returns, not with what is here.
func (s *Store) Children(path string) (dirs, tags []string, err error) {
	err = s.cat.db.View(func(tx *bbolt.Tx) error {
		cur := tx.Bucket(bucketNames).Cursor()
		prefix := []byte{}
		if path != "" {
			prefix = []byte(pathKey(path) + keyTag)
			for k, _ := cur.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, _ = cur.Next() {
				if tag := k[len(prefix):]; len(tag) > 0 && tag[0] != '@' {
					tags = append(tags, string(tag))
				}
			}
			prefix = []byte(pathKey(path) + keyComponent)
		}
		for k, _ := cur.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); {
			end := bytes.IndexAny(k[len(prefix):], keyComponent+keyTag)
			if end <= 0 {
				return fmt.Errorf("images: the catalogue has the name %q", k)
			}
			child := k[:len(prefix)+end]
			dirs = append(dirs, string(child[len(prefix):]))
			// All that is below this child sorts below its name with 0x02.
			k, _ = cur.Seek(append(bytes.Clone(child), 2))
		}
		return nil
	})
	return dirs, tags, err
}

// HasPath reports whether anything is here at or below path.
func (s *Store) HasPath(path string) (has bool) {
	s.cat.db.View(func(tx *bbolt.Tx) error {
		has = hasPath(tx, path)
		return nil
	})
	return has
}

func hasPath(tx *bbolt.Tx, path string) bool {
	cur := tx.Bucket(bucketNames).Cursor()
	for _, sep := range []string{keyTag, keyComponent} {
		prefix := []byte(pathKey(path) + sep)
		if k, _ := cur.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix) {
			return true
		}
	}
	return false
}

// Info describes an image under one name.
type Info struct {
	Name       Name
	Digest     v1.Hash   // of the manifest
	Top        v1.Hash   // of what the registry answered: an index's, or the manifest's
	ID         v1.Hash   // of the config
	Created    time.Time // zero when the config does not say
	Pulled     time.Time
	Layers     int
	Platform   string
	Dangling   bool // no name stands for it: Name is {".imgfs/dangling", ID}
	Sizes
}

// List returns all images that are here, by name. Those named by digest only are
// included, with a tag that begins with "@".
func (s *Store) List() ([]Info, error) {
	var list []Info
	err := s.cat.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketNames).ForEach(func(k, _ []byte) error {
			var rec nameRecord
			if _, err := load(tx, bucketNames, k, &rec); err != nil {
				return err
			}
			var im imageRecord
			if _, err := load(tx, bucketImages, []byte(rec.Image.String()), &im); err != nil {
				return err
			}
			size, err := expandedSize(tx, im)
			list = append(list, Info{Name: parseKey(k), Digest: rec.Image, Top: rec.Top, ID: im.Config, Created: im.Created,
				Pulled: rec.Time, Layers: len(im.Layers), Sizes: Sizes{Compressed: im.Size, Expanded: size}, Platform: im.Platform})
			return err
		})
	})
	return list, err
}

// expandedSize adds up what the layers' records say, which was counted when the
// layers were compiled.
func expandedSize(tx *bbolt.Tx, im imageRecord) (int64, error) {
	var sum int64
	for _, l := range im.Layers {
		var rec layerRecord
		if _, err := load(tx, bucketLayers, tx.Bucket(bucketLayer).Get(seqKey(uint64(l.Seq))), &rec); err != nil {
			return 0, err
		}
		if rec.Expanded == nil {
			return -1, nil
		}
		sum += *rec.Expanded
	}
	return sum, nil
}

// Namespace nodes: numbers below firstNode are the root's and the control files'.
// maxNodes bounds what a server remembers of paths that were asked for; numbers
// are never given twice, and go far beyond it.
const (
	firstNode = 1024
	maxNodes  = 1 << 20
	lastNode  = 1 << 45
)

// dropNodes forgets the nodes of paths that nothing is at any more: those of
// walks in vain. It may only be called while no kernel holds one.
func (s *Store) dropNodes() error {
	return s.cat.db.Update(func(tx *bbolt.Tx) error {
		nodes, node := tx.Bucket(bucketNodes), tx.Bucket(bucketNode)
		var gone [][]byte
		err := nodes.ForEach(func(path, _ []byte) error {
			if !hasPath(tx, string(path)) {
				gone = append(gone, bytes.Clone(path))
			}
			return nil
		})
		for _, path := range gone {
			err = errors.Join(err, node.Delete(nodes.Get(path)), nodes.Delete(path))
		}
		return errors.Join(err, setCounter(tx.Bucket(bucketMeta), "nodes", uint64(node.Stats().KeyN)))
	})
}

// Node returns the inode number of the namespace node at path, giving one when
// it has none. It is the same after a restart.
func (s *Store) Node(path string) (Ino, error) {
	if path == "" {
		return RootIno, nil
	}
	var ino Ino
	read := func(tx *bbolt.Tx) error {
		if v := tx.Bucket(bucketNodes).Get([]byte(path)); len(v) == 8 {
			ino = Ino(binary.BigEndian.Uint64(v))
		}
		return nil
	}
	if err := s.cat.db.View(read); err != nil || ino != 0 {
		return ino, err
	}
	err := s.cat.db.Update(func(tx *bbolt.Tx) error {
		if read(tx); ino != 0 {
			return nil
		}
		if _, err := next(tx, "nodes", maxNodes); err != nil {
			return err
		}
		n, err := next(tx, "node", lastNode)
		if err != nil {
			return err
		}
		ino = Ino(n + firstNode)
		if err := tx.Bucket(bucketNodes).Put([]byte(path), seqKey(uint64(ino))); err != nil {
			return err
		}
		return tx.Bucket(bucketNode).Put(seqKey(uint64(ino)), []byte(path))
	})
	return ino, err
}

// NodePath returns the path of a namespace node; ok is false when the number was
// never given.
func (s *Store) NodePath(ino Ino) (path string, ok bool) {
	if ino == RootIno {
		return "", true
	}
	s.cat.db.View(func(tx *bbolt.Tx) error {
		if v := tx.Bucket(bucketNode).Get(seqKey(uint64(ino))); v != nil {
			path, ok = string(v), true
		}
		return nil
	})
	return path, ok
}
