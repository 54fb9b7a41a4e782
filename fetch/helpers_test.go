package fetch

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"
	"testing/synctest"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"

	"github.com/imgfs/imgfs/fetch/registrytest"
)

// login is a keychain with one user for all registries it names.
type login map[string]authn.AuthConfig

func (l login) Resolve(r authn.Resource) (authn.Authenticator, error) {
	if c, ok := l[r.RegistryStr()]; ok {
		return authn.FromConfig(c), nil
	}
	return authn.Anonymous, nil
}

// client makes a Client that reaches s whatever it asks for.
func client(t *testing.T, s *registrytest.Server, o Options) *Client {
	t.Helper()
	if o.Keychain == nil {
		o.Keychain = login{}
	}
	c, err := newClient(o, s.Dial)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// bubble runs a test against a registry without sockets, in synctest's time.
func bubble(t *testing.T, o registrytest.Options, f func(t *testing.T, s *registrytest.Server, c *Client)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		o.Pipe = true
		s := registrytest.New(t, o)
		c := client(t, s, Options{})
		defer c.Close()
		f(t, s, c)
	})
}

func image(t testing.TB, layers int64) v1.Image {
	t.Helper()
	img, err := random.Image(1<<10, layers)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// noise is n bytes that are the same each time.
func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func blob(t testing.TB, s *registrytest.Server, c *Client, data []byte) *Blob {
	t.Helper()
	repo, err := name.NewRepository(s.Host() + "/test/blobs")
	if err != nil {
		t.Fatal(err)
	}
	return c.Blob(repo, s.PutBlob(t, "test/blobs", data))
}

// wholeRange reads a range as a whole.
func wholeRange(t testing.TB, b *Blob, off, n int64) ([]byte, error) {
	t.Helper()
	r, err := b.Range(t.Context(), Demand, off, n)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// same compares a range that was read with what the blob has there.
func same(t testing.TB, got, data []byte, off, n int64) {
	t.Helper()
	if want := data[off : off+n]; !bytes.Equal(got, want) {
		t.Errorf("read %d bytes from %d that differ from the blob's %d", len(got), off, len(want))
	}
}
