package fs

import (
	"context"
	"errors"
	iofs "io/fs"
	"syscall"

	"github.com/imgfs/imgfs/images"
)

// errnos is the table of docs/namespace.md: the first row that err is decides.
var errnos = []struct {
	err   error
	errno syscall.Errno
}{
	{images.ErrStale, syscall.ESTALE},
	{images.ErrRateLimit, syscall.EAGAIN},
	{images.ErrUnreachable, syscall.EHOSTUNREACH},
	{context.DeadlineExceeded, syscall.ETIMEDOUT},
	{syscall.ENOSPC, syscall.ENOSPC}, // the cache's disk is full and so is memory
	{errNotEmpty, syscall.ENOTEMPTY},
	{errReadOnly, syscall.EROFS},
	{errNotAllowed, syscall.EPERM},
	{images.ErrConflict, syscall.EBUSY},
	{images.ErrAmbiguous, syscall.ENOENT},
	{iofs.ErrExist, syscall.EEXIST},
	{iofs.ErrNotExist, syscall.ENOENT},
	{iofs.ErrPermission, syscall.EACCES},
	{iofs.ErrInvalid, syscall.EINVAL},
}

// What operations on names are refused for, beside the sentinels of other rooms.
var (
	errNotEmpty   = errors.New("it still has images")         // a directory of the namespace
	errReadOnly   = errors.New("images are read-only")        // what would change one
	errNotAllowed = errors.New("only images can be put here") // or be taken away, or moved
)

// errnoOf turns an error of a walk into the errno that its caller sees. EINTR is
// never one of them.
func errnoOf(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	for _, row := range errnos {
		if errors.Is(err, row.err) {
			return row.errno
		}
	}
	return syscall.EIO
}

// dataErrno is errnoOf for reading what exists: whatever is missing or invalid
// behind it, the file itself is neither. EAGAIN of a read would say that it can be
// waited for by poll, and a Go program would, for ever.
func dataErrno(err error) syscall.Errno {
	switch e := errnoOf(err); e {
	case syscall.ENOENT, syscall.EINVAL, syscall.EEXIST, syscall.EAGAIN:
		return syscall.EIO
	default:
		return e
	}
}
