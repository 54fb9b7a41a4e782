package fetch

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"syscall"
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

// Retry reports whether the same request may succeed later: the failure was
// the registry's load or the connection, not its answer.
func (e *Error) Retry() bool { return e.retry }

// silent reports whether the host could not be spoken to.
func (e *Error) silent() bool {
	return e.Status == 0 && (errors.Is(e.Err, ErrUnreachable) || errors.Is(e.Err, ErrUnavailable))
}

// errSilent is the cause with which an attempt is cancelled that brought
// nothing for too long.
var errSilent = errors.New("no answer")

// errorCodes are the codes of the distribution protocol that are worth
// repeating. Nothing else of an error's body is: it is the registry's, and may
// repeat what was sent to it.
var errorCodes = map[string]bool{
	"BLOB_UNKNOWN": true, "DENIED": true, "MANIFEST_BLOB_UNKNOWN": true, "MANIFEST_INVALID": true,
	"MANIFEST_UNKNOWN": true, "NAME_INVALID": true, "NAME_UNKNOWN": true, "TAG_INVALID": true,
	"TOOMANYREQUESTS": true, "UNAUTHORIZED": true, "UNAVAILABLE": true, "UNKNOWN": true, "UNSUPPORTED": true,
}

const (
	maxErrorBody  = 16 << 10         // bytes of an error's body that are looked at
	maxRetryAfter = 60 * time.Second // longest pause that a registry can ask for
)

// fail makes an Error without Op and Ref, which whoever began the operation adds.
func fail(kind error, format string, args ...any) *Error {
	return &Error{Err: fmt.Errorf("%w: %s", kind, redact(fmt.Sprintf(format, args...)))}
}

// named is e with what was being done. e may be an error of another flight,
// and is not changed.
func (e *Error) named(op, ref string) *Error {
	n := *e
	if n.Op == "" {
		n.Op, n.Ref = op, ref
	}
	return &n
}

// done is the error of an operation whose context has ended.
func done(ctx context.Context) *Error {
	if context.Cause(ctx) == errStalled {
		return &Error{Err: errStalled}
	}
	return &Error{Err: ctx.Err()}
}

// urls finds what must not be shown of a URL: user info and query.
var urls = regexp.MustCompile(`(?i)\b(https?://)(?:[^\s/?#"'@]*@)?([^\s?#"']*)(?:[?#][^\s"']*)?`)

// redact takes user info, queries and fragments from the URLs in s.
func redact(s string) string { return urls.ReplaceAllString(s, "$1$2") }

// netError says what became of a request that brought no answer, or of a body
// that broke. ctx is the operation's, attempt the one that the request ran under.
func netError(ctx, attempt context.Context, err error) *Error {
	if ctx.Err() != nil {
		return done(ctx)
	}
	if context.Cause(attempt) == errSilent {
		e := fail(ErrUnreachable, "%v", errSilent)
		e.retry, e.next = true, true
		return e
	}
	var dns *net.DNSError
	switch {
	case errors.Is(err, errPrivate):
		e := fail(iofs.ErrPermission, "%v", err)
		e.next = true
		return e
	case isTLS(err):
		e := fail(ErrUnavailable, "%v", err)
		e.next = true
		return e
	case errors.As(err, &dns) && dns.IsNotFound,
		errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		e := fail(ErrUnreachable, "%v", err)
		e.next = true
		return e
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		err = errors.New("connection closed early")
	}
	e := fail(ErrUnreachable, "%v", err)
	e.retry, e.next = true, true
	return e
}

// isTLS reports whether err is about certificates or the TLS protocol, so that
// trying again is of no use.
func isTLS(err error) bool {
	var (
		verify *tls.CertificateVerificationError
		record tls.RecordHeaderError
		alert  *net.OpError // of crypto/tls, with this Op
		ca     x509.UnknownAuthorityError
		host   x509.HostnameError
		cert   x509.CertificateInvalidError
	)
	return errors.As(err, &verify) || errors.As(err, &record) || errors.As(err, &ca) || errors.As(err, &host) || errors.As(err, &cert) ||
		errors.As(err, &alert) && (alert.Op == "remote error" || alert.Op == "local error")
}

// statusError says what an HTTP status other than 200 and 206 means. body is
// the beginning of the answer's body.
func statusError(status int, header http.Header, body []byte) *Error {
	code := errorCode(body)
	kind, e := ErrUnavailable, &Error{Status: status, next: true}
	switch {
	case status == http.StatusNotFound, status == http.StatusGone,
		status == http.StatusBadRequest && (code == "NAME_INVALID" || code == "TAG_INVALID"):
		kind = iofs.ErrNotExist
	case status == http.StatusUnauthorized, status == http.StatusForbidden,
		status == http.StatusPaymentRequired, status == http.StatusUnavailableForLegalReasons:
		kind = iofs.ErrPermission
	case status == http.StatusTooManyRequests:
		kind, e.retry = ErrRateLimit, true
		e.after = retryAfter(header, time.Now())
	case status == http.StatusRequestedRangeNotSatisfiable:
		kind = ErrDigest // the blob is shorter than its descriptor says
	case status == http.StatusNotImplemented, status == http.StatusHTTPVersionNotSupported:
	case status >= 500, status == http.StatusRequestTimeout, status == http.StatusTooEarly:
		e.retry, e.after = true, retryAfter(header, time.Now())
	}
	if code != "" {
		code = " (" + code + ")"
	}
	e.Err = fmt.Errorf("%w: the registry answered %d%s", kind, status, code)
	return e
}

// retryAfter is the pause that an answer asks for, at most maxRetryAfter.
func retryAfter(header http.Header, now time.Time) time.Duration {
	s := strings.TrimSpace(header.Get("Retry-After"))
	if s == "" {
		return 0
	}
	var d time.Duration
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		d = time.Duration(n) * time.Second
	} else if t, err := http.ParseTime(s); err == nil {
		d = t.Sub(now)
	} else if len(s) > 9 && strings.Trim(s, "0123456789") == "" {
		d = maxRetryAfter
	}
	return min(max(d, 0), maxRetryAfter)
}

// errorCode is the first known code of an error's body, or "".
func errorCode(body []byte) string {
	var v struct {
		Errors []struct {
			Code string `json:"code"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &v) != nil {
		return ""
	}
	for _, e := range v.Errors {
		if errorCodes[e.Code] {
			return e.Code
		}
	}
	return ""
}
