package images

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/cache"
)

// readProfile returns the profile to fetch by: the kept one, else that of
// Options.Profiles; nil when there is none.
func (s *Store) readProfile(image v1.Hash) *profile {
	if p := s.keptProfile(image); p != nil || s.o.Profiles == "" {
		return p
	}
	return s.loadProfile(filepath.Join(s.o.Profiles, ProfileName(image)), image)
}

func (s *Store) keptProfile(image v1.Hash) *profile {
	return s.loadProfile(s.cache.Path(cache.Profile, image), image)
}

// loadProfile reads a profile; one that cannot be read is as none, and is logged.
func (s *Store) loadProfile(path string, image v1.Hash) *profile {
	p, err := func() (*profile, error) {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // not to wait at a FIFO
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
			return nil, errors.Join(err, fmt.Errorf("not a file: %w", iofs.ErrInvalid))
		}
		data, err := io.ReadAll(io.LimitReader(f, maxProfile+1))
		if err != nil {
			return nil, err
		}
		return parseProfile(data, image)
	}()
	if err != nil && !errors.Is(err, iofs.ErrNotExist) {
		s.log.Warn("a profile is not used", "file", path, "err", err)
	}
	return p
}

// keepProfile keeps a profile beside its image. The oldest go when there are too many.
func (s *Store) keepProfile(image v1.Hash, data []byte) error {
	err := s.cache.Install(cache.Profile, image, func(f *os.File) error {
		_, err := io.Copy(f, bytes.NewReader(data))
		return err
	})
	if err != nil {
		return err
	}
	return s.dropProfiles(maxProfiles)
}

// dropProfiles removes the oldest profiles until limit are left.
func (s *Store) dropProfiles(limit int) error {
	type kept struct {
		image v1.Hash
		time  time.Time
	}
	var all []kept
	err := s.cache.Each(cache.Profile, func(h v1.Hash) error {
		if st, err := os.Stat(s.cache.Path(cache.Profile, h)); err == nil {
			all = append(all, kept{h, st.ModTime()})
		}
		return nil
	})
	if err != nil || len(all) <= limit {
		return err
	}
	slices.SortFunc(all, func(a, b kept) int { return a.time.Compare(b.time) })
	for _, k := range all[:len(all)-limit] {
		if err := s.cache.Remove(cache.Profile, k.image); err != nil {
			return err
		}
	}
	return nil
}

// ProfileName is the name of the file with the profile of the image that has this
// manifest, wherever it is copied to: it is found by its name.
func ProfileName(image v1.Hash) string { return image.Hex + ".profile" }
