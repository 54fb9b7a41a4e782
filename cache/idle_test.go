package cache

import (
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// counted compares the counters with what the packs say.
func counted(t *testing.T, c *Cache, idle ...string) {
	t.Helper()
	c.waitScan()
	var used, spared int64
	for _, p := range c.allPacks() {
		n := int64(0)
		p.eachSeg(func(_ int64, s *segment) { n += s.bytes() })
		if p.Stored() != n || c.StoredOf(p.Hash()) != n {
			t.Errorf("pack %.8s: Stored() = %d, StoredOf = %d, its segments have %d", p.name, p.Stored(), c.StoredOf(p.Hash()), n)
		}
		used += n
		if slices.ContainsFunc(idle, func(name string) bool { return hashN(name) == p.Hash() }) {
			spared += n
		}
	}
	if u := c.Usage().Used; u != used {
		t.Errorf("Used = %d, the packs have %d", u, used)
	}
	if n := c.IdleUsed(); n != spared {
		t.Errorf("IdleUsed = %d, the idle packs have %d", n, spared)
	}
}

// What is idle goes first, although it was used last.
func TestIdleFirst(t *testing.T) {
	const size = segSize
	c := open(t, t.TempDir(), Options{Size: 32 * size})
	c.SetIdle(hashN("idle"), true) // before there is one
	idle, used := pack(t, c, "idle"), pack(t, c, "used")
	for i := range uint32(10) {
		if err := put(t, used, "used", i, int64(i)*size, size); err != nil {
			t.Fatal(err)
		}
	}
	c.clock.Add(5)
	for i := range uint32(10) {
		if err := put(t, idle, "idle", i, int64(i)*size, size); err != nil {
			t.Fatal(err)
		}
	}
	counted(t, c, "idle")
	if n := c.IdleUsed(); n != 10*size {
		t.Fatalf("IdleUsed = %d, want %d", n, 10*size)
	}
	c.evictMu.Lock()
	freed := c.evict(7 * size)
	c.evictMu.Unlock()
	if freed != 7*size || idle.Stored() != 3*size || used.Stored() != 10*size {
		t.Errorf("evict(7 MiB) = %d; idle has %d, used %d", freed, idle.Stored(), used.Stored())
	}
	counted(t, c, "idle")
	c.evictMu.Lock()
	c.evict(5 * size) // the rest of it, and two of the other
	c.evictMu.Unlock()
	if idle.Stored() != 0 || used.Stored() != 8*size {
		t.Errorf("idle has %d, used %d, want 0 and 8 MiB", idle.Stored(), used.Stored())
	}
	counted(t, c, "idle")
	c.SetIdle(hashN("idle"), false)
	c.SetIdle(hashN("used"), true)
	counted(t, c, "used")
	used.Close()
	if err := c.RemovePack(hashN("used")); err != nil {
		t.Fatal(err)
	}
	counted(t, c)
	used = pack(t, c, "used") // still idle
	if err := put(t, used, "used", 0, 0, size); err != nil {
		t.Fatal(err)
	}
	counted(t, c, "used")
	if n := c.StoredOf(hashN("nothing")); n != 0 {
		t.Errorf("StoredOf of no pack = %d", n)
	}
}

// The counters are the same after a restart, once SetIdle has been called again.
func TestIdleRestart(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{Size: 32 << 20})
	p := pack(t, c, "p")
	if err := put(t, p, "p", 0, 0, 3<<20); err != nil {
		t.Fatal(err)
	}
	c.SetIdle(hashN("p"), true)
	n := c.IdleUsed()
	c.Close()
	c = open(t, dir, Options{Size: 32 << 20})
	counted(t, c)
	c.SetIdle(hashN("p"), true)
	counted(t, c, "p")
	if got := c.IdleUsed(); got != n || n == 0 {
		t.Errorf("IdleUsed = %d, before the restart %d", got, n)
	}
}

