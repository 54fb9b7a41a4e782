package fs

import (
	"bytes"
	"encoding/json"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/imgfs/imgfs/images"
)

// The files of .imgfs: text for people, and the same as JSON. Sizes are bytes,
// times are those of RFC 3339.

func encode(b *bytes.Buffer, v any) error {
	e := json.NewEncoder(b)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// table writes rows in columns.
func table(b *bytes.Buffer, rows [][]string) error {
	w := tabwriter.NewWriter(b, 0, 0, 3, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	return w.Flush()
}

// misleads reports whether a character could make what a registry, an image or a
// caller says look like something else: it ends a line, talks to a terminal, or
// turns the direction of what is around it.
func misleads(r rune) bool {
	return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' || unicode.Is(unicode.Bidi_Control, r)
}

// oneLine makes what a registry, an image or a caller says fit for one column of
// one line.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if misleads(r) {
			return ' '
		}
		return r
	}, s)
}

const none = "<none>"

// shortID is an image ID as docker shows it.
func shortID(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	return id[:min(12, len(id))]
}

// bytesOr is a size for people, or what stands for one that is not known.
func bytesOr(n int64, unknown string) string {
	if n < 0 {
		return unknown
	}
	return strconv.FormatInt(n, 10)
}

// madeAt is a time for people; images that do not say when they were made are
// many.
func madeAt(t time.Time) string {
	if t.IsZero() {
		return "N/A"
	}
	return t.Format(time.RFC3339)
}

// imageJSON is one element of images.json.
type imageJSON struct {
	Repository string    `json:"repository"`
	Tag        string    `json:"tag"` // "<none>" for an image named by digest only, and for a dangling one
	Dangling   bool      `json:"dangling"`
	ID         string    `json:"id"`
	Digest     string    `json:"digest"`   // what the registry answers for the tag
	Manifest   string    `json:"manifest"` // of this platform
	Created    time.Time `json:"created"`
	Pulled     time.Time `json:"pulled"`
	Size       int64     `json:"size"` // expanded bytes; -1 while a layer is arriving
	Compressed int64     `json:"compressed"`
	Usage      int64     `json:"usage"` // expanded, in blocks of 512 bytes: what du counts
	Shared     int64     `json:"shared"`
	Unique     int64     `json:"unique"`
	Cached     int64     `json:"cached"`
	Layers     int       `json:"layers"`
	Platform   string    `json:"platform"`
}

func imageOf(i images.Info) imageJSON {
	x := imageJSON{Repository: i.Name.Repo, Tag: i.Name.Tag, Dangling: i.Dangling, ID: i.ID.String(), Digest: i.Top.String(),
		Manifest: i.Digest.String(), Created: i.Created, Pulled: i.Pulled, Size: i.Expanded, Compressed: i.Compressed,
		Usage: i.Usage, Shared: i.Shared, Unique: i.Unique, Cached: i.Cached, Layers: i.Layers, Platform: i.Platform}
	if i.Name.IsDigest() {
		x.Tag = none
	}
	if i.Dangling {
		x.Repository, x.Tag = none, none
	}
	return x
}

// list is what images.json has: by name, dangling ones last.
func (c *control) list() ([]imageJSON, error) {
	infos, err := c.f.store.List()
	if err != nil {
		return nil, err
	}
	sort.SliceStable(infos, func(i, j int) bool { return !infos[i].Dangling && infos[j].Dangling })
	list := make([]imageJSON, 0, len(infos))
	for _, i := range infos {
		list = append(list, imageOf(i))
	}
	return list, nil
}

func (c *control) imagesJSON(b *bytes.Buffer) error {
	list, err := c.list()
	if err != nil {
		return err
	}
	return encode(b, list)
}

func (c *control) imagesText(b *bytes.Buffer) error {
	list, err := c.list()
	if err != nil {
		return err
	}
	rows := [][]string{{"REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"}}
	for _, i := range list {
		rows = append(rows, []string{i.Repository, i.Tag, shortID(i.ID), madeAt(i.Created), bytesOr(i.Size, "arriving")})
	}
	return table(b, rows)
}

