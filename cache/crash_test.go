package cache

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// disk models what a power loss may leave of one pack: of every sector, what the
// last sync before it made durable, or anything newer.
type disk struct {
	dir, hex     string
	pack, mapped []byte // as of the last sync
}

func (d *disk) read(path string) []byte {
	b, _ := os.ReadFile(filepath.Join(d.dir, path))
	return b
}

// mix takes each sector from now or from durable, as pick says.
func mix(durable, now []byte, pick func() bool) []byte {
	out := bytes.Clone(now)
	for at := 0; at < len(out); at += slotSize {
		if pick() {
			continue
		}
		end := min(at+slotSize, len(out))
		clear(out[at:end])
		if at < len(durable) {
			copy(out[at:end], durable[at:])
		}
	}
	return out
}

// lose writes a cache directory as a power loss now could leave it.
func (d *disk) lose(t *testing.T, how int, rng *rand.Rand) string {
	pickPack := func() bool { return rng.IntN(2) == 0 }
	pickMap := pickPack
	switch how {
	case 0: // kill -9: all writes survive
		pickPack, pickMap = func() bool { return true }, func() bool { return true }
	case 1: // the worst for new bits
		pickPack, pickMap = func() bool { return false }, func() bool { return true }
	case 2: // the worst for cleared bits
		pickPack, pickMap = func() bool { return true }, func() bool { return false }
	}
	to := t.TempDir()
	os.MkdirAll(filepath.Join(to, packDir), 0o700)
	for path, data := range map[string][]byte{
		packPath(d.hex): mix(d.pack, d.read(packPath(d.hex)), pickPack),
		mapPath(d.hex):  mix(d.mapped, d.read(mapPath(d.hex)), pickMap),
		versionFile:     []byte("1\n"),
	} {
		if err := os.WriteFile(filepath.Join(to, path), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return to
}

// At every step that changes the disk, in a life of puts, flushes, evictions,
// drops, passes and resets, a crash or a power loss leaves only chunks that match.
func TestCrashEverywhere(t *testing.T) {
	const n, size, limit = 160, 30000, 3 << 20 // the pack would be 4.8 MB
	rng := rand.New(rand.NewPCG(1, 2))
	dir := t.TempDir()
	c := open(t, dir, Options{Size: limit})
	p := pack(t, c, "a")
	c.waitScan()
	d := &disk{dir: dir, hex: p.name}
	d.mapped = d.read(mapPath(d.hex))
	var want [n][]byte
	for i := range want {
		want[i] = chunkData("a", uint32(i), size)
	}
	crashes, seen := 0, 0
	hookRNG := rand.New(rand.NewPCG(3, 4))
	last := ""
	var mu sync.Mutex // the evictor works beside us
	look := func(op string) {
		mu.Lock()
		defer mu.Unlock()
		switch last { // that step has been done by now
		case "pack-sync":
			d.pack = d.read(packPath(d.hex))
		case "segs-sync", "bits-sync", "clear-sync", "wipe-sync":
			d.mapped = d.read(mapPath(d.hex))
		}
		last = op
		if op == "write" && hookRNG.IntN(10) > 0 {
			return
		}
		how := hookRNG.IntN(4)
		after := d.lose(t, how, hookRNG)
		defer os.RemoveAll(after)
		crashes++
		c2, err := Open(after, Options{Size: limit, FlushEvery: time.Hour})
		if err != nil {
			t.Fatalf("after a crash before %q: %v", op, err)
		}
		defer c2.Close()
		p2, err := c2.Pack(hashN("a"))
		if err != nil {
			t.Fatal(err)
		}
		defer p2.Close()
		b := make([]byte, size)
		for i := range uint32(n) {
			if ok, _ := p2.ReadAt(b, int64(i)*size, i, 1); ok {
				seen++
				if !bytes.Equal(b, want[i]) {
					t.Fatalf("after a crash before %q (kind %d): chunk %d has wrong bytes", op, how, i)
				}
			}
		}
	}
	c.evictMu.Lock()
	c.hook = func(op string) error { look(op); return nil }
	c.evictMu.Unlock()
	for range 300 {
		i := uint32(rng.IntN(n))
		switch k := rng.IntN(100); {
		case k < 80:
			if err := put(t, p, "a", i, int64(i)*size, size); err != nil && !errors.Is(err, ErrFull) {
				t.Fatal(err)
			}
		case k < 90:
			p.flush(k < 85)
		case k < 93:
			p.Drop(i, 3)
		case k < 94:
			p.reset()
		case k < 98:
			from := min(i, n-40)
			for j := from; j < from+40; j++ {
				if p.Stage(int64(j)*size, chunkData("a", j, size)) != nil {
					break
				}
			}
			if k == 97 {
				p.Rollback()
				break
			}
			p.Commit(func(j uint32) (int64, int64, bool) { return int64(j) * size, size, j >= from && j < from+40 }, n)
		default:
			c.freeDisk(200000)
		}
		check(t, p, "a", i, int64(i)*size, size)
	}
	if used := c.Usage().Used; used > limit {
		t.Errorf("Used = %d, limit %d", used, limit)
	}
	t.Logf("%d crashes, %d visible chunks checked", crashes, seen)
	if crashes < 150 || seen < 1000 {
		t.Errorf("the test looked at %d crashes and %d chunks only", crashes, seen)
	}
}

// A process that writes, flushes and evicts is killed at any moment; what is
// visible afterwards matches.
func TestKill(t *testing.T) {
	if dir := os.Getenv("IMGFS_TEST_KILL"); dir != "" {
		killed(t, dir)
		return
	}
	dir := t.TempDir()
	total := 0
	for round := range 6 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill$", "-test.timeout=60s")
		cmd.Env = append(os.Environ(), "IMGFS_TEST_KILL="+dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(150+50*round) * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()
		c := open(t, dir, Options{Size: 8 << 20})
		for _, name := range []string{"a", "b"} {
			p := pack(t, c, name)
			for i := range uint32(400) {
				if check(t, p, name, i, int64(i)*25000, 25000) {
					total++
				}
			}
			p.Close()
			c.mu.Lock() // for the cleanup
			p.handles++
			c.mu.Unlock()
		}
		if u := c.Usage(); u.Used > u.Limit {
			t.Errorf("Used = %d, limit %d", u.Used, u.Limit)
		}
		c.Close()
	}
	if total == 0 {
		t.Errorf("nothing was ever visible after a kill")
	}
	t.Logf("%d visible chunks checked", total)
}

func killed(t *testing.T, dir string) {
	c, err := Open(dir, Options{Size: 8 << 20, FlushEvery: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	for round := 0; ; round++ {
		for _, name := range []string{"a", "b"} {
			p, err := c.Pack(hashN(name))
			if err != nil {
				t.Fatal(err)
			}
			for range 50 {
				i := uint32(rand.IntN(400))
				data := chunkData(name, i, 25000)
				p.Put(i, int64(i)*25000, data, sha256.Sum256(data))
			}
			if round%5 == 4 {
				for i := range uint32(40) {
					p.Stage(int64(i)*25000, chunkData(name, i, 25000))
				}
				p.Commit(func(i uint32) (int64, int64, bool) { return int64(i) * 25000, 25000, true }, 40)
			}
			p.Close()
		}
	}
}
