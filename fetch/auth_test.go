package fetch

import (
	"context"
	"errors"
	iofs "io/fs"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/fetch/registrytest"
)

const secret = "s3cr3t-passw0rd"

// Each way to authenticate: what is sent, and how often.
func TestAuth(t *testing.T) {
	user := authn.AuthConfig{Username: "u", Password: secret}
	for _, r := range []struct {
		name             string
		o                registrytest.Options
		conf             authn.AuthConfig
		kind             string
		manifests, token int // requests
	}{
		{"open", registrytest.Options{}, authn.AuthConfig{}, "", 1, 0},
		{"open, with credentials", registrytest.Options{}, user, "", 1, 0},
		{"basic", registrytest.Options{Auth: registrytest.Basic, User: "u", Password: secret}, user, "", 2, 0},
		{"basic, auth field", registrytest.Options{Auth: registrytest.Basic, User: "u", Password: "p"}, authn.AuthConfig{Auth: "dTpw"}, "", 2, 0},
		{"basic, wrong", registrytest.Options{Auth: registrytest.Basic, User: "u", Password: "other"}, user, "permission", 2, 0},
		{"basic, none", registrytest.Options{Auth: registrytest.Basic, User: "u", Password: secret}, authn.AuthConfig{}, "permission", 1, 0},
		{"bearer, anonymous", registrytest.Options{Auth: registrytest.Bearer}, authn.AuthConfig{}, "", 2, 1},
		{"bearer, user", registrytest.Options{Auth: registrytest.Bearer, User: "u", Password: secret}, user, "", 2, 1},
		{"bearer, identity token", registrytest.Options{Auth: registrytest.Bearer, User: "u", Password: secret}, authn.AuthConfig{IdentityToken: secret}, "", 2, 1},
		{"bearer, wrong", registrytest.Options{Auth: registrytest.Bearer, User: "u", Password: "other"}, user, "permission", 1, 1},
		{"bearer, none", registrytest.Options{Auth: registrytest.Bearer, User: "u", Password: secret}, authn.AuthConfig{}, "permission", 1, 1},
		{"bearer, given and wrong", registrytest.Options{Auth: registrytest.Bearer}, authn.AuthConfig{RegistryToken: secret}, "permission", 2, 0},
	} {
		t.Run(r.name, func(t *testing.T) {
			s := registrytest.New(t, r.o)
			ref := s.Push(t, "a/b:v1", image(t, 1))
			c := client(t, s, Options{Keychain: login{s.Host(): r.conf}})
			img, err := c.Resolve(t.Context(), ref, v1.Platform{})
			wantKind(t, err, r.kind)
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("the secret is in the error %v", err)
			}
			m, tok := s.Requests("/manifests/"), s.Requests("/token")
			if m != r.manifests || tok != r.token {
				t.Errorf("%d manifest and %d token requests, want %d and %d", m, tok, r.manifests, r.token)
			}
			if err == nil && len(img.Config.RootFS.DiffIDs) != 1 {
				t.Errorf("%d diffIDs, want 1", len(img.Config.RootFS.DiffIDs))
			}
		})
	}
}