// Everything at once: the counters are exact at the end.
func TestIdleRace(t *testing.T) {
	c := open(t, t.TempDir(), Options{Size: 8 << 20})
	names := []string{"a", "b", "c", "d"}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			for range 150 {
				name := names[rng.IntN(len(names))]
				switch rng.IntN(6) {
				case 0:
					c.SetIdle(hashN(name), rng.IntN(2) == 0)
				case 1:
					if _, err := c.ClearPack(hashN(name)); err != nil {
						t.Errorf("ClearPack = %v", err)
					}
				default:
					p, err := c.Pack(hashN(name))
					if err != nil {
						t.Error(err)
						return
					}
					i := uint32(rng.IntN(60))
					if err := put(t, p, name, i, int64(i)*200000, 200000); err != nil && !errors.Is(err, ErrFull) {
						t.Error(err)
					}
					p.Close()
				}
			}
		})
	}
	wg.Wait()
	for _, name := range names {
		c.SetIdle(hashN(name), name < "c")
	}
	counted(t, c, "a", "b")
}

func TestClearPack(t *testing.T) {
	c := open(t, t.TempDir(), Options{Size: 32 << 20})
	p := pack(t, c, "p")
	if err := put(t, p, "p", 0, 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if n, err := c.ClearPack(hashN("p")); n != 1<<20 || err != nil {
		t.Errorf("ClearPack = %d, %v", n, err)
	}
	if check(t, p, "p", 0, 0, 1<<20) {
		t.Error("a chunk of a cleared pack is here")
	}
	if err := put(t, p, "p", 0, 0, 1<<20); err != nil || !check(t, p, "p", 0, 0, 1<<20) {
		t.Errorf("a cleared pack takes nothing: %v", err)
	}
	p.Close()
	if n, err := c.ClearPack(hashN("p")); n != 1<<20 || err != nil {
		t.Errorf("ClearPack of a pack that nobody has = %d, %v", n, err)
	}
	if _, err := os.Stat(filepath.Join(c.dir, packPath(p.name))); err == nil {
		t.Error("its file is still there")
	}
	if n, err := c.ClearPack(hashN("p")); n != 0 || err != nil {
		t.Errorf("ClearPack of no pack = %d, %v", n, err)
	}
}

func TestVerify(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{Size: 32 << 20})
	p := pack(t, c, "p")
	const size = 300000
	for i := range uint32(2) {
		if err := put(t, p, "p", i, int64(i)*size, size); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.OpenFile(filepath.Join(dir, packPath(p.name)), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("damage"), size+1000)
	f.Close()
	buf := make([]byte, 4096)
	for i, want := range []struct {
		here bool
		err  error
	}{{true, nil}, {true, ErrDigest}, {false, nil}} {
		sum := sha256.Sum256(chunkData("p", uint32(i), size))
		here, err := p.VerifyChunk(buf, uint32(i), int64(i)*size, size, sum)
		if here != want.here || !errors.Is(err, want.err) {
			t.Errorf("VerifyChunk(%d) = %v, %v, want %v, %v", i, here, err, want.here, want.err)
		}
	}
	data := []byte("hello")
	h := key(sha256.Sum256(data)).hash()
	if err := c.PutBlob(h, data); err != nil {
		t.Fatal(err)
	}
	if err := c.VerifyBlob(h); err != nil {
		t.Errorf("VerifyBlob = %v", err)
	}
	var list []v1.Hash
	c.Each(Blob, func(h v1.Hash) error { list = append(list, h); return nil })
	if len(list) != 1 || list[0] != h {
		t.Errorf("Each(Blob) = %v, want %v", list, h)
	}
	if err := os.WriteFile(c.Path(Blob, h), []byte("hellO"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.VerifyBlob(h); !errors.Is(err, ErrDigest) || !c.Has(Blob, h) {
		t.Errorf("VerifyBlob of a damaged one = %v, and it is here: %v", err, c.Has(Blob, h))
	}
}
