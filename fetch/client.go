package fetch

import (
	"context"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Options configure a Client. The zero value reads docker's and podman's
// credentials, has no mirrors, allows every registry.
type Options struct {
	CertsDir  string         // directory with HOST/hosts.toml as containerd has it; "" is none
	Insecure  []string       // hosts ("host" or "host:port") whose certificate is not checked, and which may speak plain HTTP
	Allow     []string       // globs of registries (host or host:port) that may be asked; empty allows all
	Deny      []string       // globs of hosts that are never asked; goes before Allow
	Keychain  authn.Keychain // nil is authn.DefaultKeychain
	Timeout   time.Duration  // longest that one operation may take when ctx has no deadline; 0 is a minute
	UserAgent string         // "" is "imgfs"
}

// Priority says who waits for a request.
type Priority int

const (
	Demand     Priority = iota // a reader waits
	Soon                       // what a reader is about to need
	Background                 // nobody waits
)

// Client asks registries. It is safe for concurrent use.
type Client struct{}

// New returns a Client. It makes no request.
func New(o Options) (*Client, error) { return &Client{}, nil }

// Close drops idle connections.
func (c *Client) Close() {}

// Image is what a reference names. It is immutable.
type Image struct {
	Ref         name.Reference
	Top         v1.Descriptor  // what the reference names: an index or a manifest
	Desc        v1.Descriptor  // the manifest of the platform's image
	TopRaw      []byte         // the bytes of Top
	RawManifest []byte         // the bytes of Desc
	RawConfig   []byte         // the bytes of Manifest.Config
	Manifest    *v1.Manifest   // RawManifest
	Config      *v1.ConfigFile // RawConfig; as many diffIDs as the manifest has layers
}

// Resolve finds the image that ref names for the platform.
func (c *Client) Resolve(ctx context.Context, ref name.Reference, platform v1.Platform) (*Image, error) {
	panic("not yet")
}

// HasRepository reports whether the registry has the repository.
func (c *Client) HasRepository(ctx context.Context, repo name.Repository) (bool, error) {
	panic("not yet")
}

// HasNamespace reports whether the registry has a repository whose name starts
// with prefix and a slash. known is false if the registry does not tell.
func (c *Client) HasNamespace(ctx context.Context, reg name.Registry, prefix string) (has, known bool, err error) {
	panic("not yet")
}

// HostStats counts what one host was asked.
type HostStats struct {
	Requests int64 // HTTP requests sent, those for tokens and redirects too
	Bytes    int64 // bytes of bodies received
	Retries  int64 // requests that were sent again after a failure
}

// Stats are counters since the Client was made, by host.
type Stats struct {
	Hosts map[string]HostStats
}

// Stats returns the counters of now.
func (c *Client) Stats() Stats { return Stats{} }
