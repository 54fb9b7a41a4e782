package fs

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"syscall"
	"testing"

	"github.com/imgfs/imgfs/images"
)

// The table of docs/namespace.md: what a walk says, and what a file that is there.
func TestErrno(t *testing.T) {
	for _, c := range []struct {
		err        error
		walk, data syscall.Errno
	}{
		{nil, 0, 0},
		{iofs.ErrNotExist, syscall.ENOENT, syscall.EIO},
		{iofs.ErrPermission, syscall.EACCES, syscall.EACCES},
		{iofs.ErrInvalid, syscall.EINVAL, syscall.EIO},
		{images.ErrRateLimit, syscall.EAGAIN, syscall.EIO},
		{images.ErrUnreachable, syscall.EHOSTUNREACH, syscall.EHOSTUNREACH},
		{context.DeadlineExceeded, syscall.ETIMEDOUT, syscall.ETIMEDOUT},
		{images.ErrStale, syscall.ESTALE, syscall.ESTALE},
		{errNotEmpty, syscall.ENOTEMPTY, syscall.ENOTEMPTY},
		{errReadOnly, syscall.EROFS, syscall.EROFS},
		{errNotAllowed, syscall.EPERM, syscall.EPERM},
		{errNoImage, syscall.ENOENT, syscall.EIO},
		{images.ErrConflict, syscall.EBUSY, syscall.EBUSY},
		{images.ErrAmbiguous, syscall.ENOENT, syscall.EIO},
		{fmt.Errorf("%w: an image cannot be changed: %w", iofs.ErrInvalid, errReadOnly), syscall.EROFS, syscall.EROFS},
		{iofs.ErrExist, syscall.EEXIST, syscall.EIO},
		{syscall.ENOSPC, syscall.ENOSPC, syscall.ENOSPC},
		{context.Canceled, syscall.EIO, syscall.EIO},
		{syscall.EINTR, syscall.EIO, syscall.EIO},
		{syscall.EBADF, syscall.EIO, syscall.EIO},
		{errors.New("the registry answered 503"), syscall.EIO, syscall.EIO},
	} {
		err := c.err
		if err != nil {
			err = fmt.Errorf("images: opening %q: %w", "x:1", err)
		}
		if got := errnoOf(err); got != c.walk {
			t.Errorf("errnoOf(%v) = %v, want %v", err, got, c.walk)
		}
		if got := dataErrno(err); got != c.data {
			t.Errorf("dataErrno(%v) = %v, want %v", err, got, c.data)
		}
	}
}
