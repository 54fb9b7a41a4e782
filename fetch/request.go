package fetch

import (
	"context"
	"fmt"
	"io"
	iofs "io/fs"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
)

// call is one thing to be got from a registry, from whichever of its hosts.
type call struct {
	repo    string // "" for what is the registry's own
	path    string // "manifests/latest"; below the repository
	query   url.Values
	accept  []string
	scope   string // that a token needs
	tag     bool   // by a name that only a host with "resolve" may explain
	class   Priority
	first   int64     // first byte wanted
	last    int64     // last byte wanted; < 0: no range is asked for
	moved   *location // where it was the last time; may be nil
	prefer  string    // key of the endpoint to ask first
	avoid   string    // key of the endpoint to ask last
	unasked bool      // for the registry itself only, not for mirrors
	wait    *patience // does not count what is waited for a slot; may be nil
}

// pullScope is the scope of everything that is read from a repository.
func pullScope(repo string) string { return "repository:" + repo + ":pull" }

// url is where the endpoint has what is wanted.
func (ep *endpoint) url(cl *call) *url.URL {
	u := &url.URL{Scheme: ep.scheme, Host: ep.host, Path: ep.path + "/"}
	if cl.repo != "" {
		u.Path += cl.repo + "/"
	}
	u.Path += cl.path
	q := url.Values{}
	for k, v := range cl.query {
		q[k] = v
	}
	if ep.mirrors != "" {
		q.Set("ns", ep.mirrors) // tells a mirror of several registries which one is meant
	}
	u.RawQuery = q.Encode()
	return u
}

// run gets cl from the hosts of reg in order and gives the answer (200 or 206)
// to use, which owns it. What fails, in use too, is tried again, and at the next
// host, as far as ctx allows.
func (c *Client) run(ctx context.Context, reg name.Registry, cl *call, use func(*endpoint, *answer) *Error) *Error {
	all, err := c.endpoints(reg)
	if err != nil {
		return err
	}
	eps := order(all, cl)
	last := fail(ErrUnreachable, "no host may be asked for this")
	for i, ep := range eps {
		final := i == len(eps)-1
		if ep.alt && i > 0 && !last.silent() {
			continue // the host was spoken to
		}
		now := time.Now().UnixNano()
		if !final && (ep.state.down.Load() > now || ep.state.paused.Load() > now) {
			continue
		}
		err := c.persist(ctx, ep, cl, final, use)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || !err.next {
			return err
		}
		last = err
	}
	return last
}

// order lists the endpoints that may be asked for cl, the best first.
func order(all []*endpoint, cl *call) []*endpoint {
	var first, rest, end []*endpoint
	for _, ep := range all {
		switch {
		case cl.unasked && ep.mirrors != "", cl.tag && !ep.resolve, !cl.tag && !cl.unasked && !ep.pull:
		case ep.key() == cl.avoid:
			end = append(end, ep)
		case ep.key() == cl.prefer:
			first = append(first, ep)
		default:
			rest = append(rest, ep)
		}
	}
	return append(append(first, rest...), end...)
}

const (
	mirrorAttempts = 2                // at a host that others stand behind
	mirrorRest     = 30 * time.Second // it is passed over after it was not reached
)

// persist asks one endpoint, again if that may help.
func (c *Client) persist(ctx context.Context, ep *endpoint, cl *call, final bool, use func(*endpoint, *answer) *Error) *Error {
	attempts := maxAttempts
	if !final {
		attempts = mirrorAttempts
	}
	for n := 0; ; n++ {
		ans, err := c.attempt(ctx, ep, cl)
		if err == nil {
			if err = use(ep, ans); err == nil {
				return nil
			}
			ans.Close()
		}
		if ctx.Err() != nil {
			return done(ctx)
		}
		if !err.retry || n+1 >= attempts || !final && err.Status == http.StatusTooManyRequests {
			if !final && err.silent() {
				ep.state.down.Store(time.Now().Add(mirrorRest).UnixNano())
			}
			return err
		}
		cl.wait.end(0)
		late := pauseFor(ctx, max(c.backoff(n), err.after), err)
		cl.wait.begin()
		if late != nil {
			return late
		}
		ep.state.retries.Add(1)
	}
}

