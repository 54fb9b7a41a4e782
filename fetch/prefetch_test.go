package fetch

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/fetch/registrytest"
)

// scattered is a layer of files that do not compress, far apart from each other.
func scattered(n, size int) []layerFile {
	var files []layerFile
	for i := range n {
		files = append(files, lfile(fmt.Sprintf("d/file%03d", i), noise(size+i)))
	}
	return files
}

func (ld *loaded) reads(tb testing.TB, paths ...string) (list []Read) {
	tb.Helper()
	for _, p := range paths {
		rd, _, ok := ld.reader.Beginning(ld.find(tb, p))
		if !ok {
			tb.Fatalf("Beginning(%q): none", p)
		}
		list = append(list, rd)
	}
	return list
}

// TestTrace notes what is read, once and in order, wherever it comes from.
func TestTrace(t *testing.T) {
	files := scattered(40, 50<<10)
	for name, l := range map[string]Layer{"estargz": estargzOf(t, tarOf(t, files)), "zstdchunked": zstdChunkedOf(t, files, 64<<10, nil)} {
		t.Run(name, func(t *testing.T) {
			ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
			firsts := 0
			tr := NewTrace(false, func(own bool) {
				if firsts++; !own {
					t.Error("a read of its own is said to be another's")
				}
			})
			stop := ld.reader.Trace(tr)
			for _, p := range []string{"d/file030", "d/file001", "d/file030", "d/file002"} {
				ld.read(p, 10, 100, t)
			}
			stop()
			ld.read("d/file020", 0, 1, t)
			got, begun := tr.Reads()
			if diff := cmp.Diff(ld.reads(t, "d/file030", "d/file001", "d/file002"), got); diff != "" || firsts != 1 || !begun {
				t.Errorf("Reads (-want +got), %d times begun:\n%s", firsts, diff)
			}
			// What two note is nobody's own, but of the one that takes all.
			var told []bool
			a, b := NewTrace(false, func(own bool) { told = append(told, own) }), NewTrace(true, nil)
			stopA, stopB := ld.reader.Trace(a), ld.reader.Trace(b)
			ld.read("d/file005", 0, 1, t)
			stopB()
			if _, begun := a.Reads(); begun {
				t.Error("a read that two note has begun one of them")
			}
			if list, begun := b.Reads(); !begun || len(list) != 1 {
				t.Errorf("Reads of what takes all = %v, %v", list, begun)
			}
			ld.read("d/file006", 0, 1, t)
			stopA()
			if list, begun := a.Reads(); !begun || len(list) != 2 || !slices.Equal(told, []bool{false, true}) {
				t.Errorf("Reads = %v, %v, told %v", list, begun, told)
			}
		})
	}
}

// A Trace that does not begin forgets: there is one for every image that shares its
// layers with others.
func TestTraceFades(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := v1.Hash{Algorithm: "sha256", Hex: "a"}, v1.Hash{Algorithm: "sha256", Hex: "b"}
		tr := NewTrace(false, nil)
		for i := range int64(1000) {
			tr.add(Read{a, i, 1}, false)
		}
		time.Sleep(traceLead / 2)
		tr.add(Read{b, 5, 1}, false)
		time.Sleep(traceLead + 1)
		if list, _ := tr.Reads(); len(list) != 1 || list[0] != (Read{b, 5, 1}) {
			t.Errorf("%d reads are kept, want the last", len(list))
		}
		time.Sleep(traceLead)
		synctest.Wait()
		if list, _ := tr.Reads(); len(list) != 0 || tr.fading {
			t.Errorf("%d reads are kept, want none", len(list))
		}
		tr.add(Read{a, 7, 1}, false)
		tr.add(Read{b, 8, 1}, true)
		time.Sleep(time.Hour)
		if list, begun := tr.Reads(); len(list) != 2 || !begun {
			t.Errorf("%d reads are kept, begun %v; want 2 of a Trace that has begun", len(list), begun)
		}
	})
}

