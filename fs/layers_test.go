package fs

import (
	"bytes"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// lazyLayer is a layer as eStargz, with the annotation that names its table, and
// the digest of its blob.
func lazyLayer(t *testing.T, entries ...entry) (add mutate.Addendum, digest v1.Hash) {
	t.Helper()
	plain, err := layer(t, entries...).Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(plain)
	if err != nil {
		t.Fatal(err)
	}
	built, err := estargz.Build(io.NewSectionReader(bytes.NewReader(raw), 0, int64(len(raw))))
	if err != nil {
		t.Fatal(err)
	}
	defer built.Close()
	blob, err := io.ReadAll(built)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(blob)), nil })
	if err == nil {
		digest, err = l.Digest()
	}
	if err != nil {
		t.Fatal(err)
	}
	return mutate.Addendum{Layer: l, Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: built.TOCDigest().String()}}, digest
}

// A layer whose key is not the digest of its blob is found by that digest too.
func TestLayerByBlobDigest(t *testing.T) {
	w := newWorld(t, Options{})
	add, digest := lazyLayer(t, file("me", "lazy"))
	w.pushBuilt("lazy:1", nil, add)
	w.list(w.path("lazy", "1"))
	keys := w.list(w.ctl("layers"))
	if len(keys) != 1 || keys[0] == digest.Hex {
		t.Fatalf("layers = %q, want one key that is not %s", keys, digest)
	}
	if got, err := os.Readlink(w.ctl("layers", digest.Hex)); got != keys[0] || err != nil {
		t.Errorf("the layer by its blob is %q, %v, want %s", got, err, keys[0])
	}
	if got := w.read(w.ctl("layers", digest.Hex, "me")); got != "lazy" {
		t.Errorf("read by the blob's digest = %q", got)
	}
	if got := w.list(w.ctl("layers")); !slices.Equal(got, keys) {
		t.Errorf("after it layers = %q, want %q", got, keys)
	}
	w.wantErr("rmdir in use", syscall.Rmdir(w.ctl("layers", digest.Hex)), syscall.EBUSY)

	// Another image says something else of the blob, so that nobody can tell which
	// is meant.
	add.Annotations[estargz.TOCJSONDigestAnnotation] = "sha256:" + strings.Repeat("0", 64)
	w.pushBuilt("lazy:2", nil, add)
	if err := os.Mkdir(w.path("lazy", "2"), 0o755); err != nil {
		t.Fatal(err)
	}
	if keys = w.list(w.ctl("layers")); len(keys) != 2 {
		t.Fatalf("layers = %q, want 2", keys)
	}
	_, err := os.Lstat(w.ctl("layers", digest.Hex))
	w.wantErr("two layers of a blob", err, syscall.ENOENT)
	if text := w.read(w.ctl("errors")); !strings.Contains(text, "ambiguous") || !strings.Contains(text, keys[1]) {
		t.Errorf("errors = %q", text)
	}
	if err := syscall.Rmdir(w.path("lazy", "2")); err != nil {
		t.Fatal(err)
	}
	for _, key := range keys { // one of them is idle now
		if err := syscall.Rmdir(w.ctl("layers", key)); err != nil {
			w.wantErr("rmdir of the other", err, syscall.EBUSY)
		}
	}
	if got := w.read(w.ctl("layers", digest.Hex, "me")); got != "lazy" {
		t.Errorf("read by the blob's digest, again = %q", got)
	}
	if err := syscall.Rmdir(w.path("lazy", "1")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Rmdir(w.ctl("layers", digest.Hex)); err != nil {
		t.Fatal(err)
	}
	if got := w.list(w.ctl("layers")); len(got) != 0 {
		t.Errorf("after all layers = %q", got)
	}
}
