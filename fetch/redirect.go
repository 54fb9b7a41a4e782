package fetch

import (
	"context"
	"io"
	iofs "io/fs"
	"net/http"
	"net/url"
	"sync"
	"time"
)

const (
	maxRedirects = 5
	maxLocation  = 16 << 10 // bytes of a Location
)

// answer is a response whose body is still to be read, at the end of all
// redirects. It is for one goroutine. Close must be called.
type answer struct {
	*http.Response
	host    string   // "scheme://host" that answered
	url     *url.URL // that was asked last
	moved   bool     // by a redirect
	state   *hostState
	ctx     context.Context // of the request that led here: its body lives as long
	cancel  context.CancelCauseFunc
	silence *time.Timer // cancels the request when it fires; runs only while we wait
	limit   time.Duration
	release func() // gives the slot back
}

// Read reads the body; silence of the host for too long is an error.
func (a *answer) Read(p []byte) (int, error) {
	a.silence.Reset(a.limit)
	n, err := a.Body.Read(p)
	a.silence.Stop()
	a.state.bytes.Add(int64(n))
	return n, err
}

// Close ends the request and gives its slot back. It may be called again.
func (a *answer) Close() error {
	a.silence.Stop()
	err := a.Body.Close()
	a.cancel(context.Canceled)
	if a.release != nil {
		a.release()
	}
	return err
}

// head reads the beginning of an error's body, so that its connection can be
// used again, and closes it.
func (a *answer) head() []byte {
	body, _ := io.ReadAll(io.LimitReader(a, maxErrorBody))
	a.Close()
	return body
}

// mayGo reports why a registry may not send us to u, if so.
func (c *Client) mayGo(ep *endpoint, u *url.URL) *Error {
	switch {
	case u.Scheme != "http" && u.Scheme != "https", u.Host == "":
		return fail(ErrUnavailable, "the registry sends us to something that is not HTTP")
	case c.denied(u.Host):
		return fail(iofs.ErrPermission, "the registry sends us to %s, which is denied", u.Host)
	case isLocal(u.Host) && !isLocal(ep.host):
		return fail(ErrUnavailable, "the registry sends us to the local address %s", u.Host)
	case u.Scheme == "http" && ep.scheme == "https" && !isLoopback(u.Host) && !c.isInsecure(u.Host):
		return fail(ErrUnavailable, "the registry sends us from HTTPS to plain HTTP at %s, which is not among the insecure ones", u.Host)
	}
	return nil
}

// walk sends req and follows redirects. What is secret in its headers goes to
// the host that req is for, and to no other. The answer's status may be any.
func (c *Client) walk(ctx context.Context, ep *endpoint, req *http.Request) (*answer, *Error) {
	limit := c.silence
	run, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(limit, func() { cancel(errSilent) })
	req = req.WithContext(run)
	req.Header.Set("User-Agent", c.o.UserAgent)
	req.Header.Set("Accept-Encoding", "identity") // a range is one of the blob's bytes
	stop := func(e *Error) (*answer, *Error) {
		timer.Stop()
		cancel(context.Canceled)
		return nil, e
	}
	for hops := 0; ; hops++ {
		tr, key := ep.away, req.URL.Scheme+"://"+req.URL.Host
		if ep.origin(req.URL) {
			tr = ep.tr
		}
		state := c.state(key)
		state.requests.Add(1)
		timer.Reset(limit)
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return stop(netError(ctx, run, err))
		}
		loc := resp.Header.Get("Location")
		if resp.StatusCode < 300 || resp.StatusCode > 399 || resp.StatusCode == http.StatusNotModified || loc == "" {
			timer.Stop()
			return &answer{
				Response: resp, host: key, url: req.URL, moved: hops > 0, state: state,
				ctx: run, cancel: cancel, silence: timer, limit: limit,
			}, nil
		}
		resp.Body.Close()
		if hops == maxRedirects {
			return stop(fail(ErrUnavailable, "more than %d redirects", maxRedirects))
		}
		next, e := c.follow(ep, req, loc)
		if e != nil {
			return stop(e)
		}
		req = next
	}
}

// follow makes the request for a redirect of req.
func (c *Client) follow(ep *endpoint, req *http.Request, loc string) (*http.Request, *Error) {
	if req.Method != http.MethodGet {
		return nil, fail(ErrUnavailable, "a redirect of a request with a secret in it")
	}
	if len(loc) > maxLocation {
		return nil, fail(ErrUnavailable, "a redirect of %d bytes", len(loc))
	}
	u, err := req.URL.Parse(loc)
	if err != nil {
		return nil, fail(ErrUnavailable, "a redirect to what is no URL")
	}
	u.User, u.Fragment = nil, ""
	if e := c.mayGo(ep, u); e != nil {
		return nil, e
	}
	next := req.Clone(req.Context())
	next.URL, next.Host = u, ""
	if u.Scheme != req.URL.Scheme || withPort(u.Scheme, u.Host) != withPort(req.URL.Scheme, req.URL.Host) {
		next.Header.Del("Authorization")
		for k := range ep.header {
			next.Header.Del(k)
		}
	}
	return next, nil
}

// location remembers where a registry keeps a blob.
type location struct {
	mu   sync.Mutex
	host string // the endpoint that said so
	url  *url.URL
}

// recall returns the place that the endpoint named, or nil.
func (l *location) recall(ep *endpoint) *url.URL {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.host != ep.key() {
		return nil
	}
	return l.url
}

// keep remembers a place; nil forgets it.
func (l *location) keep(ep *endpoint, u *url.URL) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.host, l.url = ep.key(), u
}