// TestPrefetch fetches stretches in few requests; what comes is what is read.
func TestPrefetch(t *testing.T) {
	files := scattered(60, 50<<10)
	for name, l := range map[string]Layer{"estargz": estargzOf(t, tarOf(t, files)), "zstdchunked": zstdChunkedOf(t, files, 64<<10, nil)} {
		t.Run(name, func(t *testing.T) {
			ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
			readers := map[v1.Hash]*Reader{l.Desc.Digest: ld.reader}
			list := ld.reads(t, "d/file050", "d/file002", "d/file004", "d/file051")
			list = append(list, Read{l.Desc.Digest, l.Desc.Size - 1, 2}, Read{l.Desc.Digest, -1, 5}, Read{l.Desc.Digest, 1 << 62, 1 << 62}, Read{v1.Hash{Hex: "none"}, 0, 5})
			ld.blob.reset()
			Prefetch(context.Background(), list, readers)
			if n, bytes := ld.blob.counts(); n != 2 || bytes > 6*60<<10 {
				t.Errorf("%d requests for %d bytes, want 2 for less than %d", n, bytes, 6*60<<10)
			}
			ld.blob.reset()
			for _, i := range []int{50, 2, 4, 51} {
				if got := ld.read(files[i].Name, 0, 1<<20, t); !bytes.Equal(got, files[i].body) {
					t.Errorf("%s: %d bytes, not the %d of the layer", files[i].Name, len(got), len(files[i].body))
				}
			}
			if n, _ := ld.blob.counts(); n != 0 {
				t.Errorf("%d requests to read what was fetched", n)
			}
			Prefetch(context.Background(), list, readers)
			if n, _ := ld.blob.counts(); n != 0 {
				t.Errorf("%d requests to fetch what is here", n)
			}
		})
	}
}

// TestPrefetchIsNotWaitedFor: a reader whose chunk is far behind in a request that
// nobody waits for, or in one that has not begun, makes a request of its own.
func TestPrefetchIsNotWaitedFor(t *testing.T) {
	files := scattered(60, 50<<10)
	l := estargzOf(t, tarOf(t, files))
	ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
	var all []string
	for _, f := range files {
		all = append(all, f.Name)
	}
	list := ld.reads(t, all...)
	ld.blob.mu.Lock()
	stalled := list[1].Off // where the request for everything stops
	open := make(chan struct{})
	ld.blob.limit, ld.blob.open = stalled, open
	ld.blob.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		Prefetch(context.Background(), list, map[v1.Hash]*Reader{l.Desc.Digest: ld.reader})
	}()
	for n := 0; n == 0; n, _ = ld.blob.counts() {
		time.Sleep(time.Millisecond)
	}
	// Bytes from here on wait in the request of the Prefetch, and nowhere else.
	ld.blob.mu.Lock()
	ld.blob.limit = 1 << 60
	ld.blob.mu.Unlock()
	read := make(chan []byte, 1)
	go func() { read <- ld.read("d/file040", 0, 1<<20, t) }()
	select {
	case got := <-read:
		if !bytes.Equal(got, files[40].body) {
			t.Error("wrong bytes")
		}
	case <-time.After(10 * time.Second):
		t.Error("a reader waits for a request that nobody waits for")
	}
	close(open)
	<-done
	for _, i := range []int{0, 1, 39, 40, 41, 59} {
		if got := ld.read(files[i].Name, 0, 1<<20, t); !bytes.Equal(got, files[i].body) {
			t.Errorf("%s: wrong bytes", files[i].Name)
		}
	}
}

