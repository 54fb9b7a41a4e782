package integration

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A crowd is a mount with very many tiny images on it, ten in each repository.
type crowd struct {
	*mount
	s *stock
	n int // images that are here

}

func startCrowd(t testing.TB) *crowd {
	t.Helper()
	c := &crowd{s: startStock(t, 0)}
	c.mount = startFast(t, c.s.hub(t)...)
	return c
}

// roomy is a directory in memory with room for 10,000 images, else one on the disk.
func roomy() string {
	const enough = 4 << 30
	var st unix.Statfs_t
	if unix.Statfs("/dev/shm", &st) == nil && int64(st.Bavail)*st.Bsize > enough {
		return "/dev/shm"
	}
	return scratch.dir
}

func crowdPath(i int) string { return fmt.Sprintf("r%03d/t%d", i/10, i%10) }

// grow brings images here until there are n, by mkdir, several at a time.
func (c *crowd) grow(n int) {
	c.t.Helper()
	for i := c.n; i < n+1; i++ { // and one for one()
		if i == len(c.s.kinds) {
			c.s.make(c.t, i)
		}
		c.s.set[tagSpelling(crowdPath(i))] = i
	}
	var wg sync.WaitGroup
	const at = 8
	for w := range at {
		wg.Go(func() {
			for i := c.n + w; i < n; i += at {
				if err := os.Mkdir(c.path(crowdPath(i)), 0o755); err != nil {
					c.t.Errorf("mkdir %s: %v", crowdPath(i), err)
					return
				}
			}
		})
	}
	wg.Wait()
	if c.n = n; c.t.Failed() {
		c.t.FailNow()
	}
	c.settled()
}

// one is an image that is not here.
func (c *crowd) one() string { return c.path(crowdPath(c.n)) }

// An errand is an operation on the crowd that is measured.
type errand struct {
	name string
	do   func(c *crowd) (lines int) // of its output
	undo func(c *crowd)
	// grows says that the output does, with the number of images.
	grows bool
}

func errands() []errand {
	count := func(out string) int { return strings.Count(out, "\n") }
	return []errand{
		{"ls", func(c *crowd) int { return len(names(c.t, c.dir)) }, nil, true},
		{"images-q", func(c *crowd) int { return count(c.imgfs("images", "-q")) }, nil, true},
		{"df", func(c *crowd) int { return count(c.imgfs("df")) }, nil, false},
		{"df.json", func(c *crowd) int { c.df(); return 1 }, nil, false},
		{"mkdir", func(c *crowd) int { c.must(os.Mkdir(c.one(), 0o755)); return 0 }, func(c *crowd) { c.must(os.Remove(c.one())) }, false},
		{"rmdir", func(c *crowd) int { c.must(os.Remove(c.path(crowdPath(3)))); return 0 }, func(c *crowd) { c.must(os.Mkdir(c.path(crowdPath(3)), 0o755)) }, false},
		{"ln", func(c *crowd) int { c.must(os.Symlink(crowdPath(5), c.path("r000/linked"))); return 0 }, func(c *crowd) { c.must(os.Remove(c.path("r000/linked"))) }, false},
		{"mv", func(c *crowd) int { c.must(rename2(c.path(crowdPath(6)), c.path("r000/moved"), 0)); return 0 },
			func(c *crowd) { c.must(rename2(c.path("r000/moved"), c.path(crowdPath(6)), 0)) }, false},
		{"touch", func(c *crowd) int { c.must(touch(c.path(crowdPath(7)))); return 0 }, nil, false},
		{"id", func(c *crowd) int { c.must(lstat(c.path(".imgfs/ids", c.s.kinds[8].id.Hex))); return 0 }, nil, false},
		{"rm-id", func(c *crowd) int { c.must(unix.Rmdir(c.path(".imgfs/ids", c.s.kinds[9].id.Hex))); return 0 },
			func(c *crowd) { c.must(os.Mkdir(c.path(crowdPath(9)), 0o755)) }, false},
	}
}

func (c *crowd) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// cost counts the records of the catalogue that an errand reads.
func (c *crowd) cost(e errand) (reads int64, lines int) {
	c.t.Helper()
	c.stats()
	a := c.stats().Catalogue.Reads
	b := c.stats().Catalogue.Reads
	lines = e.do(c)
	reads = c.stats().Catalogue.Reads - b - (b - a)
	if e.undo != nil {
		e.undo(c)
	}
	return reads, lines
}

// TestCostsWithManyImages counts what operations read of the catalogue with 100
// images here and with 1,000: none reads more than its own output has more.
func TestCostsWithManyImages(t *testing.T) {
	c := startCrowd(t)
	type measure struct {
		reads int64
		lines int
	}
	costs := map[string][]measure{}
	sizes := []int{100, 1000}
	if long() {
		sizes = append(sizes, 10_000)
	}
	for _, n := range sizes {
		c.grow(n)
		for _, e := range errands() {
			c.cost(e) // what is remembered in memory is, from now on
			reads, lines := c.cost(e)
			costs[e.name] = append(costs[e.name], measure{reads, lines})
		}
	}
	for _, e := range errands() {
		t.Logf("%-9s with %v images: {records read, lines of output} %v", e.name, sizes, costs[e.name])
		first := costs[e.name][0]
		for i, got := range costs[e.name][1:] {
			// A record for each line, and a few of the tree's own.
			more := int64(got.lines-first.lines)*first.reads/max(1, int64(first.lines)) + 4
			if !e.grows {
				more = 8 // a layer that has just arrived is recorded now or a moment later
			}
			if got.reads > first.reads+more {
				t.Errorf("%s reads %d records of the catalogue with %d images, %d with %d", e.name, first.reads, sizes[0], got.reads, sizes[i+1])
			}
		}
		if e.name == "mkdir" && first.reads == 0 {
			t.Error("a mkdir reads no record: the counter does not count")
		}
	}
	c.recountSome()
}

// recountSome compares the totals with images.json and layers.json, without a
// look at each image.
func (c *crowd) recountSome() {
	c.t.Helper()
	df := c.df()
	var d totals
	for _, i := range c.images() {
		d.Images++
		d.Names++
		if i.Size != i.Shared+i.Unique {
			c.t.Errorf("%s: size %d, shared %d, unique %d", i.name(), i.Size, i.Shared, i.Unique)
		}
	}
	for _, l := range c.layers() {
		if l.Images > 0 {
			d.Layers++
			d.Expanded += l.Expanded
		}
	}
	if df.Images != d.Images || df.Names != c.n || df.Layers != d.Layers || df.Expanded != d.Expanded {
		c.t.Errorf("df says %+v, a count %+v", df, d)
	}
}

// BenchmarkManyImages measures the operations with 100, 1,000 and 10,000 images.
func BenchmarkManyImages(b *testing.B) {
	c := startCrowd(b)
	for _, n := range []int{100, 1000, 10_000} {
		c.grow(n)
		for _, e := range errands() {
			b.Run(fmt.Sprintf("%s/%d", e.name, n), func(b *testing.B) {
				reads, _ := c.cost(e)
				for b.Loop() {
					e.do(c)
					if e.undo != nil {
						b.StopTimer()
						e.undo(c)
						b.StartTimer()
					}
				}
				b.ReportMetric(float64(reads), "reads/op")
			})
		}
	}
}
