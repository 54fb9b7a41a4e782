// Package images knows which images are here, under which names, and opens them.
//
// Its nouns: a [Name] is a repository and a tag in it; the catalogue says which
// image a name stands for; a view is one image under one name, with the inode
// numbers ([Ino]) that the mount shows for it. Pulling, naming and removing are
// one transaction each, durable before they return. An image opens layer by
// layer: from the layer indexes that are on this disk, else from its registry,
// and while a layer without an index of its own still arrives, lookups and reads
// are answered as far as it has passed.
//
// The package joins the rooms below it (where bytes come from, compiled layers,
// verified bytes on disk) and speaks no FUSE.
package images

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sync/singleflight"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/fetch"
	"github.com/imgfs/imgfs/unionfs"
)

// Attr is what stat tells of an inode of an image.
type Attr = unionfs.Attr

// Options configure a Store. The zero value of every field but Dir is useful.
type Options struct {
	Dir       string         // the cache directory, made when missing
	CacheSize int64          // bytes of layer contents to keep; 0: a fifth of the file system's free space
	Platform  string         // os/arch[/variant]; "": that of this machine
	CertsDir  string         // containerd's certs.d; "": none
	Insecure  []string       // hosts that are spoken to in plain HTTP, or without checking certificates
	Allow     []string       // globs of registry hosts; empty: all
	Deny      []string       // globs of registry hosts, stronger than Allow
	Timeout   time.Duration  // the longest a reader waits for a registry without progress; 0: 60 s
	Prefetch  bool           // keep access profiles, and fetch what they have when an image is opened
	Profiles  string         // directory with more profiles, as ProfileName names them; "": none
	Strict    bool           // check every byte against its digest at every read
	UserAgent string         // of the requests
	Keychain  authn.Keychain // credentials; nil: docker's config.json and podman's auth.json
	Resume    string         // ID of the store whose numbers the kernel still holds, after a crash; "": it holds none
	Keep      bool           // it may hold some nevertheless: what it would need is kept, and so is the ID
	Log       *slog.Logger   // nil: slog.Default
}

// Store is the images of one cache directory. It is safe for concurrent use.
//
// Lock order: catalog.mu, then profiles.mu, then Store.mu, then image.mu, then layer.mu; none but the first is held during I/O.
type Store struct {
	o        Options
	id       string // of the catalogue
	platform v1.Platform
	cache    *cache.Cache
	cat      *catalog
	client   *fetch.Client
	log      *slog.Logger

	pulls    pulls
	looking  *semaphore.Weighted // at programs
	profiles profiles
	flights  singleflight.Group // pulls by name, opening of images and layers by digest
	tasks    sync.WaitGroup     // everything that runs beside a caller
	ctx      context.Context    // ends with Close
	cancel   context.CancelFunc

	mu       sync.Mutex
	views    map[uint32]*View
	moves    int // of views to other names
	images   map[imageKey]*image
	layers   map[uint32]*layer
	negative map[Name]negative
	probes   map[string]probe
	watch    func(Event)
	formats  map[v1.Hash]fetch.Format // of layer indexes on this disk, as far as they were asked for
	programs map[Ino]bool             // whose beginning was read, and that were looked at
	xattrs   map[string]bool          // names of extended attributes that some open layer has
	arriving map[*unionfs.Builder]bool
	spare    map[v1.Hash]bool // keys of layers that only dangling images have
	untold   []Event          // from before anybody watched
	begun    []*layer         // what a server that died has shown unproved; until somebody watches
	rebuilt  error            // what Open did about a damaged catalogue, until Check has reported it
}

// Event is something that happened outside a call, that a mount may have to tell
// the kernel or its users.
type Event struct {
	Name  Name  // the name whose image it is about; zero when it is about Files alone
	Err   error // why, when something failed
	Drop  bool  // what the kernel has cached below the name is no longer true
	Files Range // files whose content is no longer what the kernel has cached

	Told chan<- struct{} // not nil: something is sent when the kernel has dropped what it cached of Files; it has room for that
}

// Range is inode numbers, First to Last; none when Last is 0.
type Range struct{ First, Last Ino }

// ErrInUse reports a cache directory that another server has open.
var ErrInUse = cache.ErrInUse

