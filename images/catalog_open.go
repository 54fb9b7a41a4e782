package images

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// errDamaged reports a catalogue that cannot be used.
var errDamaged = errors.New("damaged")

// errPanicked is an errDamaged that may have left the database's locks held.
var errPanicked = fmt.Errorf("%w", errDamaged)

// blobSource is where manifests and configs are kept.
type blobSource interface {
	Blob(v1.Hash) (data []byte, ok bool, err error)
}

// openCatalog opens or makes the catalogue at path, and migrates an old one.
// blobs, which may be nil, says what an old one did not.
//
// A damaged one, or one that was found to be so when it was open, is set aside and made anew from the blobs and the journal of
// names beside it; then damage says so.
func openCatalog(path string, blobs blobSource) (c *catalog, damage, err error) {
	return resumeCatalog(path, blobs, false)
}

// resumeCatalog is openCatalog, which forgets nothing that the kernel may still
// hold, if held.
func resumeCatalog(path string, blobs blobSource, held bool) (c *catalog, damage, err error) {
	lost := missing(path)
	if !lost {
		if c, err = tryCatalog(path, blobs, held); err == nil {
			err = c.trust(path)
		}
	}
	if lost || errors.Is(err, errDamaged) {
		if c, damage, err = replaceCatalog(path, blobs, lost, err); err == nil {
			c.journal = openJournal(journalPath(path))
			c.journal.rewrite(c)
			damage = errors.Join(damage, removeMarker(path))
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("images: opening the catalogue %q: %w", path, err)
	}
	c.marker = markerPath(path)
	return c, damage, nil
}

// trust begins the journal, unless the catalogue is suspect: then it is closed,
// and the journal left as it was.
func (c *catalog) trust(path string) error {
	_, err := os.Lstat(markerPath(path))
	switch {
	case err == nil:
		err = fmt.Errorf("%w: something in it could not be read", errDamaged)
	case errors.Is(err, iofs.ErrNotExist):
		c.journal = openJournal(journalPath(path))
		if err = c.journal.rewrite(c); !errors.Is(err, errDamaged) {
			return nil
		}
	}
	c.journal.close()
	c.db.Close()
	return err
}

func journalPath(catalog string) string { return filepath.Join(filepath.Dir(catalog), "names.log") }

// missing reports whether there is no catalogue at path, though there was one.
func missing(path string) bool {
	st, err := os.Stat(path)
	if err == nil && st.Size() > 0 || err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return false
	}
	st, err = os.Stat(journalPath(path))
	return err == nil && st.Size() > 0
}

func tryCatalog(path string, blobs blobSource, held bool) (c *catalog, err error) {
	defer guard(debug.SetPanicOnFault(true), &err)
	var file *os.File
	open := func(name string, flag int, perm iofs.FileMode) (f *os.File, err error) {
		file, err = os.OpenFile(name, flag, perm)
		return file, err
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: 5 * time.Second, FreelistType: bbolt.FreelistMapType, OpenFile: open})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, errors.New("another process has it open")
	case errors.Is(err, berrors.ErrVersionMismatch):
		return nil, errors.New("its database has another version: use a newer imgfs")
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum):
		return nil, fmt.Errorf("%w: %v", errDamaged, err)
	case err != nil:
		var pathErr *iofs.PathError
		var sysErr *os.SyscallError
		var errno syscall.Errno // of mapping it, say: there is no memory
		if errors.As(err, &pathErr) || errors.As(err, &sysErr) || errors.As(err, &errno) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %v", errDamaged, err) // shorter than one page, say
	}
	c = &catalog{db: db, file: file}
	if err = c.prepare(path, blobs); err == nil && !held {
		err = c.dropRetired()
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// prepare checks the version and the structure, makes the buckets of a new
// catalogue, and migrates an old one.
func (c *catalog) prepare(path string, blobs blobSource) error {
	var version uint64
	err := c.read(func(tx *txn) error {
		if st, err := os.Stat(path); err != nil {
			return err
		} else if st.Size() < tx.Size() {
			return fmt.Errorf("%w: it has %d bytes, and %d are in use", errDamaged, st.Size(), tx.Size())
		}
		meta := tx.Bucket(bucketMeta)
		if meta == nil {
			if k, _ := tx.Cursor().First(); k != nil {
				return fmt.Errorf("%w: it has no %s", errDamaged, bucketMeta)
			}
			return nil // new
		}
		version = counter(meta, "version")
		var want [][]byte
		switch version {
		case 0:
			return fmt.Errorf("%w: it has no version", errDamaged)
		case 1:
			want = bucketsV1
		case catalogVersion:
			want = allBuckets
			var sum totals
			if err := decode(bucketMeta, totalsKey, meta.Get(totalsKey), &sum); err != nil {
				return fmt.Errorf("%w: %v", errDamaged, err)
			}
		default:
			return fmt.Errorf("it has version %d, this program knows %d: use a newer imgfs", version, catalogVersion)
		}
		for _, name := range want {
			b := tx.Bucket(name)
			if b == nil {
				return fmt.Errorf("%w: it has no %s", errDamaged, name)
			}
			b.Cursor().First() // panics when a page on the way is none
			b.Cursor().Last()
		}
		return nil
	})
	if err != nil || version == catalogVersion {
		return err
	}
	_, err = c.write(func(t *txn) error {
		for _, name := range allBuckets {
			if _, err := t.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		if _, err := t.total(); err != nil {
			return err
		}
		if version == 1 {
			if err := t.migrate(blobs); err != nil {
				return fmt.Errorf("migrating it from version 1: %w", err)
			}
		}
		return setCounter(t.Bucket(bucketMeta), "version", catalogVersion)
	})
	return err
}

func (c *catalog) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken == nil {
		c.journal.rewrite(c)
	}
	c.journal.close()
	if c.broken != nil {
		return c.broken // closing would wait for locks that nobody gives back
	}
	return c.db.Close()
}
