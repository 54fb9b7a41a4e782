package integration

import (
	"fmt"
	"hash/fnv"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// A stock is a registry of tiny images that all its names share: every repository
// has the tags t0, t1, … and v0, v1, …, and which image it is, is decided by its name until a request to
// /set/ decides otherwise. Image k has the file me with "image k" in it, and the
// files low and mid, each in a layer that other images have too.
type stock struct {
	host string

	mu    sync.Mutex
	kinds []kind
	blobs map[string][]byte
	set   map[string]int // REPOSITORY:TAG → image
}

type kind struct {
	manifest []byte
	digest   v1.Hash
	id       v1.Hash
}

// stockLow and stockMid are how many lowest and middle layers there are.
const (
	stockLow = 3
	stockMid = 6
)

var stockTag = regexp.MustCompile(`^[tv][0-9a-f]+$`)

func startStock(t testing.TB, n int) *stock {
	t.Helper()
	s := &stock{blobs: map[string][]byte{}, set: map[string]int{}}
	for k := range n {
		s.make(t, k)
	}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.host = strings.TrimPrefix(server.URL, "http://")
	return s
}

// make adds image k.
func (s *stock) make(t testing.TB, k int) {
	t.Helper()
	var layers []blob
	for _, e := range []entry{
		file("low", strconv.Itoa(k%stockLow)),
		file("mid", strconv.Itoa(k%stockMid)+strings.Repeat("m", 1000)),
		file("me", strconv.Itoa(k)),
	} {
		archive := tarball(t, e)
		b := bytesBlob(mediaGzip, gzipped(archive), archive)
		layers = append(layers, b)
	}
	img, err := newImage(layers...)
	if err != nil {
		t.Fatal(err)
	}
	var i kind
	var config []byte
	if i.manifest, err = img.RawManifest(); err != nil {
		t.Fatal(err)
	}
	if config, err = img.RawConfigFile(); err != nil {
		t.Fatal(err)
	}
	if i.digest, err = img.Digest(); err != nil {
		t.Fatal(err)
	}
	if i.id, err = img.ConfigName(); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range layers {
		s.blobs[l.Hash.String()] = l.data
	}
	s.blobs[i.id.String()] = config
	s.blobs[i.digest.String()] = i.manifest
	s.kinds = append(s.kinds, i)
}

// of is the image that a name stands for.
func (s *stock) of(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k, ok := s.set[name]; ok {
		return k
	}
	return stockHash(name, len(s.kinds))
}

func stockHash(name string, n int) int {
	h := fnv.New32a()
	h.Write([]byte(name))
	return int(h.Sum32() % uint32(n))
}

func (s *stock) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if name, ok := strings.CutPrefix(r.URL.Path, "/set/"); ok {
		k, err := strconv.Atoi(r.URL.Query().Get("image"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		s.mu.Lock()
		s.set[name] = k
		s.mu.Unlock()
		return
	}
	path, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	if !ok {
		http.NotFound(w, r)
		return
	}
	if path == "" {
		return
	}
	if _, digest, ok := strings.Cut(path, "/blobs/"); ok {
		s.blob(w, r, digest, "application/octet-stream")
		return
	}
	if repo, ref, ok := strings.Cut(path, "/manifests/"); ok {
		digest := ref
		if !strings.HasPrefix(ref, "sha256:") {
			if !stockTag.MatchString(ref) {
				http.NotFound(w, r)
				return
			}
			digest = s.kinds[s.of(strings.TrimPrefix(repo, "library/")+":"+ref)].digest.String()
		}
		w.Header().Set("Docker-Content-Digest", digest)
		s.blob(w, r, digest, "application/vnd.oci.image.manifest.v1+json")
		return
	}
	if repo, ok := strings.CutSuffix(path, "/tags/list"); ok {
		fmt.Fprintf(w, `{"name":%q,"tags":["latest"]}`, repo)
		return
	}
	http.NotFound(w, r)
}

func (s *stock) blob(w http.ResponseWriter, r *http.Request, digest, media string) {
	s.mu.Lock()
	data, ok := s.blobs[digest]
	s.mu.Unlock()
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", media)
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	if r.Method != http.MethodHead {
		w.Write(data)
	}
}

// hub makes the stock what docker.io is to a mount with these flags.
func (s *stock) hub(t testing.TB) []string {
	return []string{"--certs-dir", hubConfig(t, t.TempDir(), s.host)}
}

// check fails unless every name of the mount shows the image of its ID.
func (s *stock) check(m *mount) {
	m.t.Helper()
	kinds := map[string]int{}
	for k, i := range s.kinds {
		kinds[i.id.String()] = k
	}
	for _, i := range m.images() {
		want, ok := kinds[i.ID]
		if !ok {
			m.t.Errorf("%s has the ID %s, which no image has", i.name(), i.ID)
			continue
		}
		if got, err := readKind(m.path(i.path())); err != nil || got != want {
			m.t.Errorf("%s shows image %d, %v, want %d", i.name(), got, err, want)
		}
	}
}