// totalsJSON is df.json: the fields of images.Totals.
type totalsJSON struct {
	Images            int   `json:"images"`
	Tagged            int   `json:"tagged"`
	Dangling          int   `json:"dangling"`
	Names             int   `json:"names"`
	Layers            int   `json:"layers"`
	Idle              int   `json:"idle"`
	Arriving          int   `json:"arriving"`
	Compressed        int64 `json:"compressed"`
	Expanded          int64 `json:"expanded"`
	Usage             int64 `json:"usage"`
	Shared            int64 `json:"shared"`
	SharedUsage       int64 `json:"sharedUsage"`
	Unique            int64 `json:"unique"`
	Cached            int64 `json:"cached"`
	Reclaimable       int64 `json:"reclaimable"`
	ReclaimableCached int64 `json:"reclaimableCached"`
	CacheLimit        int64 `json:"cacheLimit"`
	CacheFree         int64 `json:"cacheFree"`
}

func (c *control) dfJSON(b *bytes.Buffer) error {
	t, err := c.f.store.Totals()
	if err != nil {
		return err
	}
	return encode(b, totalsJSON{Images: t.Images, Tagged: t.Tagged, Dangling: t.Dangling, Names: t.Names, Layers: t.Layers,
		Idle: t.Idle, Arriving: t.Arriving, Compressed: t.Compressed, Expanded: t.Expanded, Usage: t.Usage, Shared: t.Shared,
		SharedUsage: t.SharedUsage, Unique: t.Unique, Cached: t.Cached, Reclaimable: t.Reclaimable,
		ReclaimableCached: t.ReclaimableCached, CacheLimit: t.CacheLimit, CacheFree: t.CacheFree})
}

// dfText has the columns of `docker system df`. Images are counted by what they
// hold, layers by what registries hold of them, the cache by what this disk does.
func (c *control) dfText(b *bytes.Buffer) error {
	t, err := c.f.store.Totals()
	if err != nil {
		return err
	}
	n := strconv.Itoa
	of := func(part, whole int64) string {
		if whole <= 0 {
			return bytesOr(part, "arriving")
		}
		return fmt.Sprintf("%d (%d%%)", part, int64(float64(part)/float64(whole)*100))
	}
	if err := table(b, [][]string{
		{"TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"},
		{"Images", n(t.Images), n(t.Tagged), bytesOr(t.Expanded, "arriving"), of(t.Reclaimable, t.Expanded)},
		{"Layers", n(t.Layers + t.Idle), n(t.Layers), bytesOr(t.Compressed, "arriving"), "-"},
		{"Cache", n(t.Layers + t.Idle), n(t.Layers), bytesOr(t.Cached, "arriving"), of(t.ReclaimableCached, t.Cached)},
	}); err != nil {
		return err
	}
	fmt.Fprintf(b, "\nSHARED %d\nUNIQUE %d\nCACHE LIMIT %d\nDISK FREE %d\n", t.Shared, t.Unique, t.CacheLimit, t.CacheFree)
	return nil
}

// layerJSON is an element of layers.json.
type layerJSON struct {
	Key        string `json:"key"` // its directory is .imgfs/layers/ and the digits of this
	Digest     string `json:"digest"`
	DiffID     string `json:"diffID"`
	MediaType  string `json:"mediaType"`
	Images     int    `json:"images"`
	Compressed int64  `json:"compressed"`
	Expanded   int64  `json:"expanded"` // -1 while it is not known
	Usage      int64  `json:"usage"`
	Cached     int64  `json:"cached"`
	Method     string `json:"method"`
	Lazy       bool   `json:"lazy"`
	Why        string `json:"why"`
	State      string `json:"state"`
	Arrived    int64  `json:"arrived"`

	Command *string `json:"command,omitempty"` // of the history, below meta/
}

func layerOf(l images.LayerInfo) layerJSON {
	return layerJSON{Key: l.Key.String(), Digest: l.Digest.String(), DiffID: l.DiffID.String(), MediaType: l.MediaType,
		Images: l.Images, Compressed: l.Compressed, Expanded: l.Expanded, Usage: l.Usage, Cached: l.Cached, Method: l.Method,
		Lazy: l.Lazy, Why: l.Why, State: l.State, Arrived: l.Arrived}
}

func (c *control) layersJSON(b *bytes.Buffer) error {
	layers, err := c.f.store.Layers()
	if err != nil {
		return err
	}
	list := make([]layerJSON, 0, len(layers))
	for _, l := range layers {
		list = append(list, layerOf(l))
	}
	return encode(b, list)
}

