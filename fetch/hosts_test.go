package fetch

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/fetch/registrytest"
)

// certsDir makes a certs.d with a hosts.toml for each host.
func certsDir(t testing.TB, toml map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for host, text := range toml {
		if h, p, ok := strings.Cut(host, ":"); ok {
			host = h + "_" + p + "_"
		}
		write(t, filepath.Join(dir, host, "hosts.toml"), text)
	}
	return dir
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// ca is the PEM of the server's certificate.
func ca(s *registrytest.Server) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.HTTP().Certificate().Raw}))
}

// dialing makes a Client with real connections.
func dialing(t testing.TB, o Options) *Client {
	t.Helper()
	if o.Keychain == nil {
		o.Keychain = login{}
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	c.backoff = func(int) time.Duration { return time.Millisecond }
	t.Cleanup(c.Close)
	return c
}

func ref(t testing.TB, s string) name.Reference {
	t.Helper()
	r, err := name.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Mirrors are asked in order, and each failure but the reader's own leads to the next.
func TestMirrors(t *testing.T) {
	img := image(t, 1)
	type F = registrytest.Fault
	for _, r := range []struct {
		name       string
		fault      *F // of the first mirror
		caps       string
		one, two   int // manifest requests
		kind       string
		emptyThere bool // the second has nothing either
	}{
		{name: "good", one: 1},
		{name: "404", fault: &F{Status: 404}, one: 1, two: 1},
		{name: "401", fault: &F{Status: 401}, one: 1, two: 1},
		{name: "429", fault: &F{Status: 429, With: map[string]string{"Retry-After": "50"}}, one: 1, two: 1},
		{name: "500", fault: &F{Status: 500}, one: 2, two: 1},
		{name: "reset", fault: &F{Reset: true}, one: 2, two: 1},
		{name: "wrong bytes", fault: &F{Corrupt: true}, one: 1, two: 1},
		{name: "both without", fault: &F{Status: 404}, one: 1, two: 1, emptyThere: true, kind: "not exist"},
		{name: "no tags from the mirror", caps: `capabilities = ["pull"]`, one: 0, two: 1},
	} {
		t.Run(r.name, func(t *testing.T) {
			one, two := registrytest.New(t, registrytest.Options{}), registrytest.New(t, registrytest.Options{})
			one.Push(t, "lib/a:v1", img)
			if !r.emptyThere {
				two.Push(t, "lib/a:v1", img)
			}
			if r.fault != nil {
				r.fault.Path = "/manifests/"
				one.Add(r.fault)
			}
			toml := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n%s\n", two.Host(), one.Host(), r.caps)
			c := dialing(t, Options{CertsDir: certsDir(t, map[string]string{"registry.invalid": toml})})
			got, err := c.Resolve(t.Context(), ref(t, "registry.invalid/lib/a:v1"), v1.Platform{})
			wantKind(t, err, r.kind)
			if n, m := one.Requests("/manifests/"), two.Requests("/manifests/"); n != r.one || m != r.two {
				t.Errorf("%d and %d requests, want %d and %d", n, m, r.one, r.two)
			}
			for _, q := range one.Log() {
				if !strings.Contains(q.Query, "ns=registry.invalid") {
					t.Errorf("request %s?%s to a mirror without ns", q.Path, q.Query)
				}
			}
			if want, _ := img.Digest(); err == nil && got.Top.Digest != want {
				t.Errorf("got %v, want %v", got.Top.Digest, want)
			}
		})
	}
}

// A mirror that is not there costs one blob's first request, not every one.
func TestMirrorDown(t *testing.T) {
	gone, two := registrytest.New(t, registrytest.Options{}), registrytest.New(t, registrytest.Options{})
	gone.HTTP().Listener.Close()
	toml := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", two.Host(), gone.Host())
	c := dialing(t, Options{CertsDir: certsDir(t, map[string]string{"_default": toml})})
	repo, _ := name.NewRepository("any.invalid/x/y")
	data := noise(1000)
	b := c.Blob(repo, two.PutBlob(t, "x/y", data))
	for range 5 {
		got, err := wholeRange(t, b, 10, 20)
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, data, 10, 20)
	}
	if n := c.Stats().Hosts["http://"+gone.Host()].Requests; n != mirrorAttempts {
		t.Errorf("%d requests to a mirror that is down, want %d", n, mirrorAttempts)
	}
	b.Suspect() // the host that is left is asked even so
	if _, err := wholeRange(t, b, 0, 1); err != nil {
		t.Error(err)
	}
}

// A mirror is not shown the registry's credentials, nor the registry a mirror's.
func TestMirrorCredentials(t *testing.T) {
	mirror := registrytest.New(t, registrytest.Options{Auth: registrytest.Basic, User: "m", Password: "mirror"})
	own := registrytest.New(t, registrytest.Options{Auth: registrytest.Basic, User: "u", Password: secret})
	own.Push(t, "a/b:v1", image(t, 1))
	toml := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", own.Host(), mirror.Host())
	c := dialing(t, Options{
		CertsDir: certsDir(t, map[string]string{own.Host(): toml}),
		Keychain: login{own.Host(): {Username: "u", Password: secret}, mirror.Host(): {Username: "m", Password: "mirror"}},
	})
	if _, err := c.Resolve(t.Context(), ref(t, own.Host()+"/a/b:v1"), v1.Platform{}); err != nil {
		t.Fatal(err)
	}
	for _, r := range mirror.Log() {
		if r.Authorization != "" && r.Authorization != basic(authn.AuthConfig{Username: "m", Password: "mirror"}) {
			t.Errorf("the mirror was shown %q", r.Authorization)
		}
	}
	if n := mirror.Requests("/manifests/"); n != 2 {
		t.Errorf("%d requests to the mirror, want 2", n)
	}
}

// hosts.toml's TLS settings, paths and headers.
func TestHostsTOML(t *testing.T) {
	img := image(t, 1)
	cert, key := clientCert(t)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(cert))
	mutual := &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	for _, r := range []struct {
		name string
		tls  *tls.Config
		toml string // HOST is replaced
		kind string
	}{
		{"unknown CA", &tls.Config{}, `server = "https://HOST"`, "unavailable"},
		{"private CA", &tls.Config{}, "server = \"https://HOST\"\nca = \"ca.crt\"", ""},
		{"private CA of a mirror", &tls.Config{}, "server = \"https://other.invalid\"\n[host.\"https://HOST\"]\nca = [\"ca.crt\"]", ""},
		{"skip_verify", &tls.Config{}, "[host.\"https://HOST\"]\nskip_verify = true", ""},
		{"no client certificate", mutual, "server = \"https://HOST\"\nca = \"ca.crt\"", "unavailable"},
		{"client certificate", mutual, "server = \"https://HOST\"\nca = \"ca.crt\"\nclient = [[\"client.cert\", \"client.key\"]]", ""},
		{"plain HTTP", nil, `server = "http://HOST"`, ""},
		{"TLS to plain HTTP", nil, `server = "https://HOST"`, "unavailable"},
		{"plain HTTP or TLS", &tls.Config{}, "server = \"http://HOST\"\nskip_verify = true", ""},
		{"plain HTTP or not TLS", nil, "server = \"http://HOST\"\nskip_verify = true", ""},
		{"override_path", nil, "server = \"http://HOST/v2/\"\noverride_path = true", ""},
		{"malformed", nil, `server = "http://HOST`, "unavailable"},
		{"unknown capability", nil, "server = \"http://HOST\"\ncapabilities = [\"fly\"]", "unavailable"},
		{"CA that is not there", &tls.Config{}, "server = \"https://HOST\"\nca = \"no.crt\"", "unavailable"},
	} {
		t.Run(r.name, func(t *testing.T) {
			s := registrytest.New(t, registrytest.Options{TLS: r.tls})
			s.Push(t, "a/b:v1", img)
			dir := certsDir(t, map[string]string{"registry.invalid": strings.ReplaceAll(r.toml, "HOST", s.Host())})
			if r.tls != nil {
				write(t, filepath.Join(dir, "registry.invalid", "ca.crt"), ca(s))
			}
			write(t, filepath.Join(dir, "registry.invalid", "client.cert"), cert)
			write(t, filepath.Join(dir, "registry.invalid", "client.key"), key)
			c := dialing(t, Options{CertsDir: dir})
			_, err := c.Resolve(t.Context(), ref(t, "registry.invalid/a/b:v1"), v1.Platform{})
			wantKind(t, err, r.kind)
		})
	}
}

