package cache

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Readers check every byte while a budget of a tenth of what they read is enforced.
func TestEvictionUnderReaders(t *testing.T) {
	const packs, chunks, size, limit = 4, 300, 33333, 4 << 20 // 40 MB through 4 MiB
	c := open(t, t.TempDir(), Options{Size: limit, FlushEvery: 3 * time.Millisecond})
	names := []string{"a", "b", "c", "d"}
	var ps [packs]*Pack
	var want [packs][][]byte
	var sums [packs][][32]byte
	for i := range ps {
		ps[i] = pack(t, c, names[i])
		for k := range uint32(chunks) {
			want[i] = append(want[i], chunkData(names[i], k, size))
			sums[i] = append(sums[i], sha256.Sum256(want[i][k]))
		}
	}
	var hits, misses, over atomic.Int64
	stop := time.Now().Add(1500 * time.Millisecond)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 0))
			b := make([]byte, size)
			for time.Now().Before(stop) {
				i, k := rng.IntN(packs), uint32(rng.ExpFloat64()*40)%chunks
				off := int64(k) * size
				ok, err := ps[i].ReadAt(b, off, k, 1)
				if err != nil {
					t.Errorf("ReadAt = %v", err)
					return
				}
				if ok {
					hits.Add(1)
					if !bytes.Equal(b, want[i][k]) {
						t.Errorf("pack %d chunk %d: wrong bytes", i, k)
						return
					}
					continue
				}
				misses.Add(1)
				if err := ps[i].Put(k, off, want[i][k], sums[i][k]); err != nil && !errors.Is(err, ErrFull) {
					t.Errorf("Put = %v", err)
				}
				if c.used.Load() > limit {
					over.Add(1)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d hits, %d misses", hits.Load(), misses.Load())
	if hits.Load() == 0 || misses.Load() < 2*limit/size {
		t.Errorf("%d hits, %d misses: nothing was evicted", hits.Load(), misses.Load())
	}
	// reserve adds before it looks, so a peek may see one Put of each goroutine too much.
	sum := int64(0)
	for _, p := range ps {
		sum += p.Stored()
		var st unix.Stat_t
		unix.Stat(filepath.Join(c.dir, packPath(p.name)), &st)
		if st.Blocks*512 > p.Stored()+64<<10 {
			t.Errorf("pack occupies %d, counted %d", st.Blocks*512, p.Stored())
		}
	}
	if u := c.Usage(); u.Used != sum || u.Used > limit {
		t.Errorf("Used = %d, sum of packs %d, limit %d", u.Used, sum, limit)
	}
}

// The least recently used go first, also when the uses were before a restart.
func TestRecency(t *testing.T) {
	dir := t.TempDir()
	const size = segSize
	c := open(t, dir, Options{Size: 32 * size})
	p, q := pack(t, c, "p"), pack(t, c, "q")
	for i := range uint32(14) {
		for name, pk := range map[string]*Pack{"p": p, "q": q} {
			if err := put(t, pk, name, i, int64(i)*size, size); err != nil {
				t.Fatal(err)
			}
		}
	}
	c.clock.Add(1)
	for i := range uint32(14) {
		check(t, p, "p", i, int64(i)*size, size)
	}
	c.Close()
	c = open(t, dir, Options{Size: 32 * size})
	p, q = pack(t, c, "p"), pack(t, c, "q")
	for i := uint32(14); i < 26; i++ {
		if err := put(t, q, "q", i, int64(i)*size, size); err != nil {
			t.Fatal(err)
		}
	}
	for i := range uint32(14) {
		if !check(t, p, "p", i, int64(i)*size, size) {
			t.Errorf("p's chunk %d is gone; it was used after all of q's first", i)
		}
	}
	if q.Has(0, 14) {
		t.Errorf("nothing of q was evicted")
	}
}

func TestPin(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{Size: 8 << 20})
	p := pack(t, c, "p")
	for i := range uint32(6) {
		if err := put(t, p, "p", i, int64(i)*segSize, segSize); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Pin(hashN("p"), true); err != nil {
		t.Fatal(err)
	}
	c.Close()
	c = open(t, dir, Options{Size: 8 << 20})
	p = pack(t, c, "p")
	q := pack(t, c, "q")
	for i := range uint32(30) {
		put(t, q, "q", i, int64(i)*segSize, segSize)
	}
	if !p.Has(0, 6) {
		t.Errorf("pinned chunks were evicted")
	}
	if err := put(t, q, "q", 99, 99*segSize, 9<<20); !errors.Is(err, ErrFull) {
		t.Errorf("Put larger than the budget = %v, want ErrFull", err)
	}
}

// A pass larger than the budget gives up and frees its room; visible chunks of
// others stay readable or are misses.
func TestStageFull(t *testing.T) {
	c := open(t, t.TempDir(), Options{Size: 4 << 20})
	p := pack(t, c, "p")
	var err error
	for i := range int64(10) {
		if err = p.Stage(i*segSize, make([]byte, segSize)); err != nil {
			break
		}
	}
	if !errors.Is(err, ErrFull) || p.Staged() {
		t.Errorf("Stage = %v, Staged = %v", err, p.Staged())
	}
	if _, err := p.ReadStaged(make([]byte, 1), 0); !errors.Is(err, ErrNotStaged) {
		t.Errorf("ReadStaged after giving up = %v", err)
	}
	if u := c.Usage(); u.Used != 0 {
		t.Errorf("Used = %d after giving up", u.Used)
	}
	if err := p.Stage(0, []byte("x")); !errors.Is(err, ErrFull) {
		t.Errorf("Stage after giving up = %v", err)
	}
	if err := p.Commit(func(uint32) (int64, int64, bool) { return 0, 1, true }, 1); err != nil || p.Has(0, 1) {
		t.Errorf("Commit after giving up = %v, Has = %v", err, p.Has(0, 1))
	}
	if err := p.Stage(0, []byte("x")); err != nil {
		t.Errorf("Stage of the next pass = %v", err)
	}
}

// A pass over a pack that has verified chunks: unverified bytes never show.
func TestStageOverVisible(t *testing.T) {
	c := open(t, t.TempDir(), Options{Size: 16 << 20})
	p := pack(t, c, "p")
	for i := range uint32(40) {
		if err := put(t, p, "p", i, int64(i)*100000, 100000); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Stage(5*100000, bytes.Repeat([]byte("evil"), 50000)); err != nil {
		t.Fatal(err)
	}
	for i := range uint32(40) {
		check(t, p, "p", i, int64(i)*100000, 100000)
	}
	if p.Has(5, 1) || !p.Has(39, 1) {
		t.Errorf("Has(5) = %v, Has(39) = %v", p.Has(5, 1), p.Has(39, 1))
	}
	if err := put(t, p, "p", 5, 500000, 100000); !errors.Is(err, ErrFull) {
		t.Errorf("Put while staging = %v, want ErrFull", err)
	}
	if err := p.Rollback(); err != nil {
		t.Fatal(err)
	}
	if err := put(t, p, "p", 5, 500000, 100000); err != nil || !check(t, p, "p", 5, 500000, 100000) {
		t.Errorf("Put after Rollback = %v", err)
	}
}

// mountTmpfs mounts a file system of size bytes; without the right to, the test is skipped.
func mountTmpfs(t *testing.T, size string) string {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestFullDisk(t *testing.T) {
	mnt := mountTmpfs(t, "4m")
	c := open(t, filepath.Join(mnt, "cache"), Options{Size: 1 << 30})
	p := pack(t, c, "p")
	for i := range uint32(200) {
		if err := put(t, p, "p", i, int64(i)*65536, 65536); err != nil {
			t.Fatalf("Put(%d) on a full disk with something to evict = %v", i, err)
		}
		if !check(t, p, "p", i, int64(i)*65536, 65536) {
			t.Fatalf("chunk %d is not here", i)
		}
	}
	// Now somebody else takes everything.
	if err := c.Pin(hashN("p"), true); err != nil {
		t.Fatal(err)
	}
	hog, _ := os.Create(filepath.Join(mnt, "hog"))
	for {
		if _, err := hog.Write(make([]byte, 4096)); err != nil {
			break
		}
	}
	hog.Close()
	if err := put(t, p, "p", 500, 500*65536, 65536); !errors.Is(err, ErrFull) {
		t.Errorf("Put on a full disk = %v, want ErrFull", err)
	}
	q := pack(t, c, "q") // needs a new inode and a block
	if err := put(t, q, "q", 0, 0, 100); !errors.Is(err, ErrFull) {
		t.Errorf("Put into a new pack on a full disk = %v, want ErrFull", err)
	}
	if err := q.Stage(0, make([]byte, 10000)); !errors.Is(err, ErrFull) {
		t.Errorf("Stage on a full disk = %v, want ErrFull", err)
	}
	if err := c.Install(Index, hashN("i"), func(f *os.File) error { _, err := f.Write(make([]byte, 5000)); return err }); !errors.Is(err, ErrFull) || c.Has(Index, hashN("i")) {
		t.Errorf("Install on a full disk = %v, want ErrFull", err)
	}
	if !check(t, p, "p", 199, 199*65536, 65536) {
		t.Errorf("a chunk is gone")
	}
	os.Remove(filepath.Join(mnt, "hog"))
	q2 := pack(t, c, "q")
	if err := put(t, q2, "q", 0, 0, 100); err != nil || !check(t, q, "q", 0, 0, 100) {
		t.Errorf("Put when the disk has room again = %v", err)
	}
}

// Every step may fail: the bytes are not kept, nothing is wrong, and it recovers.
func TestFailingSteps(t *testing.T) {
	for _, op := range []string{"write", "write-map", "pack-sync", "segs-sync", "bits-sync", "clear-sync", "punch", "wipe-map", "wipe-sync", "wipe-pack", "table-write"} {
		for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EIO, syscall.EOPNOTSUPP} {
			if errno == syscall.EOPNOTSUPP && op != "punch" {
				continue // a file system without holes
			}
			dir := t.TempDir()
			c := open(t, dir, Options{Size: 3 << 20, Log: func(string, ...any) {}})
			p := pack(t, c, "p")
			c.waitScan()
			var failing atomic.Bool
			c.evictMu.Lock()
			c.hook = func(at string) error {
				if failing.Load() && at == op {
					return errno
				}
				return nil
			}
			c.evictMu.Unlock()
			rng := rand.New(rand.NewPCG(7, 7))
			for step := range 120 {
				failing.Store(step%60 >= 20 && step%60 < 40)
				i := uint32(rng.IntN(100))
				if err := put(t, p, "p", i, int64(i)*50000, 50000); err != nil && !errors.Is(err, ErrFull) {
					t.Errorf("%s %v: Put = %v", op, errno, err)
				}
				check(t, p, "p", i, int64(i)*50000, 50000)
				switch step % 20 {
				case 5:
					p.flush(true)
				case 9:
					p.Drop(i, 1)
				case 13:
					c.Share([32]byte{byte(i)}, Location{hashN("p"), int64(i) * 50000, 50000, i, 1})
				case 17:
					p.Stage(0, chunkData("p", 0, 50000))
					p.Commit(func(uint32) (int64, int64, bool) { return 0, 50000, true }, 1)
				}
			}
			failing.Store(false)
			p.flush(true)
			if err := put(t, p, "p", 99, 99*50000, 50000); err != nil || !check(t, p, "p", 99, 99*50000, 50000) {
				t.Errorf("%s %v: Put afterwards = %v", op, errno, err)
			}
			c2 := open(t, copyDir(t, dir), Options{Size: 3 << 20, Log: func(string, ...any) {}})
			p2 := pack(t, c2, "p")
			for i := range uint32(100) {
				check(t, p2, "p", i, int64(i)*50000, 50000)
			}
			if u := c.Usage(); u.Used > u.Limit || u.Used != p.Stored() {
				t.Errorf("%s %v: %+v, stored %d", op, errno, u, p.Stored())
			}
		}
	}
}

// A read that began before an eviction and ended after it is not believed.
func TestReadAcrossEviction(t *testing.T) {
	c := open(t, t.TempDir(), Options{Size: 64 << 20})
	p := pack(t, c, "p")
	want := chunkData("p", 0, segSize)
	sum := sha256.Sum256(want)
	var done atomic.Bool
	var wg sync.WaitGroup
	defer wg.Wait()
	defer done.Store(true)
	hits := 0
	wg.Go(func() {
		for !done.Load() {
			p.Put(0, 0, want, sum)
			for wait := time.Now().Add(rand.N(400 * time.Microsecond)); time.Now().Before(wait); {
			}
			p.evictSegs([]victim{{p: p, seg: 0, used: ^uint32(0)}})
		}
	})
	b := make([]byte, segSize)
	for end := time.Now().Add(700 * time.Millisecond); time.Now().Before(end); {
		ok, err := p.ReadAt(b, 0, 0, 1)
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			hits++
			if !bytes.Equal(b, want) {
				t.Fatal("wrong bytes")
			}
		}
	}
	t.Logf("%d hits", hits)
}