// TestStretchTaken has a reader in a hurry for a part of a stretch whose request has
// not begun: what follows in the stretch comes with the reader's request.
func TestStretchTaken(t *testing.T) {
	l := estargzOf(t, tarOf(t, scattered(40, 50<<10)))
	ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
	list := ld.reads(t, "d/file010", "d/file014", "d/file017", "d/file020")
	for range cap(ld.reader.ahead) { // no request of a Prefetch begins
		ld.reader.ahead <- struct{}{}
	}
	ld.blob.reset()
	done := make(chan struct{})
	go func() {
		defer close(done)
		Prefetch(context.Background(), list, map[v1.Hash]*Reader{l.Desc.Digest: ld.reader})
	}()
	for planned := 0; planned < len(list); time.Sleep(time.Millisecond) {
		ld.reader.mu.Lock()
		planned = len(ld.reader.flights)
		ld.reader.mu.Unlock()
	}
	ld.read("d/file014", 0, 50<<10, t)
	for _, name := range []string{"d/file017", "d/file020"} {
		ld.read(name, 0, 50<<10, t)
	}
	if n, _ := ld.blob.counts(); n != 1 {
		t.Errorf("%d requests for the rest of a stretch, want 1", n)
	}
	for range cap(ld.reader.ahead) {
		<-ld.reader.ahead
	}
	<-done
	if n, bytes := ld.blob.counts(); n != 2 || bytes > 12*60<<10 {
		t.Errorf("%d requests for %d bytes in all, want 2, and no byte twice", n, bytes)
	}
	ld.read("d/file010", 0, 50<<10, t)
	if n, _ := ld.blob.counts(); n != 2 {
		t.Error("what was left of the stretch did not come")
	}
}

// TestPrefetchEnds with its context, and with the Reader.
func TestPrefetchEnds(t *testing.T) {
	files := scattered(30, 50<<10)
	for _, how := range []string{"context", "reader"} {
		t.Run(how, func(t *testing.T) {
			l := estargzOf(t, tarOf(t, files))
			ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
			list := ld.reads(t, "d/file003", "d/file020")
			ld.blob.mu.Lock()
			ld.blob.limit, ld.blob.open = 0, make(chan struct{})
			ld.blob.mu.Unlock()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			done := make(chan struct{})
			go func() {
				defer close(done)
				Prefetch(ctx, list, map[v1.Hash]*Reader{l.Desc.Digest: ld.reader})
			}()
			for n := 0; n == 0; n, _ = ld.blob.counts() {
				time.Sleep(time.Millisecond)
			}
			if how == "context" {
				cancel()
			} else {
				ld.reader.Close()
			}
			select {
			case <-done:
			case <-time.After(10 * time.Second):
				t.Fatal("Prefetch does not end")
			}
		})
	}
}

func TestStretches(t *testing.T) {
	a, b := v1.Hash{Algorithm: "sha256", Hex: "aa"}, v1.Hash{Algorithm: "sha256", Hex: "bb"}
	got := Stretches([]Read{{b, 5 << 20, 10}, {a, 100, 10}, {b, 5<<20 + 20, 10}, {a, 50, 10}, {a, 100 + maxStretchGap + 11, 1}, {a, 0, maxRange + 1}, {a, 9 << 20, 0}, {a, 1 << 30, 5},
		{a, 1<<30 - 1, 2}, {a, -1, 5}, {a, 1 << 62, 1 << 62}, {v1.Hash{Hex: "cc"}, 1, 1}}, map[v1.Hash]int64{a: 1 << 30, b: 1 << 30})
	var text []string
	for _, s := range got {
		text = append(text, fmt.Sprint(s.Layer.Hex, " ", s.Off, "+", s.Len, " of ", len(s.Reads)))
	}
	want := []string{
		fmt.Sprint("bb ", 5<<20, "+30 of 2"),
		fmt.Sprint("aa 0+", maxRange, " of 4"),
		fmt.Sprint("aa ", maxRange, "+1 of 1"), // more than one request brings
	}
	if !slices.Equal(text, want) {
		t.Errorf("Stretches = %q, want %q", text, want)
	}
	for _, s := range got {
		if s.Len > maxRange+1 {
			t.Errorf("a stretch of %d bytes", s.Len)
		}
		for _, r := range s.Reads {
			if r.Off < s.Off || r.Off+r.Len > s.Off+s.Len {
				t.Errorf("%v is not in its stretch %v", r, s.Read)
			}
		}
	}
}