// clientCert makes a self-signed certificate for a client.
func clientCert(t testing.TB) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "client"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: raw}))
}

// Loopback is plain HTTP; what --insecure-registry names may be either.
func TestInsecure(t *testing.T) {
	for _, r := range []struct {
		name     string
		tls      bool
		insecure bool
		kind     string
	}{
		{"plain", false, false, ""},
		{"plain, insecure", false, true, ""},
		{"TLS", true, false, "unavailable"},
		{"TLS, insecure", true, true, ""},
	} {
		t.Run(r.name, func(t *testing.T) {
			o := registrytest.Options{}
			if r.tls {
				o.TLS = &tls.Config{}
			}
			s := registrytest.New(t, o)
			s.Push(t, "a/b:v1", image(t, 1))
			var insecure []string
			if r.insecure {
				insecure = []string{"127.0.0.1"}
			}
			c := dialing(t, Options{Insecure: insecure})
			_, err := c.Resolve(t.Context(), s.Ref(t, "a/b:v1"), v1.Platform{})
			wantKind(t, err, r.kind)
			if r.insecure {
				_, err = c.Resolve(t.Context(), s.Ref(t, "a/b:none"), v1.Platform{})
				wantKind(t, err, "not exist")
			}
		})
	}
}

// A changed hosts.toml is read again.
func TestHostsReload(t *testing.T) {
	one, two := registrytest.New(t, registrytest.Options{}), registrytest.New(t, registrytest.Options{})
	one.Push(t, "a/b:v1", image(t, 1))
	two.Push(t, "a/b:v1", image(t, 2))
	dir := certsDir(t, map[string]string{"registry.invalid": fmt.Sprintf("server = \"http://%s\"", one.Host())})
	c := dialing(t, Options{CertsDir: dir})
	for i, s := range []*registrytest.Server{one, two} {
		path := filepath.Join(dir, "registry.invalid", "hosts.toml")
		write(t, path, fmt.Sprintf("server = \"http://%s\"", s.Host()))
		when := time.Now().Add(time.Duration(i) * time.Minute)
		os.Chtimes(path, when, when)
		c.mu.Lock()
		for _, set := range c.regs {
			set.checked = time.Time{}
		}
		c.mu.Unlock()
		img, err := c.Resolve(t.Context(), ref(t, "registry.invalid/a/b:v1"), v1.Platform{})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(img.Manifest.Layers); n != i+1 {
			t.Errorf("%d layers, want %d", n, i+1)
		}
	}
}

