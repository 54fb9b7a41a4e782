package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/fs"
	"github.com/imgfs/imgfs/images"
)

// api speaks HTTP for what a file operation cannot say, on a Unix socket in the
// cache directory, which is its owner's alone; and, when asked to (--http), what
// only tells something on a TCP port.
//
// Its owner closes it before the store.
type api struct {
	dir     string // the mount point
	given   *handover
	store   *images.Store
	metrics *metrics
	log     *slog.Logger
	ctx     context.Context // of all requests; ends with Close
	cancel  context.CancelFunc

	server  atomic.Pointer[fs.Server] // nil until it is mounted
	socket  string                    // path of the socket; "" when there is none
	servers []*http.Server
	running sync.WaitGroup // servers and requests
}

func newAPI(dir string, given *handover, store *images.Store, log *slog.Logger) (*api, error) {
	a := &api{dir: dir, given: given, store: store, log: log}
	m, err := newMetrics(a.stats, store.Totals)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	a.metrics = m
	a.ctx, a.cancel = context.WithCancel(context.Background())
	return a, nil
}

// stats are the mount's counters; none before there is one.
func (a *api) stats() fs.Stats {
	if s := a.server.Load(); s != nil {
		return s.Stats()
	}
	return fs.Stats{PID: os.Getpid(), Started: time.Now()}
}

// socketName is the socket's name in the cache directory.
const socketName = "imgfs.sock"

// Bounds of a connection on a TCP port, where anybody may be at the other end.
const (
	httpHeaderTime = 5 * time.Second
	httpTime       = 30 * time.Second
	httpIdle       = time.Minute
	httpHeader     = 16 << 10 // bytes
)

// listen serves what c asks for. Without the socket a mount works too.
func (a *api) listen(c *config) error {
	if err := a.serveSocket(c.cacheDir); err != nil {
		a.log.Warn("no socket: imgfs fsck cannot be run while it is mounted", "err", err)
	}
	if c.http == "" {
		return nil
	}
	err := a.serveTCP(c.http)
	if err != nil && a.given.Again { // a server that cannot die yet has the port still
		a.log.Warn("no metrics by HTTP until the next restart", "err", err)
		return nil
	}
	return err
}

// serveSocket answers on the socket. A socket that is there already is that of a
// server that died: this one has the cache's lock.
func (a *api) serveSocket(cacheDir string) error {
	listener, err := listenSocket(cacheDir)
	if err != nil {
		return fmt.Errorf("socket %q: %w", filepath.Join(cacheDir, socketName), err)
	}
	a.socket = filepath.Join(cacheDir, socketName)
	mux := a.public()
	mux.HandleFunc("POST /fsck", a.fsck)
	mux.HandleFunc("POST /restart", a.restart)
	mux.HandleFunc("GET /events", a.events)
	mux.HandleFunc("GET /profile/{digest}", a.profile)
	mux.HandleFunc("POST /profile/{digest}", a.profile)
	mux.HandleFunc("PUT /profile/{digest}", a.profile)
	mux.HandleFunc("DELETE /profile/{digest}", a.profile)
	// No limit on the time of an answer: checking everything takes as long as it takes.
	a.serve(listener, &http.Server{Handler: mux, ReadHeaderTimeout: httpHeaderTime, MaxHeaderBytes: httpHeader})
	return nil
}

// serveTCP answers on addr, nothing but questions.
func (a *api) serveTCP(addr string) error {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("--http %q: %w", addr, err)
	}
	a.log.Info("serving metrics and status", "addr", listener.Addr().String())
	a.serve(listener, &http.Server{
		Handler: a.public(), ReadHeaderTimeout: httpHeaderTime, ReadTimeout: httpTime, WriteTimeout: httpTime,
		IdleTimeout: httpIdle, MaxHeaderBytes: httpHeader,
	})
	return nil
}

func (a *api) serve(listener net.Listener, server *http.Server) {
	handler := server.Handler
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.running.Add(1)
		defer a.running.Done()
		handler.ServeHTTP(w, r)
	})
	server.BaseContext = func(net.Listener) context.Context { return a.ctx }
	server.ErrorLog = log.New(logWriter{a.log}, "", 0)
	a.servers = append(a.servers, server)
	a.running.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("api", "addr", listener.Addr().String(), "err", err)
		}
	})
}

// logWriter puts what net/http complains of into our log.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(line []byte) (int, error) {
	w.log.Debug("api", "err", string(bytes.TrimSpace(line)))
	return len(line), nil
}

// closeTime is how long answers may take to reach those who asked.
const closeTime = 5 * time.Second

// Close ends all requests and takes the socket away. Nothing uses the store
// through it any more when it returns.
func (a *api) Close() {
	a.cancel()
	if a.socket != "" {
		if err := os.Remove(a.socket); err != nil {
			a.log.Warn("socket", "err", err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	for _, s := range a.servers {
		if s.Shutdown(ctx) != nil {
			_ = s.Close() // connections of those who do not read
		}
	}
	a.running.Wait()
}

// public are the questions that change nothing and name no image.
func (a *api) public() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		var text bytes.Buffer
		if err := a.metrics.write(&text); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_, _ = w.Write(text.Bytes()) // who asked is gone, which is nobody's problem
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if health := a.health(); health != healthy {
			http.Error(w, health, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, healthy)
	})
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(a.status())
	})
	return mux
}

