package cache

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Kind is a kind of installed file.
type Kind uint8

// The kinds of installed files.
const (
	Index   Kind = iota + 1 // a layer index, by the digest of the layer's blob
	Tree                    // a merged tree, by its chain ID
	Blob                    // any blob, by its own digest, which is checked
	Profile                 // what was read of an image, by the digest of its manifest
)

// maxBlob bounds what [Cache.Blob] reads into memory: manifests and configs are
// at most 8 MiB, and nothing else is read whole.
const maxBlob = 64 << 20

// place is the directory of the files of kind k, and what their names end in.
func (k Kind) place() (dir, ext string) {
	switch k {
	case Index:
		return layerDir, ".idx"
	case Tree:
		return treeDir, ".tree"
	case Profile:
		return profileDir, ".profile"
	default:
		return blobDir, ""
	}
}

func (k Kind) path(h key) string {
	dir, ext := k.place()
	return dir + "/" + h.hex() + ext
}

// Install makes the file of kind k named h: write fills a temporary file, which
// is synced and renamed into place. Nothing is visible before, and what was
// there is replaced. write's error is returned wrapped. A Blob must hash to h
// ([ErrDigest]). [ErrFull] when the disk is.
func (c *Cache) Install(k Kind, h v1.Hash, write func(*os.File) error) error {
	err := c.install(k, h, write)
	if err != nil {
		if isFull(err) && !errors.Is(err, ErrFull) {
			err = fmt.Errorf("%w (%w)", ErrFull, err)
		}
		return fmt.Errorf("cache: installing %q: %w", h, err)
	}
	return nil
}

func (c *Cache) install(k Kind, h v1.Hash, write func(*os.File) error) (err error) {
	id, err := keyOf(h)
	if err != nil {
		return err
	}
	tmp := tempDir + "/" + rand.Text()
	f, err := c.root.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			c.root.Remove(tmp)
		}
	}()
	if err = c.step("install-write"); err != nil {
		return err
	}
	if err = write(f); err != nil {
		return err
	}
	if k == Blob {
		if err = checkFile(f, id); err != nil {
			return err
		}
	}
	if err = c.datasync(f, "install-sync"); err != nil {
		return err
	}
	if err = c.step("install-rename"); err != nil {
		return err
	}
	name := k.path(id)
	if err = c.root.Rename(tmp, name); err != nil {
		return err
	}
	return syncDir(c.root, path.Dir(name))
}

func checkFile(f *os.File, want key) error {
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(f, 0, 1<<62)); err != nil {
		return err
	}
	if key(sum.Sum(nil)) != want {
		return ErrDigest
	}
	return nil
}

// Path is the host path of an installed file, there or not; empty when h is no sha256.
func (c *Cache) Path(k Kind, h v1.Hash) string {
	id, err := keyOf(h)
	if err != nil {
		return ""
	}
	return filepath.Join(c.dir, filepath.FromSlash(k.path(id)))
}

// Has reports whether the file is installed.
func (c *Cache) Has(k Kind, h v1.Hash) bool {
	id, err := keyOf(h)
	if err != nil {
		return false
	}
	_, err = c.root.Lstat(k.path(id))
	return err == nil
}

// Remove removes an installed file; one that is not there is no error.
func (c *Cache) Remove(k Kind, h v1.Hash) error {
	id, err := keyOf(h)
	if err == nil {
		err = c.root.Remove(k.path(id))
	}
	if err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return fmt.Errorf("cache: removing %q: %w", h, err)
	}
	return nil
}

// PutBlob keeps a blob. [ErrDigest] when data does not hash to h, [ErrFull] when the disk is full.
func (c *Cache) PutBlob(h v1.Hash, data []byte) error {
	id, err := keyOf(h)
	if err == nil && key(sha256.Sum256(data)) != id {
		err = ErrDigest
	}
	if err != nil {
		return fmt.Errorf("cache: keeping blob %q: %w", h, err)
	}
	if c.Has(Blob, h) {
		// A damaged one must not stop a good one.
		if old, ok, err := c.Blob(h); err == nil && ok && bytes.Equal(old, data) {
			return nil
		}
	}
	return c.Install(Blob, h, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
}

// Blob returns a blob that was kept. One that does not match its digest any more
// is removed and is a miss, as is one larger than 64 MiB (use Path).
func (c *Cache) Blob(h v1.Hash) (data []byte, ok bool, err error) {
	id, err := keyOf(h)
	if err != nil {
		return nil, false, fmt.Errorf("cache: reading blob %q: %w", h, err)
	}
	f, err := c.root.Open(Blob.path(id))
	if errors.Is(err, iofs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("cache: reading blob %q: %v", h, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, false, fmt.Errorf("cache: reading blob %q: %v", h, err)
	}
	if st.Size() > maxBlob {
		return nil, false, nil
	}
	data, err = io.ReadAll(io.LimitReader(f, maxBlob+1))
	if err != nil || key(sha256.Sum256(data)) != id {
		c.logf("cache: damaged blob removed", "blob", h.String(), "err", err)
		return nil, false, c.Remove(Blob, h)
	}
	return data, true, nil
}