// All that want a token for one scope share one, and one refresh when it is
// refused; another scope has its own.
func TestTokenIsShared(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{Auth: registrytest.Bearer})
	c := client(t, s, Options{})
	ref, other := s.Push(t, "a/b:v1", image(t, 1)), s.Push(t, "a/c:v1", image(t, 1))
	// The token server answers only when all wait for it.
	s.Add(&registrytest.Fault{Path: "/token", Delay: 300 * time.Millisecond})
	all := func() {
		t.Helper()
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if _, err := c.Resolve(t.Context(), ref, v1.Platform{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	for want := 1; want <= 3; want++ {
		all()
		if n := s.Requests("/token"); n != want {
			t.Fatalf("%d token requests, want %d", n, want)
		}
		s.RevokeTokens()
	}
	s.Reset()
	if _, err := c.Resolve(t.Context(), other, v1.Platform{}); err != nil {
		t.Fatal(err)
	}
	// The host is known to want one: no request without.
	if n, m := s.Requests("/token"), s.Requests("/manifests/"); n != 1 || m != 1 {
		t.Errorf("another repository: %d token and %d manifest requests, want 1 and 1", n, m)
	}
}

// A token is renewed before it expires.
func TestTokenExpires(t *testing.T) {
	bubble(t, registrytest.Options{Auth: registrytest.Bearer, TokenLife: 300}, func(t *testing.T, s *registrytest.Server, c *Client) {
		ref := s.Push(t, "a/b:v1", image(t, 1))
		for i, want := range []struct {
			after           time.Duration
			tokens, refused int
		}{{0, 1, 1}, {100 * time.Second, 1, 1}, {200 * time.Second, 2, 1}} {
			time.Sleep(want.after)
			if _, err := c.Resolve(t.Context(), ref, v1.Platform{}); err != nil {
				t.Fatal(err)
			}
			refused := 0
			for _, r := range s.Log() {
				if r.Status == http.StatusUnauthorized {
					refused++
				}
			}
			if n := s.Requests("/token"); n != want.tokens || refused != want.refused {
				t.Errorf("step %d: %d tokens, %d times refused; want %+v", i, n, refused, want)
			}
		}
	})
}

// What goes wrong with a token server is the registry's failure.
func TestTokenFaults(t *testing.T) {
	type F = registrytest.Fault
	for _, r := range []struct {
		name   string
		fault  *F
		kind   string
		tokens int
	}{
		{"503 twice", &F{Status: 503, Times: 2}, "", 3},
		{"429 once", &F{Status: 429, Times: 1, With: map[string]string{"Retry-After": "3"}}, "", 2},
		{"403", &F{Status: 403}, "permission", 1},
		{"reset once", &F{Reset: true, Times: 1}, "", 2},
		{"no JSON", &F{Status: 200, Body: "<html>"}, "unavailable", 1},
		{"no token", &F{Status: 200, Body: "{}"}, "unavailable", 1},
		{"a header in it", &F{Status: 200, Body: `{"token":"a\r\nX: y"}`}, "unavailable", 1},
		{"too large", &F{Status: 200, Body: `{"token":"` + strings.Repeat("x", 2<<20) + `"}`}, "unavailable", 1},
		{"large token", &F{Status: 200, Body: `{"token":"` + strings.Repeat("x", maxToken+1) + `"}`}, "unavailable", 1},
		{"access_token", &F{Status: 200, Body: `{"access_token":"x"}`}, "permission", 1},
		{"hanging once", &F{Hang: true, Times: 1}, "", 2},
		{"redirect to a metadata service", &F{Status: 302, With: map[string]string{"Location": "ftp://169.254.169.254/"}}, "unavailable", 1},
	} {
		t.Run(r.name, func(t *testing.T) {
			bubble(t, registrytest.Options{Auth: registrytest.Bearer}, func(t *testing.T, s *registrytest.Server, c *Client) {
				ref := s.Push(t, "a/b:v1", image(t, 1))
				r.fault.Path = "/token"
				s.Add(r.fault)
				_, err := c.Resolve(t.Context(), ref, v1.Platform{})
				wantKind(t, err, r.kind)
				if n := s.Requests("/token"); n != r.tokens {
					t.Errorf("%d token requests, want %d", n, r.tokens)
				}
			})
		})
	}
}

// Docker Hub answers 401 for a repository that it does not have.
func TestHub(t *testing.T) {
	for _, r := range []struct {
		name, kind string
		conf       authn.AuthConfig
	}{
		{"anonymous", "not exist", authn.AuthConfig{}},
		{"with a user", "permission", authn.AuthConfig{Username: "u", Password: "p"}},
	} {
		t.Run(r.name, func(t *testing.T) {
			s := registrytest.New(t, registrytest.Options{Auth: registrytest.Bearer})
			s.Add(&registrytest.Fault{Path: "/manifests/", Header: "Authorization", Status: 401},
				&registrytest.Fault{Path: "/tags/", Header: "Authorization", Status: 401})
			c := client(t, s, Options{Keychain: login{s.Host(): r.conf}})
			c.hub = s.Host()
			_, err := c.Resolve(t.Context(), s.Ref(t, "no/such:x"), v1.Platform{})
			wantKind(t, err, r.kind)
			has, err := c.HasRepository(t.Context(), s.Ref(t, "no/such:x").Context())
			if has || (err == nil) != (r.kind == "not exist") {
				t.Errorf("HasRepository = %v, %v", has, err)
			}
		})
	}
}

// Credentials stay with their host: a redirect to another name has none, no
// header of hosts.toml, and is remembered until it is refused.
func TestRedirect(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{Auth: registrytest.Basic, User: "u", Password: secret, Redirect: true})
	dir := certsDir(t, map[string]string{s.Host(): "[host.\"http://" + s.Host() + "\".header]\n  X-Secret = \"" + secret + "\"\n"})
	c := client(t, s, Options{CertsDir: dir, Keychain: login{s.Host(): {Username: "u", Password: secret}}})
	data := noise(10000)
	b := blob(t, s, c, data)
	read := func(requests, stored int) {
		t.Helper()
		s.Reset()
		got, err := wholeRange(t, b, 5, 100)
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, data, 5, 100)
		if n, m := len(s.Log()), s.Requests("/store/"); n != requests || m != stored {
			t.Errorf("%d requests, %d of them to the store; want %d and %d", n, m, requests, stored)
		}
		for _, r := range s.Log() {
			away := strings.HasPrefix(r.Path, "/store/")
			if away == (r.Host == s.Host()) || away && (r.Authorization != "" || r.Header.Get("X-Secret") != "") ||
				!away && r.Header.Get("X-Secret") != secret {
				t.Errorf("request %+v has or lacks credentials", r)
			}
		}
	}
	read(3, 1) // 401, redirect, store
	read(1, 1)
	read(1, 1)
	s.ExpireRedirects()
	read(3, 2) // refused by the store, redirect, store
	read(1, 1)
	s.ExpireRedirects()
	s.Add(&registrytest.Fault{Path: "/store/", Status: 403})
	_, err := wholeRange(t, b, 5, 100)
	wantKind(t, err, "permission")
	if strings.Contains(err.Error(), "sig=") || strings.Contains(err.Error(), secret) {
		t.Errorf("a secret is in the error %v", err)
	}
}

