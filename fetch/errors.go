package fetch

import (
	"errors"
	iofs "io/fs"
	"strconv"
	"time"
)

// The kinds of failure that [Error] can be, beside iofs.ErrNotExist (no such
// repository, tag or blob), iofs.ErrPermission (credentials refused, or the host
// is not allowed), context.DeadlineExceeded and context.Canceled.
var (
	// ErrRateLimit: the registry answered 429 and a retry did not help in time.
	ErrRateLimit = errors.New("too many requests")
	// ErrUnreachable: no connection, or it broke, after the retries.
	ErrUnreachable = errors.New("registry unreachable")
	// ErrUnavailable: 5xx after the retries, trouble with TLS, or an answer that
	// the protocol does not allow.
	ErrUnavailable = errors.New("registry unavailable")
	// ErrNotImage: what the reference names is no image that can be read. It is
	// iofs.ErrInvalid too.
	ErrNotImage = errors.New("not an image")
	// ErrDigest: the bytes are not those that the digest or the size names.
	ErrDigest = errors.New("digest mismatch")
	// ErrPlatform: the index has no image for the platform. It is
	// iofs.ErrNotExist too.
	ErrPlatform = errors.New("no image for the platform")
)

// Error is every error of the registry side of this package.
type Error struct {
	Op     string // what was being done: "resolve", "read", …
	Ref    string // the reference, repository or blob; never a URL, never a secret
	Status int    // HTTP status of the answer that decided, 0 if there was none
	Err    error  // the cause; one of the kinds above is in its chain, if any applies

	retry bool          // the same request may succeed later
	after time.Duration // not before this has passed (429)
	next  bool          // another host of the same registry may do better
}

// Error is `fetch: op "ref": cause`.
func (e *Error) Error() string {
	return "fetch: " + e.Op + " " + strconv.Quote(e.Ref) + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is joins the kinds of this package with those of io/fs.
func (e *Error) Is(target error) bool {
	switch target {
	case iofs.ErrInvalid:
		return errors.Is(e.Err, ErrNotImage)
	case iofs.ErrNotExist:
		return errors.Is(e.Err, ErrPlatform)
	}
	return false
}
