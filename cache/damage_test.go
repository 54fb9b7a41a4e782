package cache

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	iofs "io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A pack of n chunks of 5000 bytes, closed.
func filled(t testing.TB, n uint32) (dir string) {
	t.Helper()
	dir = t.TempDir()
	c := open(t, dir, Options{Size: 64 << 20})
	p := pack(t, c, "a")
	for i := range n {
		if err := put(t, p, "a", i, int64(i)*5000, 5000); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// visible counts the chunks that are here and fails for wrong bytes.
func visible(t testing.TB, p *Pack, n uint32) (here int) {
	t.Helper()
	for i := range n {
		if check(t, p, "a", i, int64(i)*5000, 5000) {
			here++
		}
	}
	return here
}

func TestShortPack(t *testing.T) {
	const n = 100
	for _, tt := range []struct {
		name    string
		running bool
		size    int64
	}{
		{"before the start", false, 250000}, {"before the start, empty", false, 0}, {"before the start, one byte", false, 5000*n - 1},
		{"under a server", true, 250000}, {"under a server, empty", true, 0}, {"under a server, one byte", true, 5000*n - 1},
	} {
		for _, first := range []string{"read", "put"} {
			t.Run(tt.name+", then "+first, func(t *testing.T) {
				dir := filled(t, n)
				file := filepath.Join(dir, packPath(hashN("a").Hex))
				cut := func() {
					if err := os.Truncate(file, tt.size); err != nil {
						t.Fatal(err)
					}
				}
				if !tt.running {
					cut()
				}
				c := open(t, dir, Options{Size: 64 << 20})
				p := pack(t, c, "a")
				if tt.running {
					if got := visible(t, p, n); got != n {
						t.Fatalf("%d chunks here, want %d", got, n)
					}
					cut()
				}
				if first == "put" {
					err := put(t, p, "a", n, 5000*n, 5000)
					if tt.running && !errors.Is(err, ErrFull) {
						t.Errorf("Put into a short pack = %v, want ErrFull", err)
					}
				}
				visible(t, p, n)
				check(t, p, "a", n-1, 5000*(n-1), 5000)
				if p.Has(n-1, 1) {
					t.Errorf("a chunk that is gone is still here")
				}
				for i := range uint32(n) {
					if err := put(t, p, "a", i, int64(i)*5000, 5000); err != nil {
						t.Fatal(err)
					}
				}
				if got := visible(t, p, n); got != n {
					t.Errorf("%d chunks here after the repair, want %d", got, n)
				}
			})
		}
	}
}

// Whatever single place of the map is damaged: no wrong bytes, and it works again.
func TestDamagedMap(t *testing.T) {
	const n = 200
	dir := filled(t, n)
	name := mapPath(hashN("a").Hex)
	good, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	try := func(what string, data []byte) {
		d := copyDir(t, dir)
		if err := os.WriteFile(filepath.Join(d, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
		c := open(t, d, Options{Size: 64 << 20, Log: func(string, ...any) {}})
		defer c.Close()
		p := pack(t, c, "a")
		visible(t, p, n)
		if got := c.Usage().Used; got > 5000*n+blockSize {
			t.Errorf("%s: Used = %d", what, got)
		}
		if err := put(t, p, "a", 3, 15000, 5000); err != nil || !check(t, p, "a", 3, 15000, 5000) {
			t.Errorf("%s: Put = %v", what, err)
		}
		if p.Close(); c.Close() != nil {
			t.Errorf("%s: Close failed", what)
		}
	}
	for at := 0; at < len(good); at += 37 {
		bad := bytes.Clone(good)
		bad[at] ^= 1 << (at % 8)
		try("flipped bit", bad)
	}
	for _, size := range []int{0, 1, 511, 512, 513, 1024, len(good) - 1} {
		try("truncated", good[:min(size, len(good))])
	}
	try("longer", append(bytes.Clone(good), make([]byte, 700)...))
	try("twice", append(bytes.Clone(good), good...))
}

func TestDropAndLayout(t *testing.T) {
	dir := filled(t, 50)
	c := open(t, dir, Options{Size: 64 << 20})
	p := pack(t, c, "a")
	if err := p.Drop(10, 5); err != nil {
		t.Fatal(err)
	}
	if got := visible(t, p, 50); got != 45 || p.Has(12, 1) {
		t.Errorf("%d chunks after Drop, want 45", got)
	}
	c2 := open(t, copyDir(t, dir), Options{Size: 64 << 20}) // Drop is durable
	if got := visible(t, pack(t, c2, "a"), 50); got != 45 {
		t.Errorf("%d chunks after Drop and a crash, want 45", got)
	}
	if err := p.SetLayout([32]byte{}); err != nil || visible(t, p, 50) != 45 {
		t.Errorf("SetLayout(same) = %v", err)
	}
	if err := p.SetLayout([32]byte{1}); err != nil || visible(t, p, 50) != 0 || c.Usage().Used != 0 {
		t.Errorf("SetLayout(other) = %v, %d chunks", err, visible(t, p, 50))
	}
}

// What a Put of the old layout writes late must not fall on the new one's bytes.
func TestSetLayoutWaits(t *testing.T) {
	c := open(t, t.TempDir(), Options{Size: 64 << 20})
	p := pack(t, c, "a")
	c.waitScan()
	writing, goOn := make(chan bool), make(chan bool)
	c.hook = func(op string) error {
		if op == "write" {
			writing <- true
			<-goOn
		}
		return nil
	}
	putDone, laidOut := make(chan error, 1), make(chan error, 1)
	data := chunkData("a", 0, 5000)
	go func() { putDone <- p.Put(0, 0, data, sha256.Sum256(data)) }()
	<-writing
	go func() { laidOut <- p.SetLayout([32]byte{1}) }()
	select {
	case err := <-laidOut:
		t.Fatalf("SetLayout = %v while a Put was writing", err)
	case <-time.After(50 * time.Millisecond):
	}
	goOn <- true
	if err := <-putDone; err != nil {
		t.Errorf("Put = %v", err)
	}
	if err := <-laidOut; err != nil || p.Has(0, 1) || p.Stored() != 0 {
		t.Errorf("SetLayout = %v, Has = %v, Stored = %d", err, p.Has(0, 1), p.Stored())
	}
	c.hook = nil
}

func TestRemovePack(t *testing.T) {
	dir := filled(t, 50)
	c := open(t, dir, Options{Size: 64 << 20})
	p := pack(t, c, "a")
	if err := c.RemovePack(hashN("a")); !errors.Is(err, ErrInUse) {
		t.Errorf("RemovePack(open) = %v, want ErrInUse", err)
	}
	p.Close()
	if err := c.RemovePack(hashN("a")); err != nil {
		t.Fatal(err)
	}
	if got := c.Usage().Used; got != 0 || len(c.Packs()) != 0 {
		t.Errorf("Used = %d, Packs = %v", got, c.Packs())
	}
	if names, _ := c.readNames(packDir); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
	p = pack(t, c, "a")
	if got := visible(t, p, 50); got != 0 {
		t.Errorf("%d chunks after RemovePack", got)
	}
	if err := put(t, p, "a", 0, 0, 5000); err != nil || !check(t, p, "a", 0, 0, 5000) {
		t.Errorf("Put after RemovePack = %v", err)
	}
	p.Close() // the cleanup closes it again; harmless at the end of a test
	c.mu.Lock()
	p.handles++
	c.mu.Unlock()
}

func TestBadArguments(t *testing.T) {
	c := open(t, t.TempDir(), Options{Size: 64 << 20})
	p := pack(t, c, "a")
	data := []byte("x")
	sum := sha256.Sum256(data)
	for _, tt := range []struct {
		chunk uint32
		off   int64
		data  []byte
	}{
		{maxChunks, 0, data}, {0, -1, data}, {0, maxPack, data}, {0, 1<<63 - 1, data}, {0, 0, nil},
	} {
		if err := p.Put(tt.chunk, tt.off, tt.data, sum); !errors.Is(err, iofs.ErrInvalid) {
			t.Errorf("Put(%d, %d) = %v, want ErrInvalid", tt.chunk, tt.off, err)
		}
	}
	if _, err := p.ReadAt(make([]byte, 1), -1, 0, 1); !errors.Is(err, iofs.ErrInvalid) {
		t.Errorf("ReadAt(-1) = %v", err)
	}
	if ok, err := p.ReadAt(make([]byte, 1), 0, 1<<32-1, 1<<32-1); ok || err != nil {
		t.Errorf("ReadAt(many chunks) = %v, %v", ok, err)
	}
	if err := p.Put(maxChunks-1, maxPack-1, data, sum); err != nil {
		t.Errorf("Put at the ceilings = %v", err)
	}
	if c.Usage().Used != blockSize {
		t.Errorf("Used = %d", c.Usage().Used)
	}
}

func FuzzMap(f *testing.F) {
	dir := filled(f, 200)
	good, err := os.ReadFile(filepath.Join(dir, mapPath(hashN("a").Hex)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, true)
	f.Add(good[:700], false)
	k, _ := keyOf(hashN("a"))
	f.Fuzz(func(t *testing.T, data []byte, seal bool) {
		if seal { // so that what is behind the checksums is reached
			for at := 0; at+slotSize <= len(data); at += slotSize {
				s := (*slot)(data[at:])
				s.seal(s.kind(), s.index(), s.epoch())
			}
		}
		c := &Cache{}
		p := newPack(c, k)
		if err := p.decodeMap(bytes.NewReader(data)); err != nil && err != io.EOF && !errors.Is(err, errDamaged) {
			t.Fatalf("decodeMap = %v", err)
		}
		p.eachSeg(func(i int64, s *segment) {
			p.clearBits(s.lo, s.hi, func(int) {})
			if s.lo < s.hi && p.present(s.lo, s.hi-s.lo) {
				t.Fatalf("chunks of a cleared segment are here")
			}
		})
	})
}

func FuzzTable(f *testing.F) {
	var b bucket
	b.add(&record{digest: [32]byte{1}, place: place{epoch: 1, size: 1, chunks: 1}})
	b.seal()
	f.Add(b[:], uint16(3), true)
	f.Fuzz(func(t *testing.T, data []byte, n uint16, seal bool) {
		var h, b bucket
		copy(h[8:], tableMagic)
		h[16], h[17] = minTableBits, tableVersion
		h.seal()
		copy(b[:], data)
		if seal {
			b[4], b[5] = byte(n), byte(n>>8)
			b.seal()
		}
		file, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		all := append(h[:], b[:]...)
		file.Write(all[:min(len(all), 1+rand.IntN(len(all)))])
		bits, err := readTableHeader(file)
		if err != nil {
			return
		}
		cur := &tableFile{file, bits}
		var got bucket
		if err := cur.read(1, &got); err != nil {
			t.Fatal(err)
		}
		var r place
		for i := range got.len() {
			if got.get(i, &r) && !validRange(r.off, r.size) {
				t.Fatalf("bad place %+v", r)
			}
		}
		got.add(&record{digest: [32]byte{2}})
	})
}
