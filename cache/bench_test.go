package cache

import (
	"crypto/sha256"
	"testing"
)

func BenchmarkReadAt(b *testing.B) {
	c := open(b, b.TempDir(), Options{Size: 1 << 30})
	p := pack(b, c, "p")
	for i := range uint32(64) {
		put(b, p, "p", i, int64(i)<<18, 1<<18)
	}
	for name, n := range map[string]int{"4KiB": 4 << 10, "256KiB": 256 << 10} {
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			i := uint32(0)
			for b.Loop() {
				i = (i + 7) % 64
				if ok, err := p.ReadAt(buf, int64(i)<<18, i, 1); !ok || err != nil {
					b.Fatal(ok, err)
				}
			}
		})
	}
}

func BenchmarkPut(b *testing.B) {
	c := open(b, b.TempDir(), Options{Size: 256 << 20})
	p := pack(b, c, "p")
	data := chunkData("p", 0, 32<<10)
	sum := sha256.Sum256(data)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	i := uint32(0)
	for b.Loop() {
		if err := p.Put(i%(1<<20), int64(i%(1<<20))<<15, data, sum); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

func BenchmarkReadShared(b *testing.B) {
	c := open(b, b.TempDir(), Options{Size: 1 << 30})
	p := pack(b, c, "p")
	put(b, p, "p", 5, 1<<20, 4096)
	sum := sha256.Sum256(chunkData("p", 5, 4096))
	all := append(numbered(10000), Shared{sum, Location{hashN("p"), 1 << 20, 4096, 5, 1}})
	if err := c.ShareMany(all); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if ok, err := c.ReadShared(sum, buf, 0); !ok || err != nil {
			b.Fatal(ok, err)
		}
	}
}

func TestAllocations(t *testing.T) {
	c := open(t, t.TempDir(), Options{Size: 1 << 30})
	p := pack(t, c, "p")
	put(t, p, "p", 5, 1<<20, 4096)
	sum := sha256.Sum256(chunkData("p", 5, 4096))
	if err := c.Share(sum, Location{hashN("p"), 1 << 20, 4096, 5, 1}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	for name, fn := range map[string]func() (bool, error){
		"ReadAt":     func() (bool, error) { return p.ReadAt(buf, 1<<20, 5, 1) },
		"ReadShared": func() (bool, error) { return c.ReadShared(sum, buf, 0) },
	} {
		n := testing.AllocsPerRun(100, func() {
			if ok, err := fn(); !ok || err != nil {
				t.Fatal(ok, err)
			}
		})
		if n != 0 && !raceEnabled {
			t.Errorf("%s allocates %v times, want 0", name, n)
		}
	}
}
