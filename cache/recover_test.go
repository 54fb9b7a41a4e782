package cache

import (
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

// A layout that could not be set is set later, not forgotten: else what is put
// then would be taken for chunks of the old one.
func TestSetLayoutFails(t *testing.T) {
	dir := filled(t, 50)
	c := open(t, dir, Options{Size: 64 << 20})
	p := pack(t, c, "a")
	bad := errors.New("disk on fire")
	for _, at := range []string{"wipe-map", "wipe-sync", "wipe-pack"} {
		c.hook = func(op string) error {
			if op == at {
				return bad
			}
			return nil
		}
		if err := p.SetLayout([32]byte{at[5], at[6]}); err == nil {
			t.Fatalf("SetLayout with a failing %s = nil", at)
		}
		c.hook = nil
	}
	if err := p.SetLayout([32]byte{7}); err != nil {
		t.Fatal(err)
	}
	c.hook = func(op string) error { return bad }
	if err := p.SetLayout([32]byte{8}); err == nil {
		t.Fatal("SetLayout = nil")
	}
	c.hook = nil
	if err := c.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := put(t, p, "a", 3, 0, 5000); err != nil {
		t.Fatal(err)
	}
	if err := p.SetLayout([32]byte{7}); err != nil || p.Has(3, 1) {
		t.Errorf("a chunk of one layout is one of another: %v", err)
	}
}

// A pack whose files could not be opened when the layout was told has it when
// they can be.
func TestSetLayoutUnopened(t *testing.T) {
	dir := filled(t, 50)
	k, _ := keyOf(hashN("a"))
	m, away := dir+"/"+mapPath(k.hex()), dir+"/away"
	if err := errors.Join(os.Rename(m, away), os.Mkdir(m, 0o700)); err != nil {
		t.Fatal(err)
	}
	c := open(t, dir, Options{Size: 64 << 20})
	c.waitScan()
	p := pack(t, c, "a")
	if err := p.SetLayout([32]byte{1}); err == nil {
		t.Error("SetLayout without files = nil")
	}
	if err := errors.Join(os.Remove(m), os.Rename(away, m)); err != nil {
		t.Fatal(err)
	}
	pack(t, c, "a")
	if n := visible(t, p, 50); n != 0 {
		t.Errorf("%d chunks of the old layout can be seen", n)
	}
	if err := put(t, p, "a", 0, 0, 5000); err != nil {
		t.Errorf("Put = %v", err)
	}
}

// Who still knows a removed pack has nothing to do with one made anew.
func TestRemovedPackIsAnother(t *testing.T) {
	c := open(t, filled(t, 50), Options{Size: 64 << 20})
	k, _ := keyOf(hashN("a"))
	old := c.packs[k]
	if err := c.RemovePack(hashN("a")); err != nil {
		t.Fatal(err)
	}
	p := pack(t, c, "a")
	if err := put(t, p, "a", 0, 0, 5000); err != nil {
		t.Fatal(err)
	}
	if err := c.acquire(old); err == nil {
		old.flush(true)
		c.release(old)
		t.Error("the removed pack opened the files of the new one")
	}
	if !check(t, p, "a", 0, 0, 5000) {
		t.Error("the removed pack emptied the new one")
	}
}

// A panic in one of our goroutines costs one round of it.
func TestGoroutinesRecover(t *testing.T) {
	for _, at := range []string{"pack-sync", "punch", "clear-sync"} {
		t.Run(at, func(t *testing.T) {
			c := open(t, t.TempDir(), Options{Size: 8 << 20, FlushEvery: 2 * time.Millisecond})
			c.waitScan()
			var panics atomic.Int32
			c.hook = func(op string) error {
				if op == at && panics.Add(1) == 1 {
					panic("a bug")
				}
				return nil
			}
			p := pack(t, c, "a")
			done := make(chan bool)
			go func() {
				defer close(done)
				for i := range uint32(100) { // some evict in this goroutine
					func() {
						defer func() { recover() }()
						put(t, p, "a", i, int64(i)<<20, 1<<20)
					}()
				}
			}()
			select {
			case <-done:
			case <-time.After(20 * time.Second):
				t.Fatal("Put waits for ever")
			}
			for end := time.Now().Add(10 * time.Second); p.dirty.Load() || panics.Load() < 2; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("no flush and no eviction after the panic: %d", panics.Load())
				}
			}
		})
	}
}
