package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/imgfs/imgfs/fetch"
	"github.com/imgfs/imgfs/fetch/registrytest"
	"github.com/imgfs/imgfs/unionfs"
)

// hub is a store with a registry.
type hub struct {
	*registrytest.Server
	*Store
	t *testing.T
}

func newHub(t *testing.T) *hub {
	t.Helper()
	h := &hub{Server: registrytest.New(t, registrytest.Options{}), t: t}
	s, err := Open(Options{Dir: t.TempDir(), CacheSize: 1 << 30, Timeout: 10 * time.Second, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	h.Store = s
	t.Cleanup(func() {
		h.Clear()
		if err := h.Store.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return h
}

func (h *hub) name(repo, tag string) Name { return Name{Repo: h.Host() + "/" + repo, Tag: tag} }

// file is a regular file of an archive; a name that ends in a slash makes a
// directory.
func file(name, body string) *tar.Header {
	e := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(body)), Typeflag: tar.TypeReg, ModTime: time.Unix(1600000000, 0),
		PAXRecords: map[string]string{}}
	if name[len(name)-1] == '/' {
		e.Typeflag, e.Mode = tar.TypeDir, 0o755
	}
	e.Gname = body // taken out again by gzipLayer
	return e
}

func gzipLayer(t *testing.T, entries ...*tar.Header) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, e := range entries {
		body := e.Gname
		e.Gname = ""
		if err := w.WriteHeader(e); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, body)
	}
	w.Close()
	z.Close()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// noise does not compress.
func noise(n int) string {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return string(b)
}

func digestOf(t *testing.T, l v1.Layer) v1.Hash {
	t.Helper()
	d, err := l.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (h *hub) push(repo, tag string, layers ...v1.Layer) v1.Image {
	h.t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		h.t.Fatal(err)
	}
	h.Push(h.t, repo+":"+tag, img)
	return img
}

func (h *hub) root(n Name) Ino {
	h.t.Helper()
	if err := h.Pull(context.Background(), n); err != nil {
		h.t.Fatal(err)
	}
	root, err := h.Root(context.Background(), n)
	if err != nil {
		h.t.Fatal(err)
	}
	return root
}

func (h *hub) lookup(dir Ino, name string) Ino {
	h.t.Helper()
	var a Attr
	ino, _, err := h.Lookup(context.Background(), dir, name, &a)
	if err != nil || ino == 0 {
		h.t.Fatalf("Lookup(%q) = %v, %v", name, ino, err)
	}
	return ino
}

// TestXattrsWhileArriving asks for the attributes of what has passed, while the
// rest of its layer has not.
func TestXattrsWhileArriving(t *testing.T) {
	h := newHub(t)
	d, f := file("d/", ""), file("d/ping", "x")
	d.PAXRecords["SCHILY.xattr.user.dir"] = "1"
	f.PAXRecords["SCHILY.xattr.security.capability"] = "cap"
	l := gzipLayer(t, d, f, file("z", noise(4<<20)))
	h.push("app", "v1", l)
	stall := &registrytest.Fault{Path: digestOf(t, l).String(), Stall: 1 << 20}
	h.Add(stall)
	root := h.root(h.name("app", "v1"))
	dir := h.lookup(root, "d")
	ping := h.lookup(dir, "ping")
	for _, name := range []string{"user.dir", "security.capability"} {
		if !h.CarriesXattr(name) {
			t.Errorf("CarriesXattr(%q) = false, and it has passed", name)
		}
	}
	if v, ok, err := h.Xattr(context.Background(), ping, "security.capability"); v != "cap" || !ok || err != nil {
		t.Errorf("Xattr of a file = %q, %v, %v", v, ok, err)
	}
	time.AfterFunc(100*time.Millisecond, stall.Release)
	if v, ok, err := h.Xattr(context.Background(), dir, "user.dir"); v != "1" || !ok || err != nil {
		t.Errorf("Xattr of a directory = %q, %v, %v", v, ok, err)
	}
}

// claim pushes img again as repo:v1, after changing what its manifest or config
// says.
func (h *hub) claim(repo string, img v1.Image, change func(*v1.Manifest, *v1.ConfigFile)) {
	h.t.Helper()
	m, err := img.Manifest()
	if err != nil {
		h.t.Fatal(err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		h.t.Fatal(err)
	}
	m, c = m.DeepCopy(), c.DeepCopy()
	change(m, c)
	raw, err := json.Marshal(c)
	if err != nil {
		h.t.Fatal(err)
	}
	h.Push(h.t, repo+":v0", img)
	d := h.PutBlob(h.t, repo, raw)
	m.Config.Digest, m.Config.Size = d.Digest, d.Size
	if raw, err = json.Marshal(m); err != nil {
		h.t.Fatal(err)
	}
	h.PutManifest(h.t, repo, "v1", string(m.MediaType), raw)
}

// TestWrongClaims pulls images that say something wrong of a layer, before one
// that has the same layer and says what is true: that one must not notice.
func TestWrongClaims(t *testing.T) {
	for name, change := range map[string]func(*v1.Manifest, *v1.ConfigFile){
		"empty":   func(m *v1.Manifest, _ *v1.ConfigFile) { m.Layers[0].Size = 0 },
		"shorter": func(m *v1.Manifest, _ *v1.ConfigFile) { m.Layers[0].Size-- },
		"longer":  func(m *v1.Manifest, _ *v1.ConfigFile) { m.Layers[0].Size++ },
		"diffID":  func(_ *v1.Manifest, c *v1.ConfigFile) { c.RootFS.DiffIDs[0] = hashOf("other") },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHub(t)
			img := h.push("good", "v1", gzipLayer(t, file("hello", "world")))
			h.claim("bad", img, change)
			ctx := context.Background()
			if err := h.Pull(ctx, h.name("bad", "v1")); err == nil {
				root, err := h.Root(ctx, h.name("bad", "v1"))
				if err == nil {
					err = h.ReadDir(ctx, root, 0, func(int, Entry, *Attr) bool { return true })
				}
				if err == nil {
					t.Error("the image with a wrong claim can be listed")
				}
			}
			p := make([]byte, 16)
			ino := h.lookup(h.root(h.name("good", "v1")), "hello")
			if n, err := h.ReadAt(ctx, ino, p, 0); err != nil || string(p[:n]) != "world" {
				t.Errorf("ReadAt of the good image = %q, %v", p[:n], err)
			}
		})
	}
}

