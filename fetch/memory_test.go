package fetch

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// Chunks that are larger than usual wait for the memory that they share, others
// do not.
func TestLargeChunksWait(t *testing.T) {
	big, small := layerText(1, largeSize+5000), layerText(2, 5000)
	l := estargzOf(t, tarOf(t, []layerFile{lfile("small", small), lfile("big", big)}), estargz.WithChunkSize(2*largeSize))
	ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
	ctx := context.Background()
	if err := largeMemory.Acquire(ctx, maxLarge); err != nil { // all of it
		t.Fatal(err)
	}
	done := make(chan []byte, 1)
	go func() { done <- ld.read("big", 100, 5000, t) }()
	if got := ld.read("small", 0, 5000, t); !bytes.Equal(got, small) {
		t.Error("wrong bytes")
	}
	select {
	case <-done:
		t.Fatal("a large chunk did not wait")
	case <-time.After(50 * time.Millisecond):
	}
	largeMemory.Release(maxLarge)
	if got := <-done; !bytes.Equal(got, big[100:5100]) {
		t.Error("wrong bytes")
	}
}

// blocked is a reader of a table of contents that nothing comes for.
func blocked(t *testing.T, payload []byte, toc ...map[string]any) *loaded {
	l := eStargzLayer(payload, tocDoc(t, toc...))
	ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
	if !ld.format.Lazy() {
		t.Fatal(ld.why)
	}
	ld.blob.mu.Lock()
	ld.blob.open = make(chan struct{})
	ld.blob.mu.Unlock()
	return ld
}

// flying waits until a read has begun flights, and returns what they are for.
func (ld *loaded) flying(t *testing.T) (chunks int, size int64) {
	t.Helper()
	for range 1000 {
		ld.reader.mu.Lock()
		for n := range ld.reader.flights {
			_, s, err := ld.idx.Chunk(n)
			if err != nil {
				t.Error(err)
			}
			chunks, size = chunks+1, size+s
		}
		ld.reader.mu.Unlock()
		if chunks > 0 {
			return chunks, size
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("nothing flies")
	return
}

// A small file has neighbours of a few bytes that say that they expand to 64 MiB
// each.
func TestAheadIsBounded(t *testing.T) {
	toc := []map[string]any{tocReg("small", 100, 0)}
	for i := range int64(200) {
		d := shaOf(fmt.Append(nil, i)).String()
		toc = append(toc, tocReg(fmt.Sprint("f", i), maxChunk, 100+100*i, "digest", d))
	}
	ld := blocked(t, make([]byte, 100*202), toc...)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go ld.reader.ReadAt(ctx, ld.find(t, "small"), make([]byte, 100), 0)
	if chunks, size := ld.flying(t); size > maxAheadSize+100 {
		t.Errorf("%d bytes in %d chunks are fetched for 100", size, chunks)
	}
}

// A file in chunks of a byte is read in parts.
func TestTinyChunks(t *testing.T) {
	body := layerNoise(7, 6000)
	toc := []map[string]any{tocReg("tiny", int64(len(body)), 0, "digest", shaOf(body).String(), "chunkSize", 1, "chunkDigest", shaOf(body[:1]).String())}
	for i := 1; i < len(body); i++ {
		toc = append(toc, tocEnt("name", "tiny", "type", "chunk", "chunkOffset", i, "chunkSize", 1, "offset", 0, "innerOffset", i,
			"chunkDigest", shaOf(body[i:i+1]).String()))
	}
	ld := blocked(t, gzipOf(body), toc...)
	done := make(chan []byte, 1)
	go func() { done <- ld.read("tiny", 0, len(body), t) }()
	if chunks, _ := ld.flying(t); chunks > maxWanted+maxAheadChunks {
		t.Errorf("%d flights for one read", chunks)
	}
	ld.blob.mu.Lock()
	close(ld.blob.open)
	ld.blob.mu.Unlock()
	if got := <-done; !bytes.Equal(got, body) {
		t.Error("wrong bytes")
	}
}
