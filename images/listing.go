package images

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Children lists what is directly below path ("" is the mount's root), each
// sorted: the names of registries, namespaces and repositories, and the tags of
// the repository that path itself is. Digests are not listed, nor is .imgfs. Its
// cost grows with what it returns, not with what is here.
func (s *Store) Children(path string) (dirs, tags []string, err error) {
	err = s.cat.read(func(t *txn) error {
		prefix := []byte{}
		if path != "" {
			prefix = []byte(pathKey(path) + keyTag)
			err := t.scan(bucketNames, prefix, func(k, _ []byte) error {
				if tag := k[len(prefix):]; len(tag) > 0 && tag[0] != '@' {
					tags = append(tags, string(tag))
				}
				return nil
			})
			if err != nil {
				return err
			}
			prefix = []byte(pathKey(path) + keyComponent)
		}
		cur := t.Bucket(bucketNames).Cursor()
		for k, _ := cur.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); {
			t.c.reads.Add(1)
			end := bytes.IndexAny(k[len(prefix):], keyComponent+keyTag)
			if end <= 0 {
				return fmt.Errorf("images: the catalogue has the name %q", k)
			}
			child := k[:len(prefix)+end]
			if path != "" || string(child) != hiddenDir {
				dirs = append(dirs, string(child[len(prefix):]))
			}
			// All that is below this child sorts below its name with 0x02.
			k, _ = cur.Seek(append(bytes.Clone(child), 2))
		}
		return nil
	})
	return dirs, tags, err
}

// HasPath reports whether anything is here at or below path.
func (s *Store) HasPath(path string) (has bool) {
	s.cat.read(func(t *txn) error {
		has = t.hasPath(path)
		return nil
	})
	return has
}

func (t *txn) hasPath(path string) bool {
	for _, sep := range []string{keyTag, keyComponent} {
		if t.first(bucketNames, []byte(pathKey(path)+sep)) != nil {
			return true
		}
	}
	return false
}

// Info describes an image under one name.
type Info struct {
	Name     Name
	Digest   v1.Hash   // of the manifest
	Top      v1.Hash   // of what the registry answered: an index's, or the manifest's
	ID       v1.Hash   // of the config
	Created  time.Time // zero when the config does not say
	Pulled   time.Time
	Layers   int
	Platform string
	Dangling bool // no name stands for it: Name is {".imgfs/dangling", ID}
	Sizes
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
	_, err := s.cat.write(func(tx *txn) error {
		nodes, node := tx.Bucket(bucketNodes), tx.Bucket(bucketNode)
		var gone [][]byte
		err := nodes.ForEach(func(path, _ []byte) error {
			if !tx.hasPath(string(path)) {
				gone = append(gone, bytes.Clone(path))
			}
			return nil
		})
		for _, path := range gone {
			err = errors.Join(err, node.Delete(nodes.Get(path)), nodes.Delete(path))
		}
		return errors.Join(err, setCounter(tx.Bucket(bucketMeta), "nodes", uint64(node.Stats().KeyN)))
	})
	return err
}

// Node returns the inode number of the namespace node at path, giving one when
// it has none. It is the same after a restart.
func (s *Store) Node(path string) (Ino, error) {
	if path == "" {
		return RootIno, nil
	}
	var ino Ino
	read := func(tx *txn) error {
		if v := tx.get(bucketNodes, []byte(path)); len(v) == 8 {
			ino = Ino(binary.BigEndian.Uint64(v))
		}
		return nil
	}
	if err := s.cat.read(read); err != nil || ino != 0 {
		return ino, err
	}
	_, err := s.cat.write(func(tx *txn) error {
		if read(tx); ino != 0 {
			return nil
		}
		if _, err := tx.next("nodes", maxNodes); err != nil {
			return err
		}
		n, err := tx.next("node", lastNode)
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
	s.cat.read(func(tx *txn) error {
		if v := tx.get(bucketNode, seqKey(uint64(ino))); v != nil {
			path, ok = string(v), true
		}
		return nil
	})
	return path, ok
}
