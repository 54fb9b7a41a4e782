// Package registrytest is a registry for tests that misbehaves on demand.
//
// A [Server] is an in-process registry (go-containerregistry's) behind a handler
// that asks for credentials, counts requests and bytes, redirects blobs, and
// breaks answers as its [Fault]s say. Only tests import it.
package registrytest

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Auth is what a Server asks its clients for.
type Auth int

// The ways to authenticate.
const (
	Open   Auth = iota // nothing
	Basic              // Options.User and Options.Password with each request
	Bearer             // a token from /token; that asks for User and Password, if there is a User
)

// Options make a Server. The zero value is an open registry on loopback.
type Options struct {
	Auth           Auth
	User, Password string
	Redirect       bool         // blobs are redirected to another name of this host, with a signature that ExpireRedirects makes worthless
	TLS            *tls.Config  // not nil: HTTPS, with httptest's certificate for 127.0.0.1 if it has none
	Pipe           bool         // no sockets: only Dial connects. For testing/synctest; Host is localhost:5000
	TokenLife      int          // expires_in of tokens, in seconds; 0 does not say
	Inner          http.Handler // instead of an empty registry: to share one between servers
}

// Request is one request that a Server had, when it was answered.
type Request struct {
	Method, Host, Path, Query string
	Range, Authorization      string
	Proto, Remote             string // of the connection
	Header                    http.Header
	Status                    int
	Bytes                     int64 // of the body that were sent
}

// Server is a registry. It is safe for concurrent use.
type Server struct {
	o     Options
	inner http.Handler
	http  *httptest.Server
	pipe  *pipe
	done  chan struct{} // closed when the test ends: lets everything go

	mu     sync.Mutex // guards what follows
	faults []*Fault
	log    []*Request
	busy   int
	most   int
	tokens map[string]string // token → scopes
	issued int
	signed int
}

// New starts a Server, which is closed with the test.
func New(t testing.TB, o Options) *Server {
	s := &Server{o: o, inner: o.Inner, done: make(chan struct{}), tokens: map[string]string{}}
	if s.inner == nil {
		s.inner = registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	}
	s.http = httptest.NewUnstartedServer(s)
	s.http.Config.ErrorLog = log.New(io.Discard, "", 0)
	switch {
	case o.Pipe:
		s.http.Listener.Close()
		s.pipe = &pipe{conns: make(chan net.Conn), done: make(chan struct{})}
		s.http.Listener = s.pipe
		s.http.Start()
	case o.TLS != nil:
		s.http.TLS = o.TLS
		s.http.EnableHTTP2 = true
		s.http.StartTLS()
	default:
		s.http.Start()
	}
	t.Cleanup(func() {
		close(s.done)
		s.http.CloseClientConnections()
		s.http.Close()
	})
	return s
}

// Host is the host and port that references to the registry begin with.
func (s *Server) Host() string { return s.http.Listener.Addr().String() }

// Handler is the registry without faults, credentials and counters.
func (s *Server) Handler() http.Handler { return s.inner }

// HTTP is the server itself, for its certificate.
func (s *Server) HTTP() *httptest.Server { return s.http }

// Dial connects to the server whatever the address is.
func (s *Server) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if s.pipe != nil {
		return s.pipe.dial(ctx)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", s.Host())
}

