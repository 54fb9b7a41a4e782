package fs

import (
	"bytes"
	"compress/gzip"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// storedLayer is a layer of one small file and much after it, in a gzip that does
// not compress.
func storedLayer(t *testing.T, name, body string) v1.Layer {
	t.Helper()
	rest := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{1}).Read(rest)
	return layerAt(t, gzip.NoCompression, file(name, body), file("rest", string(rest)))
}

// TestWrongPass reads a file of a layer that turns out not to be the one that the
// manifest names: who has the file open must not keep its bytes.
func TestWrongPass(t *testing.T) {
	w := newWorld(t, Options{})
	l := storedLayer(t, "a", "what the layer has")
	w.push("app:v1", l)
	digest, err := l.Digest()
	if err != nil {
		t.Fatal(err)
	}
	var wrong atomic.Bool
	wrong.Store(true)
	release := make(chan struct{})
	answer := fault(func(rw http.ResponseWriter, r *http.Request, reg http.Handler) {
		if !strings.HasSuffix(r.URL.Path, digest.String()) || !wrong.Load() {
			reg.ServeHTTP(rw, r)
			return
		}
		rec := httptest.NewRecorder()
		reg.ServeHTTP(rec, r)
		body := bytes.Replace(rec.Body.Bytes(), []byte("what the layer has"), []byte("what it doesn't!!!"), 1)
		for k, v := range rec.Header() {
			rw.Header()[k] = v
		}
		rw.WriteHeader(rec.Code)
		rw.Write(body[:len(body)/2])
		rw.(http.Flusher).Flush()
		<-release
		time.Sleep(100 * time.Millisecond)
		rw.Write(body[len(body)/2:])
	})
	w.fault.Store(&answer)
	f, err := os.Open(w.path("app", "v1", "a"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	read := func() string {
		b := make([]byte, 100)
		n, _ := f.ReadAt(b, 0)
		return string(b[:n])
	}
	if got := read(); got != "what it doesn't!!!" {
		t.Errorf("read while the layer arrives = %q", got)
	}
	close(release)
	// From now on nothing of it is shown before it has proved right.
	eventually(t, "the wrong bytes are gone", func() bool { return read() == "" })
	for range 5 {
		if got := read(); got != "" {
			t.Errorf("read after the layer was wrong = %q", got)
		}
	}
	wrong.Store(false)
	eventually(t, "the bytes of the right layer are read", func() bool { return read() == "what the layer has" })
}
