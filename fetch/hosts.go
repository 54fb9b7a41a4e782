package fetch

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	iofs "io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/sirupsen/logrus"
)

// hostsCheck is how long a hosts.toml is believed before its time is looked at again.
const hostsCheck = 5 * time.Second

// endpoint is one host that speaks for a registry: the registry's own, or a mirror.
type endpoint struct {
	scheme, host string
	path         string // of the API's root, "/v2" or what hosts.toml says; no slash at its end
	mirrors      string // the registry it is a mirror of, "" if it is the registry's own host
	pull         bool   // may be asked for what has a digest
	resolve      bool   // may be asked what a tag names
	header       http.Header
	tr           *http.Transport // for the endpoint itself
	away         *http.Transport // for where it redirects to: without client certificates
	state        *hostState
	reg          name.Registry // whose credentials are used
	alt          bool          // the endpoint before it by plain HTTP, for when that one speaks no TLS
}

// key names the host for pools and tokens.
func (ep *endpoint) key() string { return ep.scheme + "://" + ep.host }

// origin reports whether u is at the endpoint's own host.
func (ep *endpoint) origin(u *url.URL) bool {
	return u.Scheme == ep.scheme && strings.EqualFold(withPort(u.Scheme, u.Host), withPort(ep.scheme, ep.host))
}

// resource is what the keychain is asked for.
func (ep *endpoint) resource(repo string) authn.Resource {
	if repo == "" || ep.mirrors != "" {
		return ep.reg
	}
	return ep.reg.Repo(repo)
}

// hostSet is what speaks for one registry, in order.
type hostSet struct {
	eps     []*endpoint
	own     []*http.Transport // made for this set
	stamp   string            // of the files it was made from
	checked time.Time         // when the stamp was last compared
}

func (s *hostSet) closeIdle() {
	for _, t := range s.own {
		t.CloseIdleConnections()
	}
}

// endpoints returns the hosts that speak for reg, from certs.d if it has them.
func (c *Client) endpoints(reg name.Registry) ([]*endpoint, *Error) {
	host := configName(reg)
	if !hostOK(host) {
		return nil, fail(iofs.ErrNotExist, "no host can have the name %q", host)
	}
	if !c.allowed(host) {
		return nil, fail(iofs.ErrPermission, "the registry is not allowed here")
	}
	c.mu.Lock()
	set := c.regs[host]
	if set != nil && time.Since(set.checked) < hostsCheck {
		c.mu.Unlock()
		return set.eps, nil
	}
	c.mu.Unlock()

	stamp := c.stamp(host)
	if set == nil || set.stamp != stamp {
		fresh, err := c.load(reg, host)
		if err != nil {
			return nil, err
		}
		if set != nil {
			set.closeIdle()
		}
		set = fresh
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.regs) >= maxHosts {
		clear(c.regs)
	}
	c.regs[host] = &hostSet{eps: set.eps, own: set.own, stamp: stamp, checked: time.Now()}
	return set.eps, nil
}

// configName is the name of a registry in certs.d and to its users.
func configName(reg name.Registry) string {
	if reg.RegistryStr() == name.DefaultRegistry {
		return "docker.io"
	}
	return reg.RegistryStr()
}

// hostOK reports whether host is safe as the name of a directory.
func hostOK(host string) bool {
	for _, r := range host {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', strings.ContainsRune(".-_:[]", r):
		default:
			return false
		}
	}
	return len(host) <= 255 && strings.Trim(host, ".:[]_") != "" && !strings.HasPrefix(host, "_")
}

// stamp changes when what certs.d says of host does.
func (c *Client) stamp(host string) string {
	if c.o.CertsDir == "" {
		return ""
	}
	dirs := []string{host, "_default"}
	if h, p, err := net.SplitHostPort(host); err == nil {
		dirs = append(dirs, h+"_"+p+"_")
	}
	var b strings.Builder
	for _, d := range dirs {
		for _, f := range []string{"", "hosts.toml"} {
			if fi, err := os.Stat(filepath.Join(c.o.CertsDir, d, f)); err == nil {
				b.WriteString(fi.ModTime().String())
			}
			b.WriteByte('|')
		}
	}
	return b.String()
}

