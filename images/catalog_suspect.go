package images

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
)

// suspects is what a catalogue knows of damage that Open did not see. It is met
// when something is read; a marker beside the catalogue then says for the next
// Open that all is to be made again.
type suspects struct {
	marker string       // path of the marker; "": none is to be left
	log    *slog.Logger // nil: none
	met    atomic.Bool
}

func markerPath(catalog string) string {
	return filepath.Join(filepath.Dir(catalog), "catalog.suspect")
}

// suspect leaves the marker, durably, if err is damage, once.
func (s *suspects) suspect(err error) {
	if s.marker == "" || !errors.Is(err, errDamaged) || s.met.Swap(true) {
		return
	}
	f, ferr := os.OpenFile(s.marker, os.O_CREATE|os.O_WRONLY, 0o600)
	if ferr == nil {
		ferr = errors.Join(f.Sync(), f.Close())
		syncParent(s.marker)
	}
	if ferr != nil {
		s.met.Store(false) // to be tried again
	}
	if s.log == nil {
		return
	}
	why, _, _ := strings.Cut(err.Error(), "\n") // without the stack
	s.log.Error("the catalogue is damaged, and is rebuilt at the next start", "err", why)
	if ferr != nil {
		s.log.Error("the catalogue could not be marked to be rebuilt", "err", ferr)
	}
}

// removeMarker removes the marker, durably, if there is one.
func removeMarker(catalog string) error {
	err := os.Remove(markerPath(catalog))
	if errors.Is(err, iofs.ErrNotExist) {
		return nil
	}
	syncParent(catalog)
	return err
}

// damage is errDamaged when something could not be read.
func (s *suspects) damage() error {
	if s.met.Load() {
		return fmt.Errorf("images: the catalogue is %w", errDamaged)
	}
	return nil
}
