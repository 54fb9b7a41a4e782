package integration

import (
	"bytes"
	"io"
	"os"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Budgets, in bytes that left the registry and requests for a layer's blob.
const (
	firstFileBytes    = 1_500_000
	firstFileRequests = 3
	middleBytes       = 5_000_000
)

// TestBytesFirstFile reads one small file of an image of 170 MB in a lazy format.
func TestBytesFirstFile(t *testing.T) {
	for _, format := range formats {
		if !hasTOC(format) {
			continue
		}
		t.Run(format, func(t *testing.T) {
			r := startRegistry(t)
			path := r.push(t, "plain", format)
			m := startMount(t)
			if _, err := os.ReadFile(m.path(path, "etc/os-release")); err != nil {
				t.Fatal(err)
			}
			n, sum, blobs := r.traffic()
			t.Logf("%d requests, %d bytes", n, sum)
			if sum >= firstFileBytes {
				t.Errorf("cat etc/os-release: %d bytes, want under %d\n%s", sum, firstFileBytes, r.describe())
			}
			for _, l := range images["plain"] {
				b := openCorpus(t).layer(t, l, format)
				if got := blobs[b.Hash.String()]; got > firstFileRequests {
					t.Errorf("cat etc/os-release: %d requests for layer %s, want at most %d\n%s", got, l, firstFileRequests, r.describe())
				}
			}
		})
	}
}

// TestBytesMiddle reads 4 KiB in the middle of a file of 200 MB in a lazy format.
func TestBytesMiddle(t *testing.T) {
	for _, format := range formats {
		if !hasTOC(format) {
			continue
		}
		t.Run(format, func(t *testing.T) {
			r := startRegistry(t)
			path := r.push(t, "big", format)
			m := startMount(t)
			const off = bigSize/2 + 12345
			got := make([]byte, 4096)
			f, err := os.Open(m.path(path, "srv/big.bin"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.ReadAt(got, off); err != nil {
				t.Fatal(err)
			}
			if want := bigAt(t, off, len(got)); !bytes.Equal(got, want) {
				t.Error("wrong bytes in the middle of srv/big.bin")
			}
			settle(r)
			n, sum, _ := r.traffic()
			t.Logf("%d requests, %d bytes", n, sum)
			if sum >= middleBytes {
				t.Errorf("4 KiB in the middle: %d bytes, want under %d\n%s", sum, middleBytes, r.describe())
			}
		})
	}
}

// bigAt is a part of srv/big.bin.
func bigAt(t testing.TB, off int64, n int) []byte {
	t.Helper()
	r := bigContent()
	if _, err := io.CopyN(io.Discard, r, off); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		t.Fatal(err)
	}
	return b
}

// settle waits until a second has passed without traffic, so that what a read
// has set going is counted.
func settle(r *registry) {
	for last := int64(-1); ; time.Sleep(time.Second) {
		_, sum, _ := r.traffic()
		if sum == last {
			return
		}
		last = sum
	}
}

// TestProgressive reads a file that stands early in a gzip layer of 200 MB while
// the registry holds nine tenths of the layer back. Afterwards everything is
// here: after a restart all is read while the registry is stopped.
func TestProgressive(t *testing.T) {
	r := startRegistry(t)
	path := r.push(t, "big", "gzip")
	layer := openCorpus(t).layer(t, "big", "gzip")
	free := r.stallAfter(t, layer.Hash, layer.Length/10)
	m := startMount(t)
	within(t, 30*time.Second, "srv/early, nine tenths of its layer held back", func() error {
		data, err := os.ReadFile(m.path(path, "srv/early"))
		if string(data) != "early\n" && err == nil {
			t.Errorf("srv/early = %q, want %q", data, "early\n")
		}
		return err
	})
	within(t, 30*time.Second, "the start of srv/big.bin, nine tenths of it held back", func() error {
		f, err := os.Open(m.path(path, "srv/big.bin"))
		if err != nil {
			return err
		}
		defer f.Close()
		got := make([]byte, 64<<10)
		if _, err := f.ReadAt(got, 1<<20); err != nil {
			return err
		}
		if !bytes.Equal(got, bigAt(t, 1<<20, len(got))) {
			t.Error("wrong bytes at the start of srv/big.bin")
		}
		return nil
	})
	if n := blobBytes(r, layer.Hash); n > layer.Length/10 {
		t.Errorf("%d bytes of the layer have passed, want at most a tenth of %d", n, layer.Length)
	}
	free()
	within(t, 3*time.Minute, "reading everything", func() error {
		swallow(t, "tar", "-C", m.path(path), "-c", ".")
		return nil
	})
	if n := blobBytes(r, layer.Hash); n > layer.Length {
		t.Errorf("%d bytes of a layer of %d have passed, want each byte once\n%s", n, layer.Length, r.describe())
	}
	r.stop()
	m.restart()
	diffs, err := oracle(t, "big").compare(m.path(path), comparison{mtimeFree: implicitDirs(t, "big")})
	if err != nil {
		t.Fatal(err)
	}
	reportDiffs(t, diffs)
	if n := m.stats().Registry.Requests; n != 0 {
		t.Errorf("%d requests after a restart with everything here, want 0", n)
	}
}

// blobBytes counts the bytes of one blob that have left the registry.
func blobBytes(r *registry, digest v1.Hash) (n int64) {
	for _, q := range r.log() {
		if d, ok := q.blob(); ok && d == digest.String() {
			n += q.bytes
		}
	}
	return n
}

// TestRestart reads everything once, stops the registry, and mounts again.
func TestRestart(t *testing.T) {
	for _, format := range formats {
		t.Run(format, func(t *testing.T) {
			r := startRegistry(t)
			path := r.push(t, "python", format)
			m := startMount(t)
			swallow(t, "tar", "-C", m.path(path), "-c", ".")
			r.stop()
			m.restart()
			diffs, err := oracle(t, "python").compare(m.path(path), comparison{wholeSeconds: hasTOC(format), mtimeFree: implicitDirs(t, "python")})
			if err != nil {
				t.Fatal(err)
			}
			reportDiffs(t, diffs)
			if n := m.stats().Registry.Requests; n != 0 {
				t.Errorf("%d requests after a restart, want 0", n)
			}
		})
	}
}

// TestCacheBound reads more than the cache may hold: every byte is right, and the
// cache stays within its limit.
func TestCacheBound(t *testing.T) {
	const limit, slack = 48 << 20, 16 << 20
	r := startRegistry(t)
	path := r.push(t, "big", "estargz")
	m := startMount(t, "--cache-size", "48MiB")
	for range 2 {
		sum, err := checksum(m.path(path, "srv/big.bin"), make([]byte, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		if want := oracle(t, "big").sums["srv/big.bin"]; sum != want {
			t.Errorf("srv/big.bin has sha256 %x, want %x", sum, want)
		}
	}
	if n := diskUsage(t, m.cache); n > limit+slack {
		t.Errorf("the cache takes %d bytes on the disk, want at most %d and indexes", n, limit)
	}
}

// diskUsage is the space that a tree takes on its disk.
func diskUsage(t testing.TB, root string) (n int64) {
	t.Helper()
	s, err := takeSnapshot(root, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range s {
		n += i.stat.Blocks * 512
	}
	return n
}