// Open opens the images of a cache directory. One server at a time may have it
// open: another one gets ErrInUse.
func Open(o Options) (*Store, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Timeout <= 0 {
		o.Timeout = 60 * time.Second
	}
	p, err := parsePlatform(o.Platform)
	if err != nil {
		return nil, err
	}
	c, err := cache.Open(o.Dir, cache.Options{Size: o.CacheSize, Log: o.Log.Info})
	if err != nil {
		return nil, err
	}
	cat, damage, err := resumeCatalog(c.CatalogPath(), c, o.kept())
	if err != nil {
		c.Close()
		return nil, err
	}
	cat.log = o.Log
	id, err := cat.identity(!o.kept())
	if err == nil && o.Resume != "" && o.Resume != id {
		err = errOtherNumbers
	}
	if err == nil && !o.kept() {
		err = cat.forgetRequests()
	}
	if err != nil {
		cat.close()
		c.Close()
		return nil, err
	}
	client, err := fetch.New(fetch.Options{CertsDir: o.CertsDir, Insecure: o.Insecure, Allow: o.Allow, Deny: o.Deny,
		Keychain: o.Keychain, Timeout: o.Timeout, UserAgent: o.UserAgent})
	if err != nil {
		cat.close()
		c.Close()
		return nil, err
	}
	s := &Store{o: o, id: id, platform: p, cache: c, cat: cat, client: client, log: o.Log, views: map[uint32]*View{},
		images: map[imageKey]*image{}, layers: map[uint32]*layer{}, negative: map[Name]negative{},
		probes: map[string]probe{}, formats: map[v1.Hash]fetch.Format{}, programs: map[Ino]bool{}, looking: semaphore.NewWeighted(maxLooking), xattrs: map[string]bool{},
		arriving: map[*unionfs.Builder]bool{}, spare: map[v1.Hash]bool{}}
	s.profiles.open, s.profiles.held = map[*image]*tracing{}, map[v1.Hash][]*fetch.Hold{}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if damage != nil {
		o.Log.Error("the catalogue was made again", "err", damage)
		s.untold = append(s.untold, Event{Err: damage})
		s.rebuilt = damage
	}
	if err := s.settleCatalog(); err != nil {
		o.Log.Error("the catalogue could not be read whole", "err", err)
	} else if damage == nil && !o.kept() {
		s.tasks.Go(s.sweepDropped)
	}
	cat.applied = s.catalogApplied
	if o.Resume != "" {
		s.resumePasses()
	}
	if o.kept() {
		return s, nil
	}
	if err := forgetUnproved(o.Dir); err != nil {
		o.Log.Warn("notes of a server before were not cleaned up", "err", err)
	}
	if err := s.dropNodes(); err != nil { // they stay, and count
		o.Log.Warn("namespace nodes were not cleaned up", "err", err)
	}
	return s, nil
}

// Close stops what runs in the background and writes what is not yet durable.
// No other method may be running or called after it.
func (s *Store) Close() error {
	s.endTraces()
	s.cancel()
	s.mu.Lock()
	images, layers := s.images, s.layers
	s.images, s.layers = nil, nil
	s.mu.Unlock()
	for _, l := range layers {
		l.stop()
	}
	s.tasks.Wait()
	for _, im := range images {
		im.close()
	}
	for _, l := range layers {
		l.close()
	}
	s.client.Close()
	err := s.cat.close()
	if cerr := s.cache.Close(); err == nil {
		err = cerr
	}
	return err
}

// Watch sets the function that is told of events, also of what Open has found. It
// must not block.
func (s *Store) Watch(f func(Event)) {
	s.mu.Lock()
	s.watch = f
	untold, begun := s.untold, s.begun
	s.untold, s.begun = nil, nil
	s.mu.Unlock()
	for _, e := range untold {
		f(e)
	}
	s.provePasses(begun)
}

func (s *Store) tell(e Event) {
	s.mu.Lock()
	f := s.watch
	s.mu.Unlock()
	if f != nil {
		f(e)
	} else if e.Told != nil {
		e.Told <- struct{}{} // nobody caches anything
	}
}

// Usage is the size of the cache in bytes.
type Usage = cache.Usage

// Usage tells the cache's limit and what of it is used and free.
func (s *Store) Usage() Usage { return s.cache.Usage() }

// Traffic counts what went over the network.
type Traffic = fetch.Stats

// Traffic returns the counts since Open.
func (s *Store) Traffic() Traffic { return s.client.Stats() }

// parsePlatform reads os/arch[/variant]; the empty string is this machine's.
func parsePlatform(s string) (v1.Platform, error) {
	if s == "" {
		return fetch.DefaultPlatform(), nil
	}
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[1] == "" {
		return v1.Platform{}, fmt.Errorf("images: platform %q: want os/arch or os/arch/variant", s)
	}
	p := v1.Platform{OS: parts[0], Architecture: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	return p, nil
}
