package images

import (
	"context"
	"errors"
	iofs "io/fs"

	"github.com/imgfs/imgfs/fetch"
	"github.com/imgfs/imgfs/unionfs"
)

// ReadAt reads the content of file ino. n < len(p) only at the end of the file.
func (s *Store) ReadAt(ctx context.Context, ino Ino, p []byte, off int64) (n int, err error) {
	l, err := s.layer(ino.seq())
	if errors.Is(err, iofs.ErrNotExist) {
		return 0, ErrStale
	}
	if err != nil {
		return 0, err
	}
	id := unionfs.FileID(ino.index())
	for repairs := 0; ; {
		st, err := l.open(ctx)
		if err != nil {
			return 0, err
		}
		if st.idx != nil {
			n, err = st.reader.ReadAt(ctx, id, p, off)
			if errors.Is(err, unionfs.ErrDamaged) && repairs < maxRepairs {
				repairs++
				l.damaged(st, err)
				continue
			}
			if off == 0 && err == nil && isProgram(p[:n]) {
				s.programRead(ino, l, id)
			}
			return n, err
		}
		n, err = s.readLive(ctx, st, id, p, off)
		if err != errSettled {
			return n, err
		}
	}
}

// readLive reads from a layer that is still arriving. It returns errSettled when
// the layer has another state now.
func (s *Store) readLive(ctx context.Context, st *layerState, id unionfs.ID, p []byte, off int64) (int, error) {
	if st.strict {
		if err := s.wait(ctx, st.settled, nil, st.progress); err != nil {
			return 0, err
		}
		if st.err != nil {
			return 0, st.err
		}
		return 0, errSettled
	}
	rctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan struct{})
	defer close(done)
	go func() { // ends the read when nothing arrives for too long
		if err := s.wait(rctx, done, nil, st.progress); err != nil {
			cancel(err)
		}
	}()
	n, err := st.pass.ReadAt(rctx, id, p, off)
	if err == nil {
		return n, nil
	}
	if cause := context.Cause(rctx); cause != nil {
		return 0, cause
	}
	select {
	case <-st.settled:
		if st.err != nil {
			return 0, st.err
		}
		return 0, errSettled
	default:
	}
	if notYet(err) || errors.Is(err, fetch.ErrNotKept) {
		if werr := s.wait(ctx, st.settled, nil, st.progress); werr != nil {
			return 0, werr
		}
		if st.err == nil {
			return 0, errSettled
		}
	}
	return n, err
}