// Nothing listens: unreachable, soon. No such host: at once.
func TestUnreachable(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{})
	s.HTTP().Listener.Close()
	c := dialing(t, Options{})
	_, err := c.Resolve(t.Context(), s.Ref(t, "a:b"), v1.Platform{})
	wantKind(t, err, "unreachable")
	_, err = c.Resolve(t.Context(), ref(t, "registry.invalid/a:b"), v1.Platform{})
	wantKind(t, err, "unreachable")
}

// Requests one after another use one connection, HTTP/2 where there is TLS.
func TestConnectionReuse(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{TLS: &tls.Config{}})
	dir := certsDir(t, map[string]string{s.Host(): "server = \"https://" + s.Host() + "\"\nca = \"ca.crt\""})
	write(t, filepath.Join(dir, strings.Replace(s.Host(), ":", "_", 1)+"_", "ca.crt"), ca(s))
	c := dialing(t, Options{CertsDir: dir})
	data := noise(1 << 20)
	b := blob(t, s, c, data)
	for i := range int64(10) {
		got, err := wholeRange(t, b, i*1000, 1000)
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, data, i*1000, 1000)
	}
	for _, r := range s.Log() {
		if r.Proto != "HTTP/2.0" || r.Remote != s.Log()[0].Remote {
			t.Errorf("request by %s from %s, want HTTP/2.0 from %s", r.Proto, r.Remote, s.Log()[0].Remote)
		}
	}
}

// Docker Hub's API has another name than Docker Hub, and its credentials.
func TestHubEndpoint(t *testing.T) {
	c := dialing(t, Options{CertsDir: certsDir(t, map[string]string{"docker.io": "[host.\"https://mirror.example/v2/hub\"]\n"})})
	r := ref(t, "ubuntu:18.04")
	eps, err := c.endpoints(r.Context().Registry)
	if err != nil || len(eps) != 2 {
		t.Fatalf("%d endpoints, %v", len(eps), err)
	}
	cl := &call{repo: r.Context().RepositoryStr(), path: "manifests/18.04"}
	for i, want := range []struct{ url, user string }{
		{"https://mirror.example/v2/hub/v2/library/ubuntu/manifests/18.04?ns=docker.io", "mirror.example"},
		{"https://registry-1.docker.io/v2/library/ubuntu/manifests/18.04", "index.docker.io"},
	} {
		if u, user := eps[i].url(cl).String(), eps[i].resource(cl.repo).RegistryStr(); u != want.url || user != want.user {
			t.Errorf("endpoint %d: %s for %s, want %s for %s", i, u, user, want.url, want.user)
		}
	}
}

// Names that would lead out of certs.d are no hosts.
func TestHostNames(t *testing.T) {
	for host, want := range map[string]bool{
		"docker.io": true, "localhost:5000": true, "[::1]:5000": true, "a_b.example": true,
		"..": false, ".": false, "": false, "_default": false, "a/b": false, "..:5": true, "a\x00b": false, ":5000": true,
	} {
		if got := hostOK(host); got != want {
			t.Errorf("hostOK(%q) = %v, want %v", host, got, want)
		}
	}
}
