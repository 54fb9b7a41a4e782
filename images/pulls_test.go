package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/fetch/registrytest"
)

// pullOf returns what Pulls says of the last pull of n.
func (h *hub) pullOf(n Name) (p PullState) {
	h.t.Helper()
	for _, ps := range h.Pulls() {
		if ps.Name == n {
			p = ps
		}
	}
	if p.Started.IsZero() {
		h.t.Fatalf("Pulls() has no %v", n)
	}
	return p
}

// TestPulls follows a pull whose layer stalls, and the next one of the same layer.
func TestPulls(t *testing.T) {
	h := newHub(t)
	ctx := context.Background()
	l := gzipLayer(t, file("rest", noise(4<<20)))
	h.push("app", "v1", l)
	h.push("app", "v2", l, gzipLayer(t, file("small", "x")))
	stall := &registrytest.Fault{Path: digestOf(t, l).String(), Stall: 1 << 20}
	h.Add(stall)
	one, two := h.name("app", "v1"), h.name("app", "v2")
	root := h.root(one)
	p := h.pullOf(one)
	if len(p.Layers) != 1 || p.Ended.IsZero() || p.Err != "" {
		t.Fatalf("a pull whose layer streams is %+v", p)
	}
	if pl := p.Layers[0]; pl.Method != "streaming" || pl.Done || pl.Arrived >= pl.Size || pl.Digest != digestOf(t, l) || pl.Size < 4<<20 {
		t.Errorf("a layer that streams is %+v", pl)
	}
	stall.Release()
	if err := h.Settle(ctx, root); err != nil {
		t.Fatal(err)
	}
	if pl := h.pullOf(one).Layers[0]; pl.Method != "streaming" || !pl.Done || pl.Arrived != pl.Size || pl.Format != "gzip" {
		t.Errorf("a layer that was streamed is %+v", pl)
	}
	if err := h.Settle(ctx, h.root(two)); err != nil {
		t.Fatal(err)
	}
	p = h.pullOf(two)
	if len(p.Layers) != 2 || p.Layers[0].Method != "here already" || !p.Layers[0].Done || p.Layers[1].Method != "streaming" {
		t.Errorf("a pull of a layer that is here, and another: %+v", p.Layers)
	}
	none := h.name("app", "none")
	if err := h.Pull(ctx, none); err == nil {
		t.Fatal("a pull of nothing succeeds")
	}
	if p := h.pullOf(none); p.Err == "" || p.Ended.IsZero() || len(p.Layers) != 0 {
		t.Errorf("a pull that failed is %+v", p)
	}
}

// TestPullsBounded begins and ends many, and forgets them.
func TestPullsBounded(t *testing.T) {
	var p pulls
	running := p.begin(Name{"a", "running"})
	for i := range 2 * maxPulls {
		p.begin(Name{"a", fmt.Sprint(i)}).end(nil)
	}
	p.shrink(time.Now())
	if n := len(p.list); n != maxPulls+1 || p.list[0] != running {
		t.Errorf("%d pulls are remembered, want %d and the one under way first", n, maxPulls)
	}
	p.shrink(time.Now().Add(2 * keepPulls))
	if len(p.list) != 1 {
		t.Errorf("%d pulls after two minutes, want the one under way", len(p.list))
	}
}

// A single image for another platform is not there below the directory of a platform.
func TestPullOtherPlatform(t *testing.T) {
	h := newHub(t)
	img := h.push("app", "v0", gzipLayer(t, file("hello", "world")))
	h.claim("app", img, func(_ *v1.Manifest, c *v1.ConfigFile) { c.OS, c.Architecture = "linux", "amd64" })
	n := h.name("app", "v1")
	for platform, there := range map[string]bool{"linux-arm64": false, "linux-amd64": true, "linux-x86_64": true} {
		other := Name{Repo: PlatformsDir + "/" + platform + "/" + n.Repo, Tag: n.Tag}
		err := h.Pull(t.Context(), other)
		if there != (err == nil) || !there && (!errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "no image for the platform")) {
			t.Errorf("Pull(%v) = %v, want it there: %v", other, err, there)
		}
		if missing := h.Missing(other); (missing == nil) != there {
			t.Errorf("Missing(%v) = %v", other, missing)
		}
	}
	if err := h.Pull(t.Context(), n); err != nil {
		t.Errorf("Pull without a platform = %v", err)
	}
}
