package fetch

import (
	"context"
	"errors"
	iofs "io/fs"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestMayDial(t *testing.T) {
	for _, c := range []struct {
		addr  string
		allow []string
		want  bool
	}{
		{"registry.example", nil, true},
		{"registry.example:5000", nil, true},
		{"10.0.0.1:443", nil, true},
		{"127.0.0.1:5000", nil, true},
		{"[::1]:5000", nil, true},
		{"[fd00::1]:443", nil, true},
		{"169.254.169.254", nil, false},
		{"169.254.169.254:80", []string{"*"}, false},
		{"169.254.169.254:80", []string{"169.254.*"}, false},
		{"169.254.169.254:80", []string{"registry.example", "169.254.169.254"}, true},
		{"169.254.169.254:80", []string{"169.254.169.254:80"}, true},
		{"[::ffff:169.254.169.254]:80", nil, false},
		{"[fe80::1%eth0]:80", nil, false},
		{"[fd00:ec2::254]:80", nil, false},
		{"100.100.100.200:80", nil, false},
		{"192.0.0.192:80", nil, false},
		{"168.63.129.16:80", nil, false},
		{"0.0.0.0:80", nil, false},
		{"[::]:80", nil, false},
		{"224.0.0.1:80", nil, false},
	} {
		err := mayDial(c.allow, c.addr)
		if (err == nil) != c.want || err != nil && !errors.Is(err, iofs.ErrPermission) {
			t.Errorf("mayDial(%q, %q) = %v, want allowed: %v", c.allow, c.addr, err, c.want)
		}
	}
}

// Neither an address in a path nor a name that leads to one is dialled.
func TestMetadataService(t *testing.T) {
	c, err := New(Options{Timeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, ref := range []string{"169.254.169.254/latest/meta-data:x", "169.254.169.254:80/a/b:x"} {
		tag, err := name.NewTag(ref)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Resolve(t.Context(), tag, v1.Platform{}); !errors.Is(err, iofs.ErrPermission) {
			t.Errorf("Resolve(%s) = %v, want a refusal", ref, err)
		}
	}
	if n := len(c.Stats().Hosts); n != 0 {
		t.Errorf("%d hosts were asked", n)
	}
	_, err = c.plain.DialContext(t.Context(), "tcp", "169.254.169.254:80")
	var op *net.OpError
	if !errors.As(err, &op) || !errors.Is(err, iofs.ErrPermission) {
		t.Errorf("dialling what a name resolved to: %v, want a refusal", err)
	}
	dials := 0
	named, err := newClient(Options{Timeout: 2 * time.Second}, func(context.Context, string, string) (net.Conn, error) {
		dials++
		return nil, &net.OpError{Op: "dial", Err: mayDial(nil, "169.254.169.254:443")}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer named.Close()
	tag, err := name.NewTag("registry.example/a:b")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := named.Resolve(t.Context(), tag, v1.Platform{}); !errors.Is(err, iofs.ErrPermission) || dials != 1 {
		t.Errorf("a name that leads there: %v after %d attempts, want a refusal after one", err, dials)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://169.254.169.254/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.plain.RoundTrip(req); !errors.Is(err, iofs.ErrPermission) {
		t.Errorf("a request: %v, want a refusal", err)
	}
}