// attempt asks once: where the blob was the last time, else the endpoint, and
// that again if it wants other credentials. The answer has status 200 or 206.
func (c *Client) attempt(ctx context.Context, ep *endpoint, cl *call) (*answer, *Error) {
	if u := cl.moved.recall(ep); u != nil {
		ans, err := c.exchange(ctx, ep, cl, u, nil)
		if err == nil && ans.fine() {
			return ans, nil
		}
		if err == nil {
			ans.head()
		}
		if ctx.Err() != nil {
			return nil, done(ctx)
		}
		cl.moved.keep(ep, nil) // expired, most likely
	}
	cred, err := c.credential(ctx, ep, cl)
	if err != nil {
		return nil, err
	}
	for asked := 0; ; asked++ {
		ans, err := c.exchange(ctx, ep, cl, ep.url(cl), cred)
		if err != nil {
			return nil, err
		}
		if ans.fine() {
			if ans.moved {
				cl.moved.keep(ep, ans.url)
			}
			return ans, nil
		}
		body := ans.head()
		status := ans.StatusCode
		if asked == 0 && !ans.moved && (status == http.StatusUnauthorized || status == http.StatusForbidden) {
			fresh, again, err := c.refresh(ctx, ep, cl, ans.Header, cred)
			if err != nil {
				return nil, err
			}
			if again {
				cred = fresh
				continue
			}
		}
		e := statusError(status, ans.Header, body)
		if status == http.StatusTooManyRequests && e.after > 0 && !ans.moved {
			ep.state.pause(e.after)
		}
		if status == http.StatusUnauthorized && anonymous(cred) && ep.reg.RegistryStr() == c.hub {
			e.Err = fmt.Errorf("%w: Docker Hub answers %d for what it does not have", iofs.ErrNotExist, status)
		}
		return nil, e
	}
}

func (a *answer) fine() bool {
	return a.StatusCode == http.StatusOK || a.StatusCode == http.StatusPartialContent
}

// turn waits until the host may be asked, and for a slot, which release gives back.
func (c *Client) turn(ctx context.Context, ep *endpoint, cl *call) (release func(), e *Error) {
	cl.wait.end(0)
	defer cl.wait.begin()
	tellTurn(ctx, false)
	if e := ep.state.ready(ctx); e != nil {
		return nil, e
	}
	release, err := ep.state.pool.acquire(ctx, cl.class)
	if err != nil {
		return nil, done(ctx)
	}
	tellTurn(ctx, true)
	return release, nil
}

type turnKey struct{}

// onTurn has f called with false whenever a request of ctx begins to wait for its
// turn at a host, the first time or again, and with true when it has it. f must not
// block.
func onTurn(ctx context.Context, f func(has bool)) context.Context {
	return context.WithValue(ctx, turnKey{}, f)
}

func tellTurn(ctx context.Context, has bool) {
	if f, ok := ctx.Value(turnKey{}).(func(bool)); ok {
		f(has)
	}
}

// exchange sends one request, in its turn.
func (c *Client) exchange(ctx context.Context, ep *endpoint, cl *call, u *url.URL, cred *token) (*answer, *Error) {
	give, e := c.turn(ctx, ep, cl)
	if e != nil {
		return nil, e
	}
	release := sync.OnceFunc(give)
	req, err := http.NewRequest(http.MethodGet, u.String(), nil)
	if err != nil {
		release()
		return nil, fail(ErrUnavailable, "%v", err)
	}
	for _, a := range cl.accept {
		req.Header.Add("Accept", a)
	}
	if cl.last >= 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", cl.first, cl.last))
	}
	if ep.origin(u) {
		for k, v := range ep.header {
			req.Header[http.CanonicalHeaderKey(k)] = v
		}
		if cred != nil && cred.header != "" {
			req.Header.Set("Authorization", cred.header)
		}
	}
	ans, e := c.walk(ctx, ep, req)
	if e != nil {
		release()
		return nil, e
	}
	ans.release = release
	return ans, nil
}

// document gets something small as a whole. check judges it before it is taken;
// its error may send us to the next host.
func (c *Client) document(ctx context.Context, reg name.Registry, cl *call, limit int64, check func([]byte, http.Header) *Error) ([]byte, *Error) {
	cl.last = -1
	var data []byte
	err := c.run(ctx, reg, cl, func(_ *endpoint, a *answer) *Error {
		defer a.Close()
		if a.ContentLength > limit {
			return tooLarge(limit)
		}
		b, err := io.ReadAll(io.LimitReader(a, limit+1))
		if err != nil {
			return netError(ctx, a.ctx, err)
		}
		if int64(len(b)) > limit {
			return tooLarge(limit)
		}
		if e := check(b, a.Header); e != nil {
			return e
		}
		data = b
		return nil
	})
	return data, err
}

func tooLarge(limit int64) *Error {
	e := fail(ErrNotImage, "the answer is larger than %d bytes", limit)
	e.next = true
	return e
}
