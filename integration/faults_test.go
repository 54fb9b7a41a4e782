package integration

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// faultTimeout is the --timeout of the mount that faults are tried on.
const faultTimeout = 4 * time.Second

// right is what a row wants that must not fail.
const right = unix.Errno(0)

// skipped is what a row wants of a stage that it cannot happen at.
const skipped = unix.Errno(1 << 16)

// A fault is what a registry does instead of answering.
type fault struct {
	name              string
	walk, plain, lazy unix.Errno // what a walk to the image gets; a read of a layer that is streamed; one by ranges
	serve             func(w http.ResponseWriter, req *http.Request, pass http.Handler)
	times             int64         // how often; 0: until it is over
	pause             time.Duration // after which the next read is tried: what the registry asked for, or a request that nobody knows to be lost
	mkdir             bool          // a walk remembers that nothing was there, mkdir asks again
}

// broken is a fault of a registry that goes on.
type broken struct {
	*fault
	path string       // what it is about: a part of a request's path
	seen atomic.Int64 // requests
}

// handle answers in the place of a registry's handler, if the request is about what
// is broken.
func (b *broken) handle(w http.ResponseWriter, req *http.Request, pass http.Handler) bool {
	if b == nil || !strings.Contains(req.URL.Path, b.path) && !strings.Contains(req.URL.Path, "/elsewhere/") {
		return false
	}
	if n := b.seen.Add(1); b.times > 0 && n > b.times {
		return false
	}
	b.serve(w, req, pass)
	return true
}

// status answers with a status and headers.
func status(code int, header ...string) func(http.ResponseWriter, *http.Request, http.Handler) {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
	}
}

// changed answers with what the registry has, after change.
func changed(change func(w http.ResponseWriter, req *http.Request, header http.Header, body []byte) []byte) func(http.ResponseWriter, *http.Request, http.Handler) {
	return func(w http.ResponseWriter, req *http.Request, pass http.Handler) {
		rec := httptest.NewRecorder()
		pass.ServeHTTP(rec, req)
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		body := change(w, req, w.Header(), rec.Body.Bytes())
		if w.Header().Get("Content-Length") == "" {
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		}
		w.WriteHeader(rec.Code)
		w.Write(body)
	}
}

// cut sends the beginning of the body, and then what rest does.
func cut(rest func(w http.ResponseWriter, req *http.Request, body []byte)) func(http.ResponseWriter, *http.Request, http.Handler) {
	return changed(func(w http.ResponseWriter, req *http.Request, header http.Header, body []byte) []byte {
		header.Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(map[bool]int{true: http.StatusPartialContent, false: http.StatusOK}[header.Get("Content-Range") != ""])
		n := min(len(body)/2, 1000) // less than what counts as progress
		w.Write(body[:n])
		http.NewResponseController(w).Flush()
		rest(w, req, body[n:])
		panic(http.ErrAbortHandler)
	})
}

