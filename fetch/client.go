package fetch

import (
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// Options configure a Client. The zero value reads docker's and podman's
// credentials, has no mirrors, allows every registry.
type Options struct {
	CertsDir  string         // directory with HOST/hosts.toml as containerd has it; "" is none
	Insecure  []string       // hosts ("host" or "host:port") whose certificate is not checked, and which may speak plain HTTP
	Allow     []string       // globs of registries (host or host:port) that may be asked; empty allows all
	Deny      []string       // globs of hosts that are never asked, not as a mirror, for a token or by a redirect either; goes before Allow
	Keychain  authn.Keychain // nil is authn.DefaultKeychain: docker's config.json and helpers, else podman's auth.json
	Timeout   time.Duration  // longest that one operation may take when ctx has no deadline; 0 is a minute
	UserAgent string         // "" is "imgfs"
}

// Priority says who waits for a request.
type Priority int

// The priorities, the first served first. A host answers a bounded number of
// requests at once; some of its slots are for Demand alone.
const (
	Demand     Priority = iota // a reader waits
	Soon                       // what a reader is about to need
	Background                 // nobody waits
)

const (
	defaultTimeout = time.Minute
	maxSilence     = 20 * time.Second // longest wait for headers, or for the next byte
	maxAttempts    = 5                // of one request at one host, the first counted
	maxHosts       = 1024             // registries, hosts and tokens that are remembered
	maxHeader      = 256 << 10        // bytes of an answer's headers
)

// Client asks registries. It is safe for concurrent use.
type Client struct {
	o        Options
	hub      string                    // the registry that answers 401 for what it does not have
	silence  time.Duration             // longest wait for the next byte
	backoff  func(n int) time.Duration // pause before retry n, from 0
	plain    *http.Transport           // the system's certificates, no client certificate
	insecure *http.Transport           // for Options.Insecure: no certificate is checked
	auth     credentials
	holds    holds
	mu       sync.Mutex            // guards what follows; nothing is locked after it
	regs     map[string]*hostSet   // by registry
	hosts    map[string]*hostState // by "scheme://host"
	dial     func(ctx context.Context, network, addr string) (net.Conn, error)
}

// New returns a Client. It makes no request. An error is about a glob.
func New(o Options) (*Client, error) {
	d := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second,
		Control: func(_, addr string, _ syscall.RawConn) error { return mayDial(o.Allow, addr) }}
	return newClient(o, d.DialContext)
}

func newClient(o Options, dial func(ctx context.Context, network, addr string) (net.Conn, error)) (*Client, error) {
	for _, g := range append(append([]string(nil), o.Allow...), o.Deny...) {
		if _, err := path.Match(g, ""); err != nil {
			return nil, fmt.Errorf("fetch: reading glob %q: %w", g, err)
		}
	}
	if o.Keychain == nil {
		o.Keychain = authn.DefaultKeychain
	}
	if o.Timeout <= 0 {
		o.Timeout = defaultTimeout
	}
	if o.UserAgent == "" {
		o.UserAgent = "imgfs"
	}
	c := &Client{
		o:       o,
		hub:     name.DefaultRegistry,
		silence: min(maxSilence, o.Timeout/3),
		backoff: backoff,
		dial:    dial,
		regs:    map[string]*hostSet{},
		hosts:   map[string]*hostState{},
	}
	c.auth.init()
	c.plain = c.transport(nil)
	c.insecure = c.transport(&tls.Config{InsecureSkipVerify: true})
	return c, nil
}

// Close ends requests for tokens and drops idle connections. Other requests
// under way end with their contexts.
func (c *Client) Close() {
	c.auth.close()
	c.plain.CloseIdleConnections()
	c.insecure.CloseIdleConnections()
	c.mu.Lock()
	sets := make([]*hostSet, 0, len(c.regs))
	for _, s := range c.regs {
		sets = append(sets, s)
	}
	c.mu.Unlock()
	for _, s := range sets {
		s.closeIdle()
	}
}

// transport makes the connections for one TLS configuration. Redirects,
// credentials, compression and cookies are not its business.
func (c *Client) transport(conf *tls.Config) *http.Transport {
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            c.dial,
		TLSClientConfig:        conf,
		ForceAttemptHTTP2:      true,
		TLSHandshakeTimeout:    10 * time.Second,
		MaxIdleConns:           4 * slots,
		MaxIdleConnsPerHost:    slots,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: maxHeader,
		DisableCompression:     true,
		ReadBufferSize:         64 << 10,
	}
}

// backoff is 0.2 s, doubled with each retry up to 5 s, of which a random half
// is taken away so that readers do not come back together.
func backoff(n int) time.Duration {
	d := min(200*time.Millisecond<<min(n, 10), 5*time.Second)
	return d/2 + rand.N(d/2)
}

// bound gives an operation the Client's Timeout if ctx has no deadline.
func (c *Client) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, c.o.Timeout)
}

// state is what is shared by all requests to a host, named "scheme://host".
func (c *Client) state(key string) *hostState {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.hosts[key]
	if h == nil {
		if len(c.hosts) >= maxHosts {
			for k, old := range c.hosts {
				if old.pool.idle() {
					delete(c.hosts, k)
				}
			}
		}
		h = &hostState{}
		c.hosts[key] = h
	}
	return h
}

// HostStats counts what one host was asked.
type HostStats struct {
	Requests int64 // HTTP requests sent, those for tokens and after redirects too
	Bytes    int64 // bytes of bodies received
	Retries  int64 // requests that were sent again after a failure
}

// Stats are counters since the Client was made.
type Stats struct {
	Hosts map[string]HostStats // by "scheme://host"; of at most about a thousand hosts
}

// Stats returns the counters of now.
func (c *Client) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Stats{Hosts: make(map[string]HostStats, len(c.hosts))}
	for k, h := range c.hosts {
		s.Hosts[k] = HostStats{Requests: h.requests.Load(), Bytes: h.bytes.Load(), Retries: h.retries.Load()}
	}
	return s
}

// allowed reports whether the registry may be asked at all.
func (c *Client) allowed(host string) bool {
	return !c.denied(host) && (len(c.o.Allow) == 0 || matchHost(c.o.Allow, host))
}

// denied reports whether the host may be asked in no role.
func (c *Client) denied(host string) bool {
	return matchHost(c.o.Deny, host) || mayDial(c.o.Allow, host) != nil
}

// matchHost reports whether a glob matches host, with its port or without it.
// Docker Hub is docker.io, whichever of its names is used.
func matchHost(globs []string, host string) bool {
	names := []string{strings.ToLower(host)}
	if h, _, err := net.SplitHostPort(host); err == nil {
		names = append(names, strings.ToLower(h))
	}
	switch names[0] {
	case name.DefaultRegistry, "registry-1.docker.io":
		names = append(names, "docker.io")
	}
	for _, g := range globs {
		for _, n := range names {
			if ok, _ := path.Match(strings.ToLower(g), n); ok {
				return true
			}
		}
	}
	return false
}
