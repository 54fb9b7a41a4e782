package cache

import (
	"encoding/hex"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

const (
	formatVersion = 1

	lockFile    = "lock"
	logFile     = "imgfs.log" // of the server; begun before the directory is opened, and not ours
	versionFile = "version"
	tempDir     = "tmp"
	packDir     = "packs"
	layerDir    = "layers"
	treeDir     = "trees"
	blobDir     = "blobs/sha256"
	profileDir  = "profiles"
)

// key is a SHA-256 as bytes: the name of a layer, a tree or a blob.
type key [32]byte

func (k key) hex() string   { return hex.EncodeToString(k[:]) }
func (k key) hash() v1.Hash { return v1.Hash{Algorithm: "sha256", Hex: k.hex()} }

// keyOf checks that h names a file: sha256, 64 lower case hexadecimal digits.
func keyOf(h v1.Hash) (key, error) {
	if h.Algorithm != "sha256" {
		return key{}, fmt.Errorf("digest algorithm %q: %w", h.Algorithm, iofs.ErrInvalid)
	}
	k, ok := parseKey(h.Hex)
	if !ok {
		return key{}, fmt.Errorf("digest %q: %w", h.Hex, iofs.ErrInvalid)
	}
	return k, nil
}

func parseKey(s string) (k key, ok bool) {
	if len(s) != 2*len(k) || strings.ToLower(s) != s {
		return k, false
	}
	_, err := hex.Decode(k[:], []byte(s))
	return k, err == nil
}

// claim checks that dir is a cache of a version that we know, or can become one,
// locks it, and makes its directories.
func claim(dir string) (root *os.Root, lock *os.File, err error) {
	defer func() {
		if err != nil {
			if lock != nil {
				lock.Close()
			}
			if root != nil {
				root.Close()
			}
			root, lock, err = nil, nil, fmt.Errorf("cache: opening %q: %w", dir, err)
		}
	}()
	if err = os.MkdirAll(dir, 0o700); err != nil {
		return
	}
	if root, err = os.OpenRoot(dir); err != nil {
		return
	}
	// Before the lock, which would touch a directory that is not ours.
	if err = checkVersion(root); err != nil {
		return
	}
	if lock, err = root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return
	}
	if err = withFD(lock, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = ErrInUse
		}
		return
	}
	if err = checkVersion(root); err != nil { // another may have made it meanwhile
		return
	}
	err = layOut(root)
	return
}

// checkVersion refuses a newer cache, and a directory with something else in it.
func checkVersion(root *os.Root) error {
	data, err := root.ReadFile(versionFile)
	if err == nil {
		v, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 32)
		switch {
		case err != nil || v == 0:
			return fmt.Errorf("version file says %.20q: %w", data, iofs.ErrInvalid)
		case v > formatVersion:
			return fmt.Errorf("version %d, this imgfs knows %d: %w", v, formatVersion, ErrVersion)
		}
		return nil
	}
	if !errors.Is(err, iofs.ErrNotExist) {
		return err
	}
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.Readdirnames(16)
	if err != nil && len(names) > 0 {
		return err
	}
	for _, name := range names {
		if name != lockFile && name != versionFile+".new" && name != logFile && name != "lost+found" {
			return fmt.Errorf("not empty (it has %q) and not a cache: %w", name, iofs.ErrInvalid)
		}
	}
	return nil
}

// layOut writes the version file first: a directory that has anything else of
// ours has it.
func layOut(root *os.Root) error {
	if _, err := root.Stat(versionFile); errors.Is(err, iofs.ErrNotExist) {
		if err := root.WriteFile(versionFile+".new", []byte(strconv.Itoa(formatVersion)+"\n"), 0o600); err != nil {
			return err
		}
		if err := root.Rename(versionFile+".new", versionFile); err != nil {
			return err
		}
		if err := syncDir(root, "."); err != nil {
			return err
		}
	}
	for _, d := range []string{packDir, layerDir, treeDir, blobDir, profileDir, tempDir} {
		if err := root.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	return nil
}

func syncDir(root *os.Root, name string) error {
	d, err := root.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// sweep removes what a crash left, and registers the packs. Maps are loaded later.
func (c *Cache) sweep() error {
	if err := c.emptyTemp(); err != nil {
		return err
	}
	names, err := c.readNames(packDir)
	if err != nil {
		return err
	}
	const isPack, isMap = 1, 2
	seen := make(map[key]int)
	for _, name := range names {
		ext := path.Ext(name)
		k, ok := parseKey(strings.TrimSuffix(name, ext))
		switch {
		case ok && ext == ".pack":
			seen[k] |= isPack
		case ok && ext == ".map":
			seen[k] |= isMap
		default:
			c.logf("cache: unknown file left alone", "file", packDir+"/"+name)
		}
	}
	for k, have := range seen {
		switch have {
		case isPack: // bytes without a map: nothing of it can be seen
			err = c.root.Remove(packPath(k.hex()))
		case isMap:
			err = c.root.Remove(mapPath(k.hex()))
		default:
			c.packs[k] = newPack(c, k)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *Cache) emptyTemp() error {
	names, err := c.readNames(tempDir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := c.root.RemoveAll(tempDir + "/" + name); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cache) readNames(dir string) ([]string, error) {
	d, err := c.root.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

func packPath(name string) string { return packDir + "/" + name + ".pack" }
func mapPath(name string) string  { return packDir + "/" + name + ".map" }
