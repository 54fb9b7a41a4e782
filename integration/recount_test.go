package integration

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// recount adds up what the mount says of each image and of each layer, and
// reports every counter that is off: by a byte is off.
func (m *mount) recount() {
	m.t.Helper()
	m.report(m.miscounts())
}

// recountKnown is recount where the cache has contents of layers that the
// catalogue does not know (any more): df counts those, and no layer has them.
func (m *mount) recountKnown() {
	m.t.Helper()
	m.report(slices.DeleteFunc(m.miscounts(), func(off string) bool {
		return strings.HasPrefix(off, "df cached") || strings.HasPrefix(off, "df reclaimableCached")
	}))
}

func (m *mount) report(off []string) {
	m.t.Helper()
	if len(off) > 0 {
		m.t.Errorf("%d counters are off:\n%s", len(off), strings.Join(off[:min(20, len(off))], "\n"))
	}
}

type tally struct {
	rows   []imageRow
	layers map[string]layerRow        // by key
	uses   map[string]map[string]bool // manifest → keys of its layers, each once
	named  map[string]bool            // manifest: has a name
	off    []string
}

func (m *mount) miscounts() []string {
	m.t.Helper()
	df := m.settled()
	c := tally{rows: m.images(), layers: map[string]layerRow{}, uses: map[string]map[string]bool{}, named: map[string]bool{}}
	for _, l := range m.layers() {
		if _, twice := c.layers[l.Key]; twice {
			c.bad("layer %s is listed twice", l.Key)
		}
		c.layers[l.Key] = l
	}
	for _, i := range c.rows {
		c.named[i.Manifest] = c.named[i.Manifest] || !i.Dangling
		if c.uses[i.Manifest] != nil {
			continue
		}
		var of []layerRow
		m.control("meta/"+i.path()+"/layers.json", &of)
		keys := map[string]bool{}
		for _, l := range of {
			keys[l.Key] = true
		}
		c.uses[i.Manifest] = keys
	}
	for _, i := range c.rows {
		c.image(i)
	}
	c.totals(df)
	m.checkLists(&c)
	return c.off
}

func (c *tally) bad(format string, args ...any) { c.off = append(c.off, fmt.Sprintf(format, args...)) }

func (c *tally) same(what string, got, want int64) {
	if got != want {
		c.bad("%s = %d, want %d", what, got, want)
	}
}

// image compares an image with the sum of its layers.
func (c *tally) image(i imageRow) {
	var sum imageRow
	for key := range c.uses[i.Manifest] {
		l, ok := c.layers[key]
		if !ok {
			c.bad("%s has the layer %s, which layers.json has not", i.name(), key)
			continue
		}
		sum.Size += l.Expanded
		sum.Compressed += l.Compressed
		sum.Usage += l.Usage
		sum.Cached += l.Cached
		if l.Images > 1 {
			sum.Shared += l.Expanded
		}
	}
	name := i.name() + " " + i.ID[:min(len(i.ID), 19)]
	c.same(name+" size", i.Size, sum.Size)
	c.same(name+" compressed", i.Compressed, sum.Compressed)
	c.same(name+" usage", i.Usage, sum.Usage)
	c.same(name+" shared", i.Shared, sum.Shared)
	c.same(name+" unique", i.Unique, sum.Size-sum.Shared)
	c.same(name+" cached", i.Cached, sum.Cached)
}

// totals compares df with the sum of everything.
func (c *tally) totals(df totals) {
	var d totals
	refs, live := map[string]int{}, map[string]bool{}
	for manifest, keys := range c.uses {
		d.Images++
		for key := range keys {
			refs[key]++
			live[key] = live[key] || c.named[manifest]
		}
	}
	for _, named := range c.named {
		if named {
			d.Tagged++
		} else {
			d.Dangling++
		}
	}
	for _, i := range c.rows {
		if !i.Dangling {
			d.Names++
		}
	}
	for key, l := range c.layers {
		c.same("images of layer "+key, int64(l.Images), int64(refs[key]))
		d.Cached += l.Cached
		if !live[key] {
			d.ReclaimableCached += l.Cached
		}
		if l.Images == 0 {
			d.Idle++
			continue
		}
		if !live[key] {
			d.Reclaimable += l.Expanded
		}
		d.Layers++
		d.Compressed += l.Compressed
		d.Expanded += l.Expanded
		d.Usage += l.Usage
		if l.Images > 1 {
			d.Shared += l.Expanded
			d.SharedUsage += l.Usage
		}
	}
	for _, x := range []struct {
		what      string
		got, want int64
	}{
		{"images", int64(df.Images), int64(d.Images)}, {"tagged", int64(df.Tagged), int64(d.Tagged)}, {"dangling", int64(df.Dangling), int64(d.Dangling)},
		{"names", int64(df.Names), int64(d.Names)}, {"layers", int64(df.Layers), int64(d.Layers)}, {"idle", int64(df.Idle), int64(d.Idle)},
		{"compressed", df.Compressed, d.Compressed}, {"expanded", df.Expanded, d.Expanded}, {"usage", df.Usage, d.Usage},
		{"shared", df.Shared, d.Shared}, {"sharedUsage", df.SharedUsage, d.SharedUsage}, {"unique", df.Unique, d.Expanded - d.Shared},
		{"reclaimable", df.Reclaimable, d.Reclaimable}, {"cached", df.Cached, d.Cached}, {"reclaimableCached", df.ReclaimableCached, d.ReclaimableCached},
	} {
		c.same("df "+x.what, x.got, x.want)
	}
}

// checkLists compares what the directories list with images.json.
func (m *mount) checkLists(c *tally) {
	m.t.Helper()
	var ids, dangling []string
	tags := map[string][]string{}
	for _, i := range c.rows {
		hex := strings.TrimPrefix(i.ID, "sha256:")
		ids = append(ids, hex)
		switch {
		case i.Dangling:
			dangling = append(dangling, hex)
		case i.Tag != "<none>":
			tags[i.Repository] = append(tags[i.Repository], i.Tag)
		}
	}
	c.list(m, ".imgfs/ids", ids)
	c.list(m, ".imgfs/dangling", dangling)
	for repo, want := range tags {
		have := names(m.t, m.path(repo))
		for _, tag := range want {
			if !slices.Contains(have, tag) {
				c.bad("ls %s lacks %s", repo, tag)
			}
		}
	}
}

func (c *tally) list(m *mount, dir string, want []string) {
	entries, err := os.ReadDir(m.path(dir))
	if err != nil {
		c.bad("%v", err)
		return
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	slices.Sort(want)
	slices.Sort(got)
	if want = slices.Compact(want); !slices.Equal(got, want) {
		c.bad("ls %s = %v, want %v", dir, got, want)
	}
}