// Ref parses a reference without its host: "repo:tag", "repo@sha256:…".
func (s *Server) Ref(t testing.TB, ref string) name.Reference {
	t.Helper()
	r, err := name.ParseReference(s.Host()+"/"+ref, name.WeakValidation)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Push stores an image or an index under "repo:tag", past all faults, and
// returns the reference.
func (s *Server) Push(t testing.TB, ref string, what remote.Taggable) name.Reference {
	t.Helper()
	r := s.Ref(t, ref)
	o := remote.WithTransport(direct{s.inner})
	var err error
	switch w := what.(type) {
	case v1.ImageIndex:
		err = remote.WriteIndex(r, w, o)
	case v1.Image:
		err = remote.Write(r, w, o)
	default:
		t.Fatalf("registrytest: push of a %T", what)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// PutManifest stores any bytes as a manifest, under a tag or their digest.
func (s *Server) PutManifest(t testing.TB, repo, ref, mediaType string, raw []byte) {
	t.Helper()
	s.put(t, "/v2/"+repo+"/manifests/"+ref, mediaType, raw)
}

// PutBlob stores any bytes as a blob and returns its descriptor.
func (s *Server) PutBlob(t testing.TB, repo string, data []byte) v1.Descriptor {
	t.Helper()
	h, n, err := v1.SHA256(strings.NewReader(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	rec := httptest.NewRecorder()
	req := httptest.NewRequest(http.MethodPost, "/v2/"+repo+"/blobs/uploads/?digest="+h.String(), strings.NewReader(string(data)))
	s.inner.ServeHTTP(rec, req)
	if rec.Code != http.StatusCreated {
		t.Fatalf("registrytest: PUT of a blob: %d %s", rec.Code, rec.Body)
	}
	return v1.Descriptor{Digest: h, Size: n, MediaType: "application/vnd.oci.image.layer.v1.tar"}
}

func (s *Server) put(t testing.TB, path, mediaType string, raw []byte) {
	t.Helper()
	rec := httptest.NewRecorder()
	req := httptest.NewRequest(http.MethodPut, path, strings.NewReader(string(raw)))
	req.Header.Set("Content-Type", mediaType)
	s.inner.ServeHTTP(rec, req)
	if rec.Code != http.StatusCreated {
		t.Fatalf("registrytest: PUT %s: %d %s", path, rec.Code, rec.Body)
	}
}

// Requests counts the requests answered so far whose path contains part.
func (s *Server) Requests(part string) int {
	n := 0
	for _, r := range s.Log() {
		if strings.Contains(r.Path, part) {
			n++
		}
	}
	return n
}

// Bytes counts the bytes of bodies sent for paths that contain part.
func (s *Server) Bytes(part string) int64 {
	var n int64
	for _, r := range s.Log() {
		if strings.Contains(r.Path, part) {
			n += r.Bytes
		}
	}
	return n
}

// Log lists the requests in the order in which they came; Status is 0 for one
// that is not answered yet.
func (s *Server) Log() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Request, len(s.log))
	for i, r := range s.log {
		all[i] = *r
	}
	return all
}

// Most is the largest number of requests that there were at once.
func (s *Server) Most() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.most
}

// Reset forgets the requests counted so far. Those still being answered are not
// counted.
func (s *Server) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log, s.most = nil, 0
}

// RevokeTokens makes all tokens worthless that were given out.
func (s *Server) RevokeTokens() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
}

// ExpireRedirects makes all redirects worthless that were given out.
func (s *Server) ExpireRedirects() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.signed++
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	entry := &Request{
		Method: r.Method, Host: r.Host, Path: r.URL.Path, Query: r.URL.RawQuery,
		Proto: r.Proto, Remote: r.RemoteAddr, Range: r.Header.Get("Range"), Authorization: r.Header.Get("Authorization"), Header: r.Header.Clone(),
	}
	s.log = append(s.log, entry)
	s.busy++
	s.most = max(s.most, s.busy)
	s.mu.Unlock()

	defer func() {
		s.mu.Lock()
		s.busy--
		s.mu.Unlock()
	}()
	out := &writer{ResponseWriter: w, s: s, entry: entry}
	s.serve(out, r)
}

func (s *Server) serve(w *writer, r *http.Request) {
	if f := s.fault(r); f != nil {
		if f.apply(w, r) {
			return
		}
	}
	switch {
	case strings.HasPrefix(r.URL.Path, "/store/"):
		s.mu.Lock()
		good := r.URL.Query().Get("sig") == fmt.Sprint(s.signed)
		s.mu.Unlock()
		if !good {
			http.Error(w, "Request has expired", http.StatusForbidden)
			return
		}
		r = r.Clone(r.Context())
		r.URL.Path = strings.TrimPrefix(r.URL.Path, "/store")
		s.inner.ServeHTTP(w, r)
	case r.URL.Path == "/token":
		s.giveToken(w, r)
	case !s.welcome(w, r):
	case s.o.Redirect && strings.Contains(r.URL.Path, "/blobs/") && r.Method == http.MethodGet:
		_, port, _ := net.SplitHostPort(s.Host())
		s.mu.Lock()
		to := fmt.Sprintf("http://localhost:%s/store%s?sig=%d", port, r.URL.Path, s.signed)
		s.mu.Unlock()
		if s.o.Pipe {
			to = strings.Replace(to, "localhost", "127.0.0.1", 1)
		}
		http.Redirect(w, r, to, http.StatusTemporaryRedirect)
	default:
		s.inner.ServeHTTP(w, r)
	}
}

// direct sends requests to a handler without any server.
type direct struct{ h http.Handler }

func (d direct) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body == nil {
		r.Body = http.NoBody
	}
	rec := httptest.NewRecorder()
	d.h.ServeHTTP(rec, r)
	resp := rec.Result()
	resp.Request = r
	return resp, nil
}

// pipe is a listener without sockets.
type pipe struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func (p *pipe) dial(ctx context.Context) (net.Conn, error) {
	a, b := net.Pipe()
	select {
	case p.conns <- b:
		return a, nil
	case <-p.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *pipe) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipe) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *pipe) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "tcp" }
func (pipeAddr) String() string  { return "localhost:5000" }