// reset ends the connection without a word.
func reset(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

func flip(b []byte) []byte {
	b = bytes.Clone(b)
	for i := range b {
		b[i] ^= 0x20
	}
	return b
}

func hang(_ http.ResponseWriter, req *http.Request, _ http.Handler) { <-req.Context().Done() }

// faults are the rows of the table.
func faults() []*fault {
	dead := "http://127.0.0.1:1/nobody"
	var turn atomic.Int64
	return []*fault{
		{name: "401", walk: unix.EACCES, plain: unix.EACCES, lazy: unix.EACCES, serve: status(401)},
		{name: "403", walk: unix.EACCES, plain: unix.EACCES, lazy: unix.EACCES, serve: status(403)},
		{name: "404", walk: unix.ENOENT, plain: unix.EIO, lazy: unix.EIO, serve: status(404), mkdir: true},
		{name: "429 once, Retry-After: 1", serve: status(429, "Retry-After", "1"), times: 1},
		{name: "429, Retry-After: 6", walk: unix.EAGAIN, plain: unix.ETIMEDOUT, lazy: unix.EIO, serve: status(429, "Retry-After", "6"), pause: 6 * time.Second},
		{name: "500 once", serve: status(500), times: 1},
		{name: "500", walk: unix.EIO, plain: unix.EIO, lazy: unix.EIO, serve: status(500)},
		{name: "503", walk: unix.EIO, plain: unix.EIO, lazy: unix.EIO, serve: status(503)},
		{name: "reset once", serve: reset, times: 1},
		{name: "reset", walk: unix.EHOSTUNREACH, plain: unix.EHOSTUNREACH, lazy: unix.EHOSTUNREACH, serve: reset},
		{name: "truncated once", serve: cut(func(http.ResponseWriter, *http.Request, []byte) {}), times: 1},
		{name: "truncated", walk: unix.EHOSTUNREACH, plain: unix.EHOSTUNREACH, lazy: unix.EHOSTUNREACH, serve: cut(func(http.ResponseWriter, *http.Request, []byte) {})},
		{name: "stalled in the body", walk: unix.ETIMEDOUT, plain: unix.ETIMEDOUT, lazy: unix.ETIMEDOUT,
			serve: cut(func(w http.ResponseWriter, req *http.Request, _ []byte) { <-req.Context().Done() })},
		{name: "a byte now and then", walk: unix.ETIMEDOUT, plain: unix.ETIMEDOUT, lazy: unix.ETIMEDOUT,
			serve: cut(func(w http.ResponseWriter, req *http.Request, body []byte) {
				for i := 0; i < len(body) && req.Context().Err() == nil; i++ {
					time.Sleep(100 * time.Millisecond)
					w.Write(body[i : i+1])
					http.NewResponseController(w).Flush()
				}
			})},
		{name: "accepts and never answers", walk: unix.ETIMEDOUT, plain: unix.ETIMEDOUT, lazy: unix.ETIMEDOUT, serve: hang, pause: faultTimeout},
		{name: "wrong bytes", walk: unix.EIO, plain: unix.EIO, lazy: unix.EIO,
			serve: changed(func(_ http.ResponseWriter, _ *http.Request, _ http.Header, body []byte) []byte { return flip(body) })},
		{name: "too short", walk: unix.EIO, plain: unix.EIO, lazy: unix.EIO,
			serve: changed(func(_ http.ResponseWriter, _ *http.Request, h http.Header, body []byte) []byte {
				h.Del("Content-Length")
				return body[:len(body)/2]
			})},
		{name: "too long", walk: unix.EIO, plain: unix.EIO, lazy: unix.EIO,
			serve: changed(func(_ http.ResponseWriter, _ *http.Request, h http.Header, body []byte) []byte {
				h.Del("Content-Length")
				return append(bytes.Clone(body), "and more"...)
			})},
		{name: "wrong Content-Range", walk: skipped, plain: skipped, lazy: unix.EIO,
			serve: changed(func(_ http.ResponseWriter, _ *http.Request, h http.Header, body []byte) []byte {
				h.Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(body)-1, 10*len(body)))
				return body
			})},
		{name: "redirect to a dead host", walk: unix.EHOSTUNREACH, plain: unix.EHOSTUNREACH, lazy: unix.EHOSTUNREACH, serve: status(307, "Location", dead)},
		{name: "redirects that expire at once", serve: func(w http.ResponseWriter, req *http.Request, pass http.Handler) {
			at := "/elsewhere/" + strconv.FormatInt(turn.Load(), 10) + "/"
			switch {
			case !strings.HasPrefix(req.URL.Path, "/elsewhere/"):
				w.Header().Set("Location", "/elsewhere/"+strconv.FormatInt(turn.Add(1), 10)+req.URL.Path)
				w.WriteHeader(http.StatusTemporaryRedirect)
			case strings.HasPrefix(req.URL.Path, at):
				turn.Add(1)
				req.URL.Path = "/" + strings.TrimPrefix(req.URL.Path, at)
				pass.ServeHTTP(w, req)
			default:
				w.WriteHeader(http.StatusForbidden)
			}
		}},
		// The last: the layer that is read by ranges comes whole from then on.
		{name: "no ranges", walk: skipped, plain: right, lazy: right, serve: func(w http.ResponseWriter, req *http.Request, pass http.Handler) {
			req.Header.Del("Range")
			pass.ServeHTTP(w, req)
		}},
	}
}

// faultStage is where in the life of an image a fault happens.
type faultStage struct {
	name    string
	want    func(*fault) unix.Errno
	prepare func(i int) (file, about string) // the path that is read, and what requests the fault is about
}