func (c *control) chainsJSON(b *bytes.Buffer) error {
	type chainJSON struct {
		ID      string    `json:"id"`
		Layers  int       `json:"layers"`
		Created time.Time `json:"created"`
		Images  []string  `json:"images"` // manifest digests
		Whole   bool      `json:"whole"`
	}
	chains, err := c.f.store.Chains()
	if err != nil {
		return err
	}
	list := make([]chainJSON, 0, len(chains))
	for _, ch := range chains {
		x := chainJSON{ID: ch.ID.String(), Layers: ch.Layers, Created: ch.Created, Whole: ch.Whole, Images: []string{}}
		for _, im := range ch.Images {
			x.Images = append(x.Images, im.String())
		}
		list = append(list, x)
	}
	return encode(b, list)
}

// pullJSON is an element of pulls.json.
type pullJSON struct {
	Name    string          `json:"name"`
	Started time.Time       `json:"started"`
	Ended   *time.Time      `json:"ended,omitempty"` // not there while the pull is under way
	Err     string          `json:"err"`
	Layers  []pullLayerJSON `json:"layers"`
}

type pullLayerJSON struct {
	Key     string `json:"key"`
	Digest  string `json:"digest"`
	Size    int64  `json:"size"`
	Method  string `json:"method"`
	Format  string `json:"format"`
	Arrived int64  `json:"arrived"`
	Done    bool   `json:"done"`
	Err     string `json:"err"`
}

func (c *control) pulls() []pullJSON {
	list := []pullJSON{}
	for _, p := range c.f.store.Pulls() {
		x := pullJSON{Name: p.Name.String(), Started: p.Started, Err: p.Err, Layers: []pullLayerJSON{}}
		if !p.Ended.IsZero() {
			x.Ended = &p.Ended
		}
		for _, l := range p.Layers {
			x.Layers = append(x.Layers, pullLayerJSON{Key: l.Key.String(), Digest: l.Digest.String(), Size: l.Size,
				Method: l.Method, Format: l.Format, Arrived: l.Arrived, Done: l.Done, Err: l.Err})
		}
		list = append(list, x)
	}
	return list
}

func (c *control) pullsJSON(b *bytes.Buffer) error { return encode(b, c.pulls()) }

func (c *control) pullsText(b *bytes.Buffer) error {
	rows := [][]string{{"NAME", "LAYER", "SIZE", "ARRIVED", "METHOD", "STATE"}}
	for _, p := range c.pulls() {
		state := "pulling"
		switch {
		case p.Err != "":
			state = oneLine(p.Err)
		case p.Ended != nil:
			state = "pulled"
		}
		rows = append(rows, []string{p.Name, "", "", "", "", state})
		for _, l := range p.Layers {
			state := "arriving"
			switch {
			case l.Err != "":
				state = oneLine(l.Err)
			case l.Done:
				state = "done"
			}
			rows = append(rows, []string{p.Name, shortID(l.Digest), bytesOr(l.Size, ""), bytesOr(l.Arrived, ""), l.Method, state})
		}
	}
	return table(b, rows)
}

func (c *control) statsJSON(b *bytes.Buffer) error { return encode(b, c.f.stats()) }

func (c *control) statsText(b *bytes.Buffer) error {
	s := c.f.stats()
	fmt.Fprintf(b, "pid %d\nstarted %s\n", s.PID, s.Started.Format(time.RFC3339))
	fmt.Fprintf(b, "restarts %d\n", s.Restarts)
	if s.LastEnd != "" {
		fmt.Fprintf(b, "lastEnd %s\n", oneLine(s.LastEnd))
	}
	names := make([]string, 0, len(s.Fuse))
	for name := range s.Fuse {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		fmt.Fprintf(b, "fuse.%s %d\n", name, s.Fuse[name])
	}
	fmt.Fprintf(b, "registry.requests %d\nregistry.bytes %d\nregistry.retries %d\n", s.Registry.Requests, s.Registry.Bytes, s.Registry.Retries)
	fmt.Fprintf(b, "cache.limit %d\ncache.used %d\ncache.free %d\n", s.Cache.Limit, s.Cache.Used, s.Cache.Free)
	fmt.Fprintf(b, "catalogue.reads %d\nerrors %d\n", s.Catalogue.Reads, s.Errors)
	return nil
}
