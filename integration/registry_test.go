package integration

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// distribution is Debian's docker-registry on a free loopback port, with its
// storage in a temporary directory.
type distribution struct {
	name   string // of its files in the directory of this run
	mu     sync.Mutex
	host   string
	cmd    *exec.Cmd
	pushed map[string]bool
}

// backend serves all tests of a run that do not start their own.
var backend = distribution{name: "registry"}

// start returns the registry's host:port.
func (d *distribution) start(t testing.TB) string {
	t.Helper()
	need(t, "docker-registry")
	host, err := d.launch()
	if err != nil {
		t.Fatal(err)
	}
	return host
}

// launch starts the registry, unless it runs, and returns its host:port.
func (d *distribution) launch() (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd != nil {
		return d.host, nil
	}
	d.pushed = map[string]bool{}
	var err error
	for range 3 { // another process may be faster to take a free port
		if err = d.try(); err == nil {
			return d.host, nil
		}
	}
	return "", err
}

func (d *distribution) try() error {
	host, err := freePort()
	if err != nil {
		return err
	}
	conf := fmt.Sprintf("version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: %s\nhttp:\n  addr: %s\n",
		filepath.Join(scratch.dir, d.name), host)
	path := filepath.Join(scratch.dir, d.name+".yml")
	if err := os.WriteFile(path, []byte(conf), 0o644); err != nil {
		return err
	}
	out, err := os.Create(filepath.Join(scratch.dir, d.name+".log"))
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command("docker-registry", "serve", path)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	for range 200 {
		if resp, err := http.Get("http://" + host + "/v2/"); err == nil {
			resp.Body.Close()
			d.host, d.cmd = host, cmd
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	cmd.Process.Kill()
	cmd.Wait()
	said, _ := os.ReadFile(out.Name())
	return fmt.Errorf("docker-registry does not answer: %s", said)
}

func (d *distribution) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd != nil {
		d.cmd.Process.Kill()
		d.cmd.Wait()
		d.cmd = nil
	}
}

// push pushes an image once per run.
func (d *distribution) push(t testing.TB, repoTag string, img func() v1.Image) {
	t.Helper()
	host := d.start(t)
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.pushed[repoTag] {
		pushImage(t, host+"/"+repoTag, img())
		d.pushed[repoTag] = true
	}
}

func pushImage(t testing.TB, ref string, img v1.Image) {
	t.Helper()
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatalf("push %s: %v", ref, err)
	}
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// A request that a registry was asked, as the proxy before it saw it.
type request struct {
	method, path, rang string
	status             int
	bytes              int64     // of the body, that went out
	came, last         time.Time // when it came, and when bytes of its body last went out
}

// isBlob reports whether the request was for the content of a blob, and which.
func (r request) blob() (digest string, ok bool) {
	_, digest, ok = strings.Cut(r.path, "/blobs/")
	return digest, ok && r.method == http.MethodGet
}

// A registry is a proxy before a registry: it counts requests and bytes, can
// stall a body, and can be stopped. Each test has its own.
type registry struct {
	host   string // localhost:port
	server *http.Server
	slow   atomic.Pointer[link] // nil: as fast as this machine is
	broken atomic.Pointer[broken]

	mu       sync.Mutex
	requests []*request
	stalls   map[string]*stall // by the end of a path
	lies     map[string]lie    // by the end of a path
	login    string            // "user:password"; empty: everybody may read
}

// A lie is what is answered instead of what the registry has.
type lie struct {
	media string
	body  []byte
}

// A stall holds a body back after some of its bytes.
type stall struct {
	after int64
	freed chan struct{}
}

// startRegistry starts a proxy before Debian's docker-registry.
func startRegistry(t testing.TB) *registry {
	t.Helper()
	return startProxy(t, backend.start(t))
}

func startProxy(t testing.TB, upstream string) *registry {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &registry{host: fmt.Sprintf("localhost:%d", l.Addr().(*net.TCPAddr).Port), stalls: map[string]*stall{}, lies: map[string]lie{}}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: upstream})
	proxy.FlushInterval = -1
	proxy.Transport = &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 64}
	proxy.ErrorLog = quiet // readers that go away are part of the tests
	proxy.ModifyResponse = func(resp *http.Response) error {
		q := resp.Request.Context().Value(requestKey{}).(*request)
		r.mu.Lock()
		q.status = resp.StatusCode
		held, _ := find(r.stalls, q.path)
		r.mu.Unlock()
		resp.Body = &countedBody{ReadCloser: resp.Body, r: r, q: q, held: held, gone: resp.Request.Context().Done()}
		return nil
	}
	r.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if l := r.slow.Load(); l != nil {
			w = l.writer(w)
		}
		q := &request{method: req.Method, path: req.URL.Path, rang: req.Header.Get("Range"), came: time.Now()}
		r.mu.Lock()
		r.requests = append(r.requests, q)
		said, ok := find(r.lies, q.path)
		login := r.login
		r.mu.Unlock()
		if user, password, _ := req.BasicAuth(); login != "" && user+":"+password != login {
			q.status = http.StatusUnauthorized
			w.Header().Set("WWW-Authenticate", `Basic realm="a test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, q.status)
			return
		}
		if ok {
			w.Header().Set("Content-Type", said.media)
			http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(said.body))
			return
		}
		req = req.WithContext(context.WithValue(req.Context(), requestKey{}, q))
		if !r.broken.Load().handle(w, req, proxy) {
			proxy.ServeHTTP(w, req)
		}
	})}
	go r.server.Serve(l)
	t.Cleanup(r.stop)
	return r
}

type requestKey struct{}

// find returns the value whose key ends the path.
func find[V any](m map[string]V, path string) (v V, ok bool) {
	for end, v := range m {
		if strings.HasSuffix(path, end) {
			return v, true
		}
	}
	return v, false
}

// answer has the registry answer body to requests for paths with that end.
func (r *registry) answer(end, media string, body []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lies[end] = lie{media, body}
}

// through puts a link before the registry, for the requests from now on.
func (r *registry) through(l *link) { r.slow.Store(l) }

// stop refuses and ends all connections.
func (r *registry) stop() { r.server.Close() }

// stallAfter holds back what follows after n bytes of the bodies of all blobs with
// that digest, until free is called.
func (r *registry) stallAfter(t testing.TB, digest v1.Hash, n int64) (free func()) {
	s := &stall{after: n, freed: make(chan struct{})}
	r.mu.Lock()
	r.stalls["/blobs/"+digest.String()] = s
	r.mu.Unlock()
	free = sync.OnceFunc(func() { close(s.freed) })
	t.Cleanup(free)
	return free
}

// log returns the requests since the last reset.
func (r *registry) log() []request {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]request, len(r.requests))
	for i, q := range r.requests {
		out[i] = *q
	}
	return out
}

func (r *registry) reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = nil
}

// traffic counts all requests, all bytes of bodies, and requests by blob.
func (r *registry) traffic() (requests int, bytes int64, blobs map[string]int) {
	blobs = map[string]int{}
	for _, q := range r.log() {
		requests++
		bytes += q.bytes
		if digest, ok := q.blob(); ok {
			blobs[digest]++
		}
	}
	return requests, bytes, blobs
}

func (r *registry) describe() string {
	var b strings.Builder
	log := r.log()
	for _, q := range log {
		fmt.Fprintf(&b, "%v to %v ms: %s %s %s → %d, %d bytes\n", q.came.Sub(log[0].came).Milliseconds(), q.last.Sub(log[0].came).Milliseconds(),
			q.method, q.path, q.rang, q.status, q.bytes)
	}
	return b.String()
}

type countedBody struct {
	io.ReadCloser
	r    *registry
	q    *request
	held *stall
	gone <-chan struct{}
	n    int64
}

func (b *countedBody) Read(p []byte) (int, error) {
	if b.held != nil {
		left := b.held.after - b.n
		if left <= 0 {
			select {
			case <-b.held.freed:
			case <-b.gone:
				return 0, io.ErrUnexpectedEOF
			}
			b.held = nil
		} else if int64(len(p)) > left {
			p = p[:left]
		}
	}
	n, err := b.ReadCloser.Read(p)
	b.n += int64(n)
	b.r.mu.Lock()
	b.q.bytes += int64(n)
	b.q.last = time.Now()
	b.r.mu.Unlock()
	return n, err
}

// push makes the image of the corpus available as debian/NAME-FORMAT (debian/NAME
// when it is gzip) and returns that path.
func (r *registry) push(t testing.TB, image, format string) string {
	t.Helper()
	tag := image
	if format != "gzip" {
		tag += "-" + format
	}
	backend.push(t, "debian:"+tag, func() v1.Image { return openCorpus(t).image(t, image, format) })
	return r.host + "/debian/" + tag
}

// tagSpelling is the reference that docker would take for a path of the mount.
func tagSpelling(path string) string {
	i := strings.LastIndexByte(path, '/')
	return path[:i] + ":" + path[i+1:]
}

// quiet is a log that nobody reads.
var quiet = log.New(io.Discard, "", 0)
