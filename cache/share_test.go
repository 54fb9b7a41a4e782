package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	iofs "io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestShared(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{Size: 16 << 20})
	p := pack(t, c, "p")
	content := append(chunkData("p", 3, 40000), chunkData("p", 4, 30000)...)
	digest := sha256.Sum256(content)
	l := Location{Pack: hashN("p"), Off: 120000, Size: 70000, FirstChunk: 3, NChunks: 2}
	if err := c.Share(digest, l); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 70000)
	if ok, err := c.ReadShared(digest, b, 0); ok || err != nil {
		t.Errorf("ReadShared before the bytes are here = %v, %v", ok, err)
	}
	if err := put(t, p, "p", 3, 120000, 40000); err != nil {
		t.Fatal(err)
	}
	if ok, _ := c.ReadShared(digest, b[:10], 0); ok {
		t.Errorf("ReadShared of half a content is ok")
	}
	if err := put(t, p, "p", 4, 160000, 30000); err != nil {
		t.Fatal(err)
	}
	if ok, err := p.VerifyContent(digest, l); !ok || err != nil {
		t.Errorf("VerifyContent = %v, %v", ok, err)
	}
	if ok, err := p.VerifyContent([32]byte{1}, l); ok || err != nil {
		t.Errorf("VerifyContent(other digest) = %v, %v", ok, err)
	}
	for range 2 {
		if ok, err := c.ReadShared(digest, b, 0); !ok || err != nil || !bytes.Equal(b, content) {
			t.Errorf("ReadShared = %v, %v", ok, err)
		}
		if ok, _ := c.ReadShared(digest, b[:100], 69900); !ok || !bytes.Equal(b[:100], content[69900:]) {
			t.Errorf("ReadShared(end) = %v", ok)
		}
		if ok, _ := c.ReadShared(digest, b[:100], 69901); ok {
			t.Errorf("ReadShared past the end is ok")
		}
		if got, ok := c.Find(digest); !ok || got != l {
			t.Errorf("Find = %+v, %v, want %+v", got, ok, l)
		}
		c.Close()
		c = open(t, dir, Options{Size: 16 << 20})
		p = pack(t, c, "p")
	}
	p.reset()
	if _, ok := c.Find(digest); ok {
		t.Errorf("Find after the pack was emptied is ok")
	}
	for _, bad := range []Location{{}, {Pack: hashN("p"), Size: -1, NChunks: 1}, {Pack: hashN("p"), Size: 1}, {Pack: hashN("p"), Off: 1 << 62, Size: 1 << 62, NChunks: 1}} {
		if err := c.Share(digest, bad); !errors.Is(err, iofs.ErrInvalid) {
			t.Errorf("Share(%+v) = %v, want ErrInvalid", bad, err)
		}
	}
}

// A content is found in a pack that nobody has opened since the start, also
// before the scan came to it.
func TestSharedAfterRestart(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{Size: 16 << 20})
	p := pack(t, c, "p")
	put(t, p, "p", 0, 0, 1000)
	sum := sha256.Sum256(chunkData("p", 0, 1000))
	if err := c.Share(sum, Location{hashN("p"), 0, 1000, 0, 1}); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		c = open(t, dir, Options{Size: 16 << 20})
		if ok, err := c.ReadShared(sum, make([]byte, 1000), 0); !ok || err != nil {
			t.Fatalf("ReadShared after a restart = %v, %v", ok, err)
		}
	}
}

func numbered(n int) []Shared {
	all := make([]Shared, n)
	for i := range all {
		all[i].Digest = sha256.Sum256(binary.LittleEndian.AppendUint32(nil, uint32(i)))
		all[i].Location = Location{Pack: hashN("p"), Off: int64(i) * 100, Size: 100, FirstChunk: uint32(i), NChunks: 1}
	}
	return all
}

func TestTableGrows(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{Size: 16 << 20})
	pack(t, c, "p")
	const n = 20000
	for at := 0; at < n; at += 2500 {
		if err := c.ShareMany(numbered(n)[at : at+2500]); err != nil {
			t.Fatal(err)
		}
	}
	found := func() (k int) {
		for _, s := range numbered(n) {
			if l, ok := c.Find(s.Digest); ok && l == s.Location {
				k++
			} else if ok {
				t.Fatalf("Find = %+v, want %+v", l, s.Location)
			}
		}
		return k
	}
	if got := found(); got < n*99/100 {
		t.Errorf("found %d of %d", got, n)
	}
	c.Close()
	file := filepath.Join(dir, tableName)
	st, _ := os.Stat(file)
	if max := int64(n * recordSize * 4); st.Size() > max {
		t.Errorf("table has %d bytes, want at most %d", st.Size(), max)
	}
	// Damage: a flipped bit costs its bucket, a damaged header or a short file the rest.
	data, _ := os.ReadFile(file)
	data[5*bucketSize+100] ^= 4
	os.WriteFile(file, data[:len(data)/2+77], 0o600)
	c = open(t, dir, Options{Size: 16 << 20})
	if got := found(); got < n*2/5 || got > n*3/5 {
		t.Errorf("found %d of %d in half a table", got, n)
	}
	c.Close()
	data[9] ^= 1
	os.WriteFile(file, data, 0o600)
	c = open(t, dir, Options{Size: 16 << 20})
	if got := found(); got != 0 {
		t.Errorf("found %d in a table with a damaged header", got)
	}
}

// Contents whose digests were chosen to fall into one bucket do not blow the table up.
func TestTableFlood(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{Size: 16 << 20})
	pack(t, c, "p")
	all := numbered(5000)
	for i := range all {
		copy(all[i].Digest[:8], make([]byte, 8))
	}
	if err := c.ShareMany(all); err != nil {
		t.Fatal(err)
	}
	st, _ := os.Stat(filepath.Join(dir, tableName))
	if st.Size() > 2<<20 {
		t.Errorf("table has %d bytes", st.Size())
	}
}