// TestFaults has a registry do what registries do, at a walk to an image, in a
// streamed layer and in one that is read by ranges. Every row has an errno, ends
// in time, and once it is over the same read is right. Who reads what is on this
// machine meanwhile waits for nothing. `make faults` prints the table; without
// IMGFS_TEST_LONG the rows that take their time are left out.
func TestFaults(t *testing.T) {
	r := startRegistry(t)
	m := startMount(t, "--timeout", faultTimeout.String(), "--log-level", "debug")
	rows := faults()
	host := backend.start(t)
	bodies := func(kind string, i int) []byte { return noiseOf(uint64(i)<<8|uint64(kind[0]), 300<<10) }

	var files []entry
	for i := range rows { // read from the last to the first: nothing is read ahead
		n := len(rows) - 1 - i
		files = append(files, file(fmt.Sprintf("f%d", i), string(bodies("lazy", n))))
	}
	files = append(files, file("here", "on this machine"))
	push := func(ref string, layers ...blob) string {
		img, err := newImage(layers...)
		if err != nil {
			t.Fatal(err)
		}
		pushImage(t, host+"/"+ref, img)
		return m.path(r.host, strings.Replace(ref, ":", "/", 1))
	}
	lazy := push("faults:lazy", estargzLayer(t, files...))
	cached := lazy + "/here"
	if _, err := os.ReadFile(cached); err != nil {
		t.Fatal(err)
	}
	plain := func(kind string, i int) (path, blob string) {
		archive := tarball(t, file("f", string(bodies(kind, i))))
		layer := bytesBlob(types.OCILayer, gzipped(archive), archive)
		return push(fmt.Sprintf("faults:%s%d", kind, i), layer) + "/f", "/blobs/" + layer.Hash.String()
	}
	stages := []faultStage{
		{"walk", func(f *fault) unix.Errno { return f.walk }, func(i int) (path, about string) {
			path, _ = plain("walk", i)
			return path, "/manifests/"
		}},
		{"plain", func(f *fault) unix.Errno { return f.plain }, func(i int) (path, about string) { return plain("plain", i) }},
		{"lazy", func(f *fault) unix.Errno { return f.lazy }, func(i int) (path, about string) { return fmt.Sprintf("%s/f%d", lazy, len(rows)-1-i), "/blobs/" }},
	}
	var table strings.Builder
	fmt.Fprintf(&table, "\n--timeout %v\n\n| fault | at | expected | seen | after | requests | the next read | longest read of what is here |\n|---|---|---|---|---|---|---|---|\n", faultTimeout)
	for i, f := range rows {
		for _, s := range stages {
			if s.want(f) == skipped || !long() && (s.want(f) == unix.ETIMEDOUT || f.pause > 0) {
				continue
			}
			t.Run(f.name+"/"+s.name, func(t *testing.T) {
				path, about := s.prepare(i)
				table.WriteString(tryFault(t, r, &broken{fault: f, path: about}, s, path, bodies(s.name, i), cached))
			})
		}
	}
	table.WriteString(unreachable(t, m))
	t.Log(table.String())
}

// tryFault makes one line of the table.
func tryFault(t *testing.T, r *registry, b *broken, s faultStage, path string, want []byte, cached string) string {
	f := b.fault
	r.broken.Store(b)
	var longest time.Duration
	over, watched := make(chan struct{}), make(chan error, 1)
	go func() { watched <- watch(cached, over, &longest) }()
	start := time.Now()
	got, err := os.ReadFile(path)
	took := time.Since(start)
	close(over)
	if err := <-watched; err != nil {
		t.Errorf("reading what is here: %v", err)
	}
	r.broken.Store(nil)
	seen := errnoOf(err)
	if seen != s.want(f) {
		t.Errorf("%v, want %v", err, s.want(f))
	}
	if err == nil && !bytes.Equal(got, want) {
		t.Error("wrong bytes")
	}
	// It is no matter of speed: what waits for ever takes longer than this.
	if took > 5*faultTimeout+f.pause {
		t.Errorf("it took %v with a --timeout of %v", took, faultTimeout)
	}
	if longest > faultTimeout {
		t.Errorf("a read of what is here took %v", longest)
	}
	time.Sleep(f.pause + 100*time.Millisecond) // a failure is remembered for a moment
	if f.mkdir && s.name == "walk" {
		if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
			t.Error(err)
		}
	}
	next := "right"
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		next = fmt.Sprint("wrong: ", err)
		t.Errorf("the next read: %v, right bytes: %v", err, bytes.Equal(got, want))
	}
	return fmt.Sprintf("| %s | %s | %s | %s | %.1f s | %d | %s | %.0f ms |\n", f.name, s.name, errnoName(s.want(f)), errnoName(seen), took.Seconds(), b.seen.Load(), next, longest.Seconds()*1e3)
}

// watch reads what is on this machine, from the server and not from the kernel's
// cache, until over.
func watch(path string, over <-chan struct{}, longest *time.Duration) error {
	for {
		start := time.Now()
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		_, err = io.ReadAll(f)
		f.Close()
		if err != nil {
			return err
		}
		*longest = max(*longest, time.Since(start))
		select {
		case <-over:
			return nil
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// unreachable tries registries that cannot be spoken to at all.
func unreachable(t *testing.T, m *mount) string {
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.TLS = &tls.Config{}
	secure.StartTLS() // with a certificate that nobody knows
	defer secure.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	var table strings.Builder
	for _, row := range []struct {
		name, host string
		want       unix.Errno
	}{
		{"unknown certificate", secure.Listener.Addr().String(), unix.EIO},
		{"connection refused", closed, unix.EHOSTUNREACH},
		{"no such host", "registry.invalid", unix.EHOSTUNREACH},
	} {
		start := time.Now()
		_, err := os.Stat(m.path(row.host, "a/b/latest"))
		took, seen := time.Since(start), errnoOf(err)
		if seen != row.want {
			t.Errorf("%s: %v, want %v", row.name, err, row.want)
		}
		fmt.Fprintf(&table, "| %s | walk | %s | %s | %.1f s | | | |\n", row.name, errnoName(row.want), errnoName(seen), took.Seconds())
	}
	return table.String()
}

func errnoName(e unix.Errno) string {
	if e == right {
		return "right"
	}
	return unix.ErrnoName(e)
}

// noiseOf is n bytes that do not compress, the same for a seed.
func noiseOf(seed uint64, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return b
}
