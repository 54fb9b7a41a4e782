package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// hashN is a digest for tests, one for each name.
func hashN(name string) v1.Hash {
	return key(sha256.Sum256([]byte(name))).hash()
}

// chunkData is n bytes that only this chunk of this pack has.
func chunkData(pack string, chunk uint32, n int) []byte {
	b := make([]byte, n)
	seed := sha256.Sum256(fmt.Appendf(nil, "%s/%d", pack, chunk))
	for i := 0; i < n; i += 8 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], binary.LittleEndian.Uint64(seed[:])*uint64(i+1)+uint64(i))
		copy(b[i:], w[:])
	}
	return b
}

func open(t testing.TB, dir string, o Options) *Cache {
	t.Helper()
	if o.Log == nil {
		o.Log = func(msg string, args ...any) { t.Log(append([]any{msg}, args...)...) }
	}
	if o.FlushEvery == 0 {
		o.FlushEvery = time.Hour
	}
	c, err := Open(dir, o)
	if err != nil {
		t.Fatalf("Open(%q) = %v", dir, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func pack(t testing.TB, c *Cache, name string) *Pack {
	t.Helper()
	p, err := c.Pack(hashN(name))
	if err != nil {
		t.Fatalf("Pack(%q) = %v", name, err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func put(t testing.TB, p *Pack, name string, chunk uint32, off int64, n int) error {
	t.Helper()
	data := chunkData(name, chunk, n)
	return p.Put(chunk, off, data, sha256.Sum256(data))
}

// check reads a chunk and reports whether it is here; wrong bytes are fatal.
func check(t testing.TB, p *Pack, name string, chunk uint32, off int64, n int) bool {
	t.Helper()
	b := make([]byte, n)
	ok, err := p.ReadAt(b, off, chunk, 1)
	if err != nil {
		t.Fatalf("ReadAt(chunk %d) = %v", chunk, err)
	}
	if ok && !bytes.Equal(b, chunkData(name, chunk, n)) {
		t.Fatalf("ReadAt(chunk %d) = wrong bytes", chunk)
	}
	return ok
}

func TestPutRead(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{Size: 64 << 20})
	p := pack(t, c, "a")
	for i := range uint32(100) {
		if err := put(t, p, "a", i, int64(i)*30000, 30000); err != nil {
			t.Fatal(err)
		}
	}
	if !p.Has(0, 100) || p.Has(0, 101) || p.Has(100, 1) {
		t.Errorf("Has is wrong")
	}
	for i := range uint32(100) {
		if !check(t, p, "a", i, int64(i)*30000, 30000) {
			t.Errorf("chunk %d is a miss", i)
		}
	}
	var b [100]byte
	ok, err := p.ReadAt(b[:], 29950, 0, 2)
	want := append(chunkData("a", 0, 30000)[29950:], chunkData("a", 1, 30000)[:50]...)
	if !ok || err != nil || !bytes.Equal(b[:], want) {
		t.Errorf("ReadAt across chunks = %v, %v", ok, err)
	}
	if got, want := p.Stored(), int64((100*30000+4095)/4096*4096); got != want {
		t.Errorf("Stored() = %d, want %d", got, want)
	}
	if err := p.Put(7, 0, []byte("x"), [32]byte{}); !errors.Is(err, ErrDigest) {
		t.Errorf("Put(bad digest) = %v, want ErrDigest", err)
	}
	used := c.Usage().Used
	p.Close()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c = open(t, dir, Options{Size: 64 << 20})
	p = pack(t, c, "a")
	for i := range uint32(100) {
		if !check(t, p, "a", i, int64(i)*30000, 30000) {
			t.Errorf("chunk %d is a miss after a restart", i)
		}
	}
	if got := c.Usage().Used; got != used {
		t.Errorf("Usage().Used after a restart = %d, want %d", got, used)
	}
}

func TestStage(t *testing.T) {
	for _, how := range []string{"commit", "rollback", "crash"} {
		t.Run(how, func(t *testing.T) {
			dir := t.TempDir()
			c := open(t, dir, Options{Size: 64 << 20})
			p := pack(t, c, "a")
			const n, size = 300, 10000
			at := func(i uint32) int64 { return int64(i) * size }
			for i := range uint32(n) {
				if err := p.Stage(at(i), chunkData("a", i, size)); err != nil {
					t.Fatal(err)
				}
			}
			if p.Has(0, 1) || !p.Staged() {
				t.Fatal("staged bytes are visible")
			}
			b := make([]byte, size)
			if k, err := p.ReadStaged(b, at(7)); k != size || err != nil || !bytes.Equal(b, chunkData("a", 7, size)) {
				t.Fatalf("ReadStaged = %d, %v", k, err)
			}
			p.DropStaged(at(100), at(50))
			if got, max := p.Stored(), at(n)-at(50)+2*blockSize; got > max {
				t.Errorf("Stored() after DropStaged = %d, want at most %d", got, max)
			}
			switch how {
			case "commit":
				err := p.Commit(func(i uint32) (int64, int64, bool) { return at(i), size, i < 100 || i >= 150 }, n)
				if err != nil {
					t.Fatal(err)
				}
			case "rollback":
				if err := p.Rollback(); err != nil {
					t.Fatal(err)
				}
				if p.Stored() != 0 || c.Usage().Used != 0 {
					t.Errorf("Stored() = %d, Used = %d after Rollback", p.Stored(), c.Usage().Used)
				}
			}
			c2 := open(t, copyDir(t, dir), Options{Size: 64 << 20})
			p2 := pack(t, c2, "a")
			for i := range uint32(n) {
				want := how == "commit" && (i < 100 || i >= 150)
				if got := check(t, p2, "a", i, at(i), size); got != want {
					t.Fatalf("chunk %d here = %v, want %v", i, got, want)
				}
			}
			if how != "commit" {
				if got := c2.Usage().Used; got != 0 {
					t.Errorf("after a restart Used = %d, want 0", got)
				}
			}
		})
	}
}

// copyDir copies a cache directory as it is now, as kill -9 would leave it.
func copyDir(t testing.TB, dir string) string {
	t.Helper()
	to := t.TempDir()
	err := filepath.WalkDir(dir, func(path string, d iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		in, err := os.Open(path)
		if err != nil {
			return err
		}
		defer in.Close()
		out, err := os.Create(filepath.Join(to, rel))
		if err != nil {
			return err
		}
		defer out.Close()
		return copySparse(out, in)
	})
	if err != nil {
		t.Fatal(err)
	}
	return to
}

func copySparse(out, in *os.File) error {
	st, err := in.Stat()
	if err != nil {
		return err
	}
	buf, zero := make([]byte, blockSize), make([]byte, blockSize)
	for off := int64(0); off < st.Size(); off += blockSize {
		n, err := in.ReadAt(buf, off)
		if err != nil && err != io.EOF {
			return err
		}
		if bytes.Equal(buf[:n], zero[:n]) {
			continue
		}
		if _, err := out.WriteAt(buf[:n], off); err != nil {
			return err
		}
	}
	return out.Truncate(st.Size())
}

// Packs without users give their descriptors back, and are all still there.
func TestIdlePacks(t *testing.T) {
	c := open(t, t.TempDir(), Options{})
	if u := c.Usage(); u.Limit <= 0 || u.Free <= 0 {
		t.Errorf("Usage() with the default size = %+v", u)
	}
	fds := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	c.maxIdle = minIdle
	before := fds()
	for round := range 2 {
		for i := range 3 * minIdle {
			name := fmt.Sprint("pack", i)
			p, err := c.Pack(hashN(name))
			if err != nil {
				t.Fatal(err)
			}
			if round == 0 {
				if err := put(t, p, name, 0, 0, 100); err != nil {
					t.Fatal(err)
				}
			} else if !check(t, p, name, 0, 0, 100) {
				t.Errorf("%s: a miss", name)
			}
			defer p.Close() // a handle holds no descriptors
		}
	}
	if got := fds() - before; got > 2*minIdle {
		t.Errorf("%d descriptors are open, want at most %d", got, 2*minIdle)
	}
	if err := c.Sync(); err != nil {
		t.Fatal(err)
	}
}

// Files are closed beside whoever uses a pack, when others need the descriptors,
// also in the middle of a streaming pass.
func TestFilesClosedBeside(t *testing.T) {
	c := open(t, t.TempDir(), Options{Size: 64 << 20})
	c.mu.Lock()
	c.maxIdle = 1
	c.mu.Unlock()
	const size = 9000
	var wg sync.WaitGroup
	for _, name := range []string{"a", "b", "c"} {
		kept, passed := pack(t, c, name), pack(t, c, name+" streamed")
		wg.Go(func() {
			for i := range uint32(100) {
				if err := put(t, kept, name, i, int64(i)*size, size); err != nil {
					t.Errorf("Put %d = %v", i, err)
				}
				if err := passed.Stage(int64(i)*size, chunkData(name, i, size)); err != nil {
					t.Errorf("Stage %d = %v", i, err)
				}
			}
			all := func(n uint32) (off, n64 int64, here bool) { return int64(n) * size, size, true }
			if err := passed.Commit(all, 100); err != nil {
				t.Errorf("Commit = %v", err)
			}
			if !passed.Has(0, 100) || !kept.Has(0, 100) {
				t.Errorf("%s: not all is here", name)
			}
		})
		wg.Go(func() {
			got := make([]byte, size)
			for i := range uint32(1000) {
				if i %= 100; kept.Has(i, 1) && !check(t, kept, name, i, int64(i)*size, size) {
					t.Errorf("%s: a miss of %d", name, i)
				}
				if ok, err := passed.ReadAt(got, 0, 0, 1); err != nil || ok && !bytes.Equal(got, chunkData(name, 0, size)) {
					t.Errorf("%s: ReadAt of a pass = %v, %v", name, ok, err)
				}
			}
		})
	}
	wg.Wait()
}