// TestOtherRepository reads a layer after the registry that it was first pulled
// from has gone, and another one was seen to have it.
func TestOtherRepository(t *testing.T) {
	h := newHub(t)
	first := registrytest.New(t, registrytest.Options{})
	l := gzipLayer(t, file("hello", noise(3<<20)))
	img := h.push("app", "v1", l)
	first.Push(t, "app:v1", img)
	ino := h.lookup(h.root(Name{Repo: first.Host() + "/app", Tag: "v1"}), "hello")
	if err := h.Settle(context.Background(), h.root(Name{Repo: first.Host() + "/app", Tag: "v1"})); err != nil {
		t.Fatal(err)
	}
	h.root(h.name("app", "v1"))
	first.Add(&registrytest.Fault{Status: 503})
	before := first.Requests("blobs")
	l2, err := h.layer(ino.seq())
	if err != nil {
		t.Fatal(err)
	}
	r, err := l2.from.Range(context.Background(), fetch.Demand, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if n := first.Requests("blobs") - before; n != 0 {
		t.Errorf("%d requests to a registry that has gone, want 0", n)
	}
}

// TestArrivesAgain asks for inodes that are known from before, while their layer
// arrives again and has not come to them.
func TestArrivesAgain(t *testing.T) {
	h := newHub(t)
	l := gzipLayer(t, file("rest", noise(4<<20)), file("d/", ""), file("d/z", "the last"))
	h.push("app", "v1", l)
	ctx := context.Background()
	root := h.root(h.name("app", "v1"))
	dir := h.lookup(root, "d")
	ino := h.lookup(dir, "z")
	if err := h.Settle(ctx, root); err != nil {
		t.Fatal(err)
	}
	layer, err := h.layer(ino.seq())
	if err != nil {
		t.Fatal(err)
	}
	var a Attr
	for what, ask := range map[string]func() error{
		"Stat of a file":      func() error { _, err := h.Stat(ctx, ino, &a); return err },
		"Stat of a directory": func() error { _, err := h.Stat(ctx, dir, &a); return err },
		"ReadAt":              func() error { _, err := h.ReadAt(ctx, ino, make([]byte, 10), 0); return err },
	} {
		stall := &registrytest.Fault{Path: digestOf(t, l).String(), Stall: 1 << 20}
		h.Add(stall)
		v, err := h.view(root.seq())
		if err != nil {
			t.Fatal(err)
		}
		layer.damaged(layer.state.Load(), unionfs.ErrDamaged)
		v.image.damaged(v.image.state.Load(), unionfs.ErrDamaged)
		time.AfterFunc(100*time.Millisecond, stall.Release)
		if err := ask(); err != nil {
			t.Errorf("%s while the layer arrives again: %v", what, err)
		}
		if err := h.Settle(ctx, root); err != nil {
			t.Fatal(err)
		}
		h.Clear()
	}
}