// healthy is what a server says that can do its work.
const healthy = "healthy"

// health says what is wrong with the server, if it is plain to see.
func (a *api) health() string {
	if _, err := a.store.Totals(); err != nil {
		return fmt.Sprintf("the catalogue cannot be read: %v", err)
	}
	return healthy
}

// serverStatus is the answer to GET /status.
type serverStatus struct {
	Mount   string   `json:"mount"`
	Version string   `json:"version"`
	Health  string   `json:"health"`
	Uptime  float64  `json:"uptime"` // seconds
	Stats   fs.Stats `json:"stats"`
}

func (a *api) status() serverStatus {
	s := a.stats()
	return serverStatus{Mount: a.dir, Version: version(), Health: a.health(), Uptime: time.Since(s.Started).Seconds(), Stats: s}
}

// checkLine is a line of the answer to POST /fsck: a finding, or, at the end,
// what was looked at or why no more could be.
type checkLine struct {
	Finding *images.Finding `json:"finding,omitempty"`
	Checked *images.Checked `json:"checked,omitempty"`
	Error   string          `json:"error,omitempty"`
}

// fsck checks the store, while it is used; with ?repair=true it repairs too.
func (a *api) fsck(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/jsonl")
	var mu sync.Mutex
	lines := json.NewEncoder(w)
	line := func(l checkLine) {
		mu.Lock()
		defer mu.Unlock()
		if lines.Encode(l) == nil {
			_ = http.NewResponseController(w).Flush()
		}
	}
	checked, err := a.store.Check(r.Context(), r.URL.Query().Get("repair") == "true", func(f images.Finding) {
		line(checkLine{Finding: &f})
	})
	if err != nil {
		line(checkLine{Error: err.Error()})
		return
	}
	line(checkLine{Checked: &checked})
}

// restart ends this process as a crash would, which loses nothing: what is on the
// disk is good at every moment, and the kernel asks the next server again.
func (a *api) restart(w http.ResponseWriter, _ *http.Request) {
	if !a.given.supervised() {
		http.Error(w, errAlone.Error(), http.StatusConflict)
		return
	}
	w.WriteHeader(http.StatusAccepted)
	_ = http.NewResponseController(w).Flush()
	a.log.Info("ending, for another server", "dir", a.dir)
	os.Exit(exitRestart)
}

// events sends what .imgfs/events holds, and with ?follow=true what is added to
// it, as long as somebody reads.
func (a *api) events(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/jsonl")
	var seen eventWatch
	tick := time.NewTicker(eventPoll)
	defer tick.Stop()
	for {
		if server := a.server.Load(); server != nil {
			text := server.Events()
			if fresh := seen.fresh(text); len(fresh) > 0 {
				if _, err := w.Write(fresh); err != nil {
					return
				}
				seen.last = bytes.Clone(text[bytes.LastIndexByte(text[:len(text)-1], '\n')+1:])
			}
			seen.size = int64(len(text))
		}
		if http.NewResponseController(w).Flush() != nil || r.URL.Query().Get("follow") != "true" {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-tick.C:
		}
	}
}

// listenSocket makes the socket in dir. It appears at once with its mode, in
// place of one that is there.
func listenSocket(dir string) (net.Listener, error) {
	path := filepath.Join(dir, socketName)
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != os.ModeSocket {
		return nil, errors.New("something that is no socket is in its place")
	}
	// Made where nobody else can reach it, until its mode is right.
	private, err := os.MkdirTemp(dir, ".sock-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(private)
	short, done, err := shortPath(private)
	if err != nil {
		return nil, err
	}
	defer done()
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(short, socketName)})
	if err != nil {
		return nil, err
	}
	listener.SetUnlinkOnClose(false) // it is about to have another name
	made := filepath.Join(private, socketName)
	if err := errors.Join(os.Chmod(made, 0o600), os.Rename(made, path)); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}

// shortPath is another path of a directory: that of a socket has room for 107
// bytes only. It is good until done is called.
func shortPath(dir string) (path string, done func(), err error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d", fd), func() { unix.Close(fd) }, nil
}

// socketClient speaks to the server of the mount, through its socket.
func socketClient(mount string) (*http.Client, error) {
	path, err := os.Readlink(filepath.Join(mount, control, "socket"))
	if err != nil {
		return nil, fmt.Errorf("mount %q: its socket: %w", mount, cause(err))
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		dir, done, err := shortPath(filepath.Dir(path))
		if err != nil {
			return nil, fmt.Errorf("socket %q: %w", path, err)
		}
		defer done()
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(dir, filepath.Base(path)))
		if err != nil {
			var errno unix.Errno
			if errors.As(err, &errno) {
				err = errno
			}
			return nil, fmt.Errorf("socket %q: %w", path, err)
		}
		return conn, nil
	}
	return &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}, nil
}

// ask sends a request to the server of the mount. The caller closes the body.
func ask(ctx context.Context, mount, method, path string) (*http.Response, error) {
	client, err := socketClient(mount)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://imgfs"+path, nil)
	if err != nil {
		return nil, err
	}
	answer, err := client.Do(req)
	if err != nil {
		return nil, errors.Unwrap(err) // without the URL, which is not one
	}
	return answer, nil
}