// load reads certs.d for a registry.
func (c *Client) load(reg name.Registry, host string) (*hostSet, *Error) {
	var wrong complaints
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.AddHook(&wrong)
	ctx := log.WithLogger(context.Background(), logrus.NewEntry(logger))

	made := map[*http.Client]http.RoundTripper{} // transports before anything was put around them
	var common http.RoundTripper                 // of hosts with no TLS settings of their own
	o := config.HostOptions{UpdateClient: func(h *http.Client) error {
		if common == nil {
			common = h.Transport
		}
		made[h] = h.Transport
		return nil
	}}
	if isLoopback(host) {
		o.DefaultScheme = "http"
	}
	if c.o.CertsDir != "" {
		o.HostDir = config.HostDirFromRoot(c.o.CertsDir)
	}
	found, err := config.ConfigureHosts(ctx, o)(host)
	if err == nil {
		err = wrong.first()
	}
	if err != nil {
		return nil, fail(ErrUnavailable, "hosts.toml of %s: %v", host, err)
	}
	set := &hostSet{}
	for _, h := range found {
		ep := endpoint{reg: reg, tr: c.plain, away: c.plain}
		if t, ok := made[h.Client].(*http.Transport); ok && t != common {
			ep.tr, ep.away = set.transports(c, t.TLSClientConfig)
		}
		either := h.Client.Transport != made[h.Client] // TLS settings, but "http" was said
		set.add(c, h, ep, either)
	}
	return set, nil
}

// transports makes the connections for an entry with TLS settings of its own:
// to its host, and to where that redirects. conf is looked at here and not later
// in the transport, which changes its own when it is first used.
func (s *hostSet) transports(c *Client, conf *tls.Config) (tr, away *http.Transport) {
	tr = c.transport(conf.Clone())
	away = tr
	if conf != nil && len(conf.Certificates) > 0 {
		bare := conf.Clone()
		bare.Certificates = nil
		away = c.transport(bare)
		s.own = append(s.own, away)
	}
	s.own = append(s.own, tr)
	return tr, away
}

// add appends the endpoints of one entry of hosts.toml, or of the registry
// itself. ep has the registry and the transports.
func (s *hostSet) add(c *Client, h docker.RegistryHost, ep endpoint, either bool) {
	if h.Host == "" || c.denied(h.Host) {
		return
	}
	ep.scheme, ep.host = h.Scheme, h.Host
	ep.path = strings.TrimRight(h.Path, "/")
	ep.pull = h.Capabilities.Has(docker.HostCapabilityPull)
	ep.resolve = h.Capabilities.Has(docker.HostCapabilityResolve)
	ep.header = h.Header
	if host := configName(ep.reg); h.Host != host && (host != "docker.io" || h.Host != "registry-1.docker.io") {
		ep.mirrors = host
		ep.reg, _ = name.NewRegistry(h.Host, name.WeakValidation)
	}
	plain := ep
	if insecure := c.isInsecure(ep.host); either || insecure && (ep.scheme == "https" || isLoopback(ep.host)) {
		if insecure && ep.tr == c.plain {
			ep.tr = c.insecure
		}
		ep.scheme = "https"
		s.push(c, ep)
		plain.scheme, plain.tr, plain.away, plain.alt = "http", c.plain, c.plain, true
	}
	s.push(c, plain)
}

func (s *hostSet) push(c *Client, ep endpoint) {
	ep.state = c.state(ep.key())
	s.eps = append(s.eps, &ep)
}

// complaints keeps what the reader of hosts.toml only logs: a file that it
// could not read would else be passed over in silence, and its mirrors with it.
type complaints struct {
	mu   sync.Mutex
	text []string
}

// Levels says that only errors matter.
func (w *complaints) Levels() []logrus.Level {
	return []logrus.Level{logrus.ErrorLevel, logrus.FatalLevel, logrus.PanicLevel}
}

// Fire keeps one entry.
func (w *complaints) Fire(e *logrus.Entry) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := e.Message
	if err, ok := e.Data[logrus.ErrorKey].(error); ok {
		s += ": " + err.Error()
	}
	w.text = append(w.text, s)
	return nil
}

func (w *complaints) first() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.text) == 0 {
		return nil
	}
	return errors.New(w.text[0])
}

// isInsecure reports whether Options.Insecure names the host.
func (c *Client) isInsecure(host string) bool { return matchHost(c.o.Insecure, host) }

// isLoopback reports whether host (with a port or without) is this machine.
func isLoopback(host string) bool {
	h := hostname(host)
	if h == "localhost" || strings.HasSuffix(h, ".localhost") {
		return true
	}
	ip, err := netip.ParseAddr(h)
	return err == nil && ip.Unmap().IsLoopback()
}

// isLocal reports whether host is an address that only this machine or its
// link knows: nothing that another host may send us to.
func isLocal(host string) bool {
	if isLoopback(host) {
		return true
	}
	ip, err := netip.ParseAddr(hostname(host))
	if err != nil {
		return false
	}
	ip = ip.Unmap()
	return ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified()
}

// hostname is host without its port, its brackets and its zone, in lower case.
func hostname(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host, _, _ = strings.Cut(strings.Trim(host, "[]"), "%")
	return strings.TrimSuffix(strings.ToLower(host), ".")
}

// withPort is host with the scheme's port if it has none.
func withPort(scheme, host string) string {
	if _, _, err := net.SplitHostPort(host); err == nil {
		return host
	}
	port := "443"
	if scheme == "http" {
		port = "80"
	}
	return net.JoinHostPort(strings.Trim(host, "[]"), port)
}