// TestHold answers ranges from what is held, and asks for what is not.
func TestHold(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{})
	c := client(t, s, Options{})
	data := noise(1 << 20)
	desc := s.PutBlob(t, "test/blobs", data)
	repo, err := name.NewRepository(s.Host() + "/test/blobs")
	if err != nil {
		t.Fatal(err)
	}
	other, err := name.NewRepository(s.Host() + "/test/others")
	if err != nil {
		t.Fatal(err)
	}
	h := c.Hold(repo, desc, 100, 500<<10, Soon)
	h.Fetch(t.Context())
	read := func(repo name.Repository, off, n int64, requests int) {
		t.Helper()
		before := s.Requests("/blobs/")
		got, err := wholeRange(t, c.Blob(repo, desc), off, n)
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, data, off, n)
		if d := s.Requests("/blobs/") - before; d != requests {
			t.Errorf("bytes %d+%d: %d requests, want %d", off, n, d, requests)
		}
	}
	read(repo, 100, 500<<10, 0)
	read(repo, 5000, 1, 0)
	read(repo, 99, 10, 1)
	read(repo, 100, 500<<10+1, 1)
	read(other, 5000, 1, 1) // what is held is for one repository
	for _, bad := range [][2]int64{{-1, 5}, {0, 0}, {0, 1<<20 + 1}, {1 << 62, 1 << 62}, {200, 300}} {
		if c.Hold(repo, desc, bad[0], bad[1], Soon) != nil {
			t.Errorf("Hold(%d, %d) = not nil", bad[0], bad[1])
		}
	}
	if n := c.Blob(repo, desc).HeldTail(); n != 0 {
		t.Errorf("HeldTail = %d", n)
	}
	later := c.Hold(repo, desc, 800<<10, 224<<10, Soon)
	if n := c.Blob(repo, desc).HeldTail(); n != 0 {
		t.Errorf("HeldTail = %d", n)
	}
	read(repo, 1000<<10, 5, 1) // what is held there has not been asked for
	later.Release()
	tail := c.Hold(repo, desc, 900<<10, 124<<10, Demand)
	if n := c.Blob(repo, desc).HeldTail(); n != 124<<10 {
		t.Errorf("HeldTail = %d", n)
	}
	tail.Fetch(t.Context())
	read(repo, 1000<<10, 5, 0)
	c.Blob(repo, desc).Suspect() // the bytes were wrong: nothing more is read of what is held
	read(repo, 1000<<10, 5, 1)
	h.Release()
	h.Release()
	tail.Release()
	read(repo, 5000, 1, 1)
	if c.holds.size != 0 || len(c.holds.byBlob) != 0 {
		t.Errorf("%d bytes are held", c.holds.size)
	}
}

// TestHoldBroken: what a Hold could not bring is asked for by who reads it.
func TestHoldBroken(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		data := noise(1 << 20)
		desc := s.PutBlob(t, "test/blobs", data)
		repo, err := name.NewRepository(s.Host() + "/test/blobs")
		if err != nil {
			t.Fatal(err)
		}
		s.Add(&registrytest.Fault{Path: "/blobs/", Cut: 100 << 10, Times: maxAttempts})
		h := c.Hold(repo, desc, 0, 800<<10, Soon)
		h.Fetch(t.Context())
		defer h.Release()
		got, err := wholeRange(t, c.Blob(repo, desc), 50, 700<<10)
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, data, 50, 700<<10)
	})
}

// TestHoldReleased ends what is being fetched, and who reads it goes on.
func TestHoldReleased(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		data := noise(1 << 20)
		desc := s.PutBlob(t, "test/blobs", data)
		repo, err := name.NewRepository(s.Host() + "/test/blobs")
		if err != nil {
			t.Fatal(err)
		}
		s.Add(&registrytest.Fault{Path: "/blobs/", Stall: 300 << 10, Times: 1})
		h := c.Hold(repo, desc, 0, 800<<10, Demand)
		fetched := make(chan struct{})
		go func() {
			defer close(fetched)
			h.Fetch(t.Context())
		}()
		read := make(chan []byte, 1)
		go func() {
			got, err := wholeRange(t, c.Blob(repo, desc), 50, 700<<10)
			if err != nil {
				t.Error(err)
			}
			read <- got
		}()
		synctest.Wait()
		h.Release()
		<-fetched
		same(t, <-read, data, 50, 700<<10)
	})
}