func TestMayGo(t *testing.T) {
	c, err := New(Options{Deny: []string{"bad.example"}, Insecure: []string{"minio.example:9000"}})
	if err != nil {
		t.Fatal(err)
	}
	public := &endpoint{scheme: "https", host: "registry.example"}
	local := &endpoint{scheme: "http", host: "127.0.0.1:5000"}
	for _, r := range []struct {
		ep   *endpoint
		to   string
		want bool
	}{
		{public, "https://cdn.example/x", true},
		{public, "https://cdn.example:8443/x", true},
		{public, "https://10.0.0.1/x", true},
		{public, "http://cdn.example/x", false},
		{public, "http://minio.example:9000/x", true},
		{public, "https://bad.example/x", false},
		{public, "https://bad.example:444/x", false},
		{public, "https://169.254.169.254/latest", false},
		{public, "https://[fe80::1%25eth0]/", false},
		{public, "https://[::1]:80/", false},
		{public, "https://[::ffff:127.0.0.1]/", false},
		{public, "https://localhost./", false},
		{public, "https://0.0.0.0/", false},
		{public, "ftp://cdn.example/", false},
		{public, "https:///x", false},
		{local, "http://localhost:9000/", true},
		{local, "http://cdn.example/", true},
	} {
		req, err := http.NewRequest(http.MethodGet, r.to, nil)
		if err != nil {
			t.Fatal(err)
		}
		if e := c.mayGo(r.ep, req.URL); (e == nil) != r.want {
			t.Errorf("mayGo(%s, %s) = %v, want %v", r.ep.host, r.to, e, r.want)
		}
	}
}

func TestParseChallenges(t *testing.T) {
	for _, r := range []struct {
		in   []string
		want []challenge
	}{
		{nil, nil},
		{[]string{`Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"`},
			[]challenge{{"bearer", map[string]string{"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"}}}},
		{[]string{`Basic realm="x, \"y\"" , BEARER Realm=abc, Service = z`},
			[]challenge{{"basic", map[string]string{"realm": `x, "y"`}}, {"bearer", map[string]string{"realm": "abc", "service": "z"}}}},
		{[]string{"Negotiate", `Basic realm="r"`},
			[]challenge{{"negotiate", map[string]string{}}, {"basic", map[string]string{"realm": "r"}}}},
		{[]string{`Bearer realm="no end`}, []challenge{{"bearer", map[string]string{"realm": "no end"}}}},
		{[]string{`=x`, `"`, `,,,`}, nil},
	} {
		if got := parseChallenges(r.in); !reflect.DeepEqual(got, r.want) {
			t.Errorf("parseChallenges(%q) = %v, want %v", r.in, got, r.want)
		}
	}
}

