package fetch

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/imgfs/imgfs/cache"
	"github.com/imgfs/imgfs/fetch/registrytest"
	"github.com/imgfs/imgfs/unionfs"
)

// Whatever a registry does instead of sending, a stream ends after the Client's
// timeout without progress.
func TestStreamStalls(t *testing.T) {
	for name, f := range map[string]*registrytest.Fault{
		"no answer": {Path: "/blobs/", Times: 1, Hang: true},
		"stops":     {Path: "/blobs/", Times: 1, Stall: 20000},
		"trickles":  {Path: "/blobs/", Times: 1, Slow: 19 * time.Second}, // a KiB each time
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
				b := blob(t, s, c, noise(500_000))
				s.Add(f, &registrytest.Fault{Path: "/blobs/", Hang: true})
				start := time.Now()
				buf := make([]byte, 32<<10)
				r, err := b.Stream(t.Context(), Soon, 0)
				for err == nil {
					_, err = r.Read(buf)
				}
				if r != nil {
					r.Close()
				}
				wantKind(t, err, "deadline")
				if took := time.Since(start); took > 2*defaultTimeout {
					t.Errorf("after %v", took)
				}
			})
		})
	}
}

// Who reads slowly does not make the registry slow.
func TestStreamSlowReader(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		data := noise(64 << 10)
		r, err := blob(t, s, c, data).Stream(t.Context(), Soon, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		buf, got := make([]byte, 1000), 0
		for got < len(data) {
			n, err := r.Read(buf)
			if err != nil {
				t.Fatalf("after %d bytes: %v", got, err)
			}
			got += n
			time.Sleep(10 * time.Second)
		}
	})
}

// Waiting for a slot does not count.
func TestStreamQueues(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		b := blob(t, s, c, noise(64<<10))
		for range slots - slotsDemand {
			r, err := b.Stream(t.Context(), Soon, 0)
			if err != nil {
				t.Fatal(err)
			}
			time.AfterFunc(5*time.Minute, func() { r.Close() }) // and nobody else: a body has one user
		}
		r, err := b.Stream(t.Context(), Soon, 0)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
	})
}

// A pass over a layer whose registry stalls fails with DeadlineExceeded, in every
// format, and so do those who read from it.
func TestPassStalls(t *testing.T) {
	raw := tarOf(t, layerCorpus())
	for name, data := range map[string][]byte{"gzip": gzipOf(raw), "zstd": zstdOf(raw), "tar": raw} {
		t.Run(name, func(t *testing.T) {
			s := registrytest.New(t, registrytest.Options{})
			c := client(t, s, Options{Timeout: 300 * time.Millisecond})
			b := blob(t, s, c, data)
			s.Add(&registrytest.Fault{Path: "/blobs/", Times: 1, Stall: int64(len(data) / 2)},
				&registrytest.Fault{Path: "/blobs/", Hang: true})
			kept := newCache(t, 1<<30)
			builder, err := unionfs.NewBuilder(kept.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer builder.Close()
			var pack *cache.Pack
			if pack, err = kept.Pack(b.Descriptor().Digest); err != nil {
				t.Fatal(err)
			}
			defer pack.Close()
			p := StartPass(Layer{Blob: b, Desc: b.Descriptor()}, builder, pack, kept)
			defer p.Close()
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			if err := p.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
				t.Errorf("the pass ended with %v", err)
			}
			if builder.Err() == nil || pack.Stored() != 0 {
				t.Errorf("builder %v, %d bytes stored", builder.Err(), pack.Stored())
			}
		})
	}
}