// TestPrefetchCosts has a file of a million holes, and one of as many chunks: a
// plan looks at a bounded number of them.
func TestPrefetchCosts(t *testing.T) {
	const many = 200_000
	entries := []map[string]any{
		tocReg("holes", 1<<42, 0, "chunkType", "zeros", "chunkSize", 1<<42, "endOffset", 0, "digest", shaOf([]byte("y")).String()),
		tocReg("chunks", many, 100, "chunkSize", 1, "chunkDigest", someDigest, "endOffset", 100+many),
	}
	for i := int64(1); i < many; i++ {
		entries = append(entries, chunkAt(i, 1, 100+i))
	}
	l := zstdChunkedLayer(make([]byte, 100+many), tocDoc(t, entries...))
	ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
	if ld.format != FormatZstdChunked {
		t.Fatalf("the layer is streamed: %s", ld.why)
	}
	jobs := ld.reader.planAhead([]Read{{l.Desc.Digest, 0, l.Desc.Size}})
	n := 0
	for _, j := range jobs {
		n += len(j.chunks)
		for i := range j.chunks {
			ld.reader.land(j.chunks[i].n, j.chunks[i].f, nil, context.Canceled)
		}
		ld.reader.wg.Done()
	}
	if n > maxAheadChunks {
		t.Errorf("a plan of %d chunks", n)
	}
}

// TestHoldBound holds no more than it may.
func TestHoldBound(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{})
	c := client(t, s, Options{})
	repo, err := name.NewRepository(s.Host() + "/test/blobs")
	if err != nil {
		t.Fatal(err)
	}
	desc := v1.Descriptor{Digest: v1.Hash{Algorithm: "sha256", Hex: someDigest[7:]}, Size: 1 << 30}
	n := int64(0)
	for i := range int64(100) {
		if h := c.Hold(repo, desc, i<<20, 1<<20, Soon); h != nil {
			n += 1 << 20
			defer h.Release()
		}
	}
	if n != maxHeld {
		t.Errorf("%d bytes are held, want %d", n, maxHeld)
	}
	if c.Hold(repo, desc, 0, maxHeld+1, Soon) != nil {
		t.Error("more than everything is held")
	}
}

// TestPrioritized: eStargz' landmark tells what whoever made the layer expects.
func TestPrioritized(t *testing.T) {
	files := scattered(10, 10<<10)
	l := estargzOf(t, tarOf(t, append([]layerFile{ldir("d")}, files...)), estargz.WithPrioritizedFiles([]string{"d/file007", "d/file003"}))
	b := mustBuilder(t)
	toc, err := Index(context.Background(), l, b)
	if err != nil || toc.Prioritized == 0 || toc.Prioritized > 40<<10 || toc.Tail <= 0 || toc.Tail > l.Desc.Size {
		t.Fatalf("Index = %+v, %v", toc, err)
	}
	ld := load(t, l, newCache(t, 1<<30), ReaderOptions{})
	Prefetch(context.Background(), []Read{{l.Desc.Digest, 0, toc.Prioritized}}, map[v1.Hash]*Reader{l.Desc.Digest: ld.reader})
	ld.blob.reset()
	for _, i := range []int{3, 7} {
		if got := ld.read(files[i].Name, 0, 1<<20, t); !bytes.Equal(got, files[i].body) {
			t.Errorf("%s: wrong bytes", files[i].Name)
		}
	}
	if n, _ := ld.blob.counts(); n != 0 {
		t.Errorf("%d requests to read prioritized files", n)
	}
}