func FuzzChallenges(f *testing.F) {
	f.Add(`Bearer realm="https://a/t",service="s",scope="repository:a/b:pull"`)
	f.Add(`Basic realm="x, \"y\"" , BEARER Realm=abc`)
	f.Add(`a=b=c,,"\`)
	f.Fuzz(func(t *testing.T, s string) {
		all := parseChallenges([]string{s, s})
		if len(all) > maxChallenges {
			t.Fatalf("%d challenges", len(all))
		}
		for _, ch := range all {
			if len(ch.params) > maxParams || ch.scheme != strings.ToLower(ch.scheme) || ch.scheme == "" {
				t.Fatalf("challenge %+v", ch)
			}
		}
		pick(all)
	})
}

func TestRedact(t *testing.T) {
	for in, want := range map[string]string{
		"Get \"https://u:p@h.example/x?sig=1#f\": EOF": `Get "https://h.example/x": EOF`,
		"http://h/x":                     "http://h/x",
		"HTTPS://user@h?a=b and more":    "HTTPS://h and more",
		"no URL, user:pass@host?x stays": "no URL, user:pass@host?x stays",
	} {
		if got := redact(in); got != want {
			t.Errorf("redact(%q) = %q, want %q", in, got, want)
		}
	}
}

// A keychain that fails is said, without what its helper printed.
func TestKeychainFails(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{Auth: registrytest.Bearer})
	c := client(t, s, Options{Keychain: brokenKeychain{}})
	_, err := c.Resolve(t.Context(), s.Ref(t, "a:b"), v1.Platform{})
	wantKind(t, err, "permission")
	if !strings.Contains(err.Error(), "exit status 1") || strings.Contains(err.Error(), secret) {
		t.Errorf("error %v", err)
	}
}

type brokenKeychain struct{}

func (brokenKeychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return nil, errors.New("error getting credentials - err: exit status 1, out: `" + secret + "`")
}

func TestAllowDeny(t *testing.T) {
	c, err := New(Options{Allow: []string{"docker.io", "*.example", "localhost:5000"}, Deny: []string{"bad.*"}})
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]bool{
		"index.docker.io": true, "a.example": true, "a.example:443": true, "A.Example": true,
		"bad.example": false, "quay.io": false, "localhost:5000": true, "localhost:5001": false,
	} {
		reg, err := name.NewRegistry(host)
		if err != nil {
			t.Fatal(err)
		}
		_, e := c.endpoints(reg)
		if (e == nil) != want || e != nil && !errors.Is(e, iofs.ErrPermission) {
			t.Errorf("registry %s: %v, want allowed %v", host, e, want)
		}
	}
	if _, err := New(Options{Deny: []string{"[a"}}); err == nil {
		t.Error("a malformed glob is taken")
	}
}

// Close ends a request for a token that nobody answers.
func TestCloseEndsFlights(t *testing.T) {
	bubble(t, registrytest.Options{Auth: registrytest.Bearer}, func(t *testing.T, s *registrytest.Server, c *Client) {
		s.Add(&registrytest.Fault{Path: "/token", Hang: true})
		errs := make(chan error)
		go func() {
			_, err := c.Resolve(t.Context(), s.Ref(t, "a:b"), v1.Platform{})
			errs <- err
		}()
		time.Sleep(time.Second)
		start := time.Now()
		c.Close()
		if d := time.Since(start); d != 0 {
			t.Errorf("Close took %v", d)
		}
		if err := <-errs; err == nil {
			t.Error("Resolve answers without a token")
		}
	})
}

// One caller that goes away takes the token from nobody.
func TestTokenFlightIsDetached(t *testing.T) {
	bubble(t, registrytest.Options{Auth: registrytest.Bearer}, func(t *testing.T, s *registrytest.Server, c *Client) {
		ref := s.Push(t, "a/b:v1", image(t, 1))
		s.Add(&registrytest.Fault{Path: "/token", Delay: 5 * time.Second})
		ctx, cancel := context.WithCancel(t.Context())
		errs := make(chan error, 2)
		go func() {
			_, err := c.Resolve(ctx, ref, v1.Platform{})
			errs <- err
		}()
		time.Sleep(time.Second)
		go func() {
			_, err := c.Resolve(t.Context(), ref, v1.Platform{})
			errs <- err
		}()
		time.Sleep(time.Second)
		cancel()
		wantKind(t, <-errs, "canceled")
		wantKind(t, <-errs, "")
		if n := s.Requests("/token"); n != 1 {
			t.Errorf("%d token requests, want 1", n)
		}
	})
}
