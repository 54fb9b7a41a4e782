package images

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/imgfs/imgfs/fetch"
	"github.com/imgfs/imgfs/fetch/registrytest"
)

// stargzImage is an image of one eStargz layer.
func stargzImage(t *testing.T, entries ...*tar.Header) v1.Image {
	t.Helper()
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	for _, e := range entries {
		body := e.Gname
		e.Gname = ""
		if err := w.WriteHeader(e); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, body)
	}
	w.Close()
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(raw.Bytes()), 0, int64(raw.Len())))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	data, err := io.ReadAll(b)
	if err != nil {
		t.Fatal(err)
	}
	diff, err := v1.NewHash(b.DiffID().String())
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.Append(empty.Image, mutate.Addendum{
		Layer:       stargzLayer{static.NewLayer(data, types.OCILayer), diff},
		Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: b.TOCDigest().String()},
	})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// stargzLayer has a diffID, which static's have not.
type stargzLayer struct {
	v1.Layer
	diff v1.Hash
}

func (l stargzLayer) DiffID() (v1.Hash, error) { return l.diff, nil }

// openAt opens a store with profiles.
func openAt(t *testing.T, dir, profiles string) *Store {
	t.Helper()
	s, err := Open(Options{Dir: dir, CacheSize: 1 << 30, Timeout: 10 * time.Second, Prefetch: true, Profiles: profiles,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// readFiles reads files of a directory whole.
func readFiles(t *testing.T, s *Store, n Name, dir string, names ...string) {
	t.Helper()
	ctx := context.Background()
	root, err := s.Root(ctx, n)
	if err != nil {
		t.Fatal(err)
	}
	var a Attr
	d, _, err := s.Lookup(ctx, root, dir, &a)
	if err != nil || d == 0 {
		t.Fatalf("Lookup(%q) = %v, %v", dir, d, err)
	}
	for _, name := range names {
		ino, _, err := s.Lookup(ctx, d, name, &a)
		if err != nil || ino == 0 {
			t.Fatalf("Lookup(%q) = %v, %v", name, ino, err)
		}
		p := make([]byte, a.Size)
		if n, err := s.ReadAt(ctx, ino, p, 0); err != nil || n != len(p) || !strings.HasPrefix(string(p), name) {
			t.Fatalf("ReadAt(%q) = %d, %v, %.10q", name, n, err, p)
		}
	}
}

// TestProfile reads some files of an image, and starts from nothing with what was
// noted of that: everything is here when it is read, in a few requests.
func TestProfile(t *testing.T) {
	reg := registrytest.New(t, registrytest.Options{})
	entries := []*tar.Header{file("d/", "")}
	var names []string
	for i := range 60 {
		name := fmt.Sprintf("file%02d", i)
		names = append(names, name)
		entries = append(entries, file("d/"+name, name+noise(200<<10+i)))
	}
	img := stargzImage(t, entries...)
	reg.Push(t, "prof/app:v1", img)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	n := Name{Repo: reg.Host() + "/prof/app", Tag: "v1"}
	read := []string{names[50], names[3], names[20], names[51]}

	first := t.TempDir()
	s := openAt(t, first, "")
	if err := s.Pull(context.Background(), n); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Profile(digest); !errors.Is(err, iofs.ErrNotExist) {
		t.Errorf("Profile before a read: %v", err)
	}
	readFiles(t, s, n, "d", read...)
	data, err := s.Profile(digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	kept := filepath.Join(first, "profiles", ProfileName(digest))
	if stored, err := os.ReadFile(kept); err != nil || !bytes.Equal(stored, data) {
		t.Fatalf("the profile that is kept: %s, %v, want %s", stored, err, data)
	}

	for name, profiles := range map[string]string{"without": "", "with": filepath.Dir(kept)} {
		t.Run(name, func(t *testing.T) {
			reg.Reset()
			s := openAt(t, t.TempDir(), profiles)
			defer s.Close()
			if err := s.Pull(context.Background(), n); err != nil {
				t.Fatal(err)
			}
			if profiles != "" {
				waitFor(t, func() bool { return s.client.Stats().Hosts["http://"+reg.Host()].Bytes > 800<<10 })
			}
			before := reg.Requests("")
			readFiles(t, s, n, "d", read...)
			// The manifest, the config, the table and the files; with a profile those
			// that are neighbours in one, and all before they are read.
			if got := reg.Requests(""); profiles == "" && got != 3+4 || profiles != "" && (got != 3+3 || before != got) {
				t.Errorf("%d requests before the files are read, %d after: %v", before, got, requestsOf(reg))
			}
			s.profiles.mu.Lock()
			defer s.profiles.mu.Unlock()
			if len(s.profiles.held) != 0 {
				t.Errorf("%d images have something held", len(s.profiles.held))
			}
		})
	}
}

func requestsOf(reg *registrytest.Server) (list []string) {
	for _, r := range reg.Log() {
		list = append(list, r.Path+" "+r.Range)
	}
	return list
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	for range 1000 {
		if done() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("it does not happen")
}

// TestRecord begins a profile anew, and says when there is nothing in it.
func TestRecord(t *testing.T) {
	reg := registrytest.New(t, registrytest.Options{})
	img := stargzImage(t, file("d/", ""), file("d/a", "a"+noise(100)), file("d/b", "b"+noise(200)))
	reg.Push(t, "prof/app:v1", img)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	n := Name{Repo: reg.Host() + "/prof/app", Tag: "v1"}
	s := openAt(t, t.TempDir(), "")
	defer s.Close()
	if err := s.Pull(context.Background(), n); err != nil {
		t.Fatal(err)
	}
	readFiles(t, s, n, "d", "a")
	count := func(data []byte) int {
		t.Helper()
		p, err := parseProfile(data, digest)
		if err != nil {
			t.Fatal(err)
		}
		return len(p.Reads)
	}
	ctx := context.Background()
	if err := s.Record(ctx, digest); err != nil {
		t.Fatal(err)
	}
	if data, err := s.Recorded(digest); !errors.Is(err, iofs.ErrNotExist) {
		t.Errorf("Recorded with nothing read = %s, %v", data, err)
	}
	// Another image has all of the layers, and is open.
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.Config.Env = []string{"OTHER=1"}
	twin, err := mutate.ConfigFile(img, cf)
	if err != nil {
		t.Fatal(err)
	}
	reg.Push(t, "prof/twin:v1", twin)
	if err := s.Pull(ctx, Name{Repo: reg.Host() + "/prof/twin", Tag: "v1"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Record(ctx, digest); err != nil {
		t.Fatal(err)
	}
	readFiles(t, s, n, "d", "a")
	if err := s.GiveUpRecord(digest); err != nil {
		t.Fatal(err)
	}
	if err := s.Record(ctx, digest); err != nil {
		t.Fatal(err)
	}
	readFiles(t, s, n, "d", "b", "b")
	data, err := s.Recorded(digest)
	if err != nil || count(data) != 1 {
		t.Errorf("Recorded = %s, %v, want one read", data, err)
	}
	if again, err := s.Profile(digest); err != nil || !bytes.Equal(again, data) {
		t.Errorf("Profile = %s, %v, want %s", again, err, data)
	}
	if err := s.Record(ctx, v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("0", 64)}); !errors.Is(err, iofs.ErrNotExist) {
		t.Errorf("Record of no image: %v", err)
	}
}

// TestProfileAges: what is not read at several starts is forgotten.
func TestProfileAges(t *testing.T) {
	base := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("1", 64)}
	im := &image{imageKey: imageKey{digest: v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("2", 64)}},
		layers: []*layer{{rec: layerRecord{Desc: v1.Descriptor{Digest: base}}}}}
	a, b := fetch.Read{Layer: base, Off: 0, Len: 10}, fetch.Read{Layer: base, Off: 100, Len: 10}
	p := newProfile(im, []fetch.Read{a, b}, nil)
	for start := range maxProfileAge + 1 {
		if want := []fetch.Read{a, b}; !slices.Equal(p.reads(), want) {
			t.Fatalf("after %d starts: %v, want %v", start, p.reads(), want)
		}
		p = newProfile(im, []fetch.Read{a}, p)
	}
	if want := []fetch.Read{a}; !slices.Equal(p.reads(), want) {
		t.Errorf("after %d starts: %v, want %v", maxProfileAge+1, p.reads(), want)
	}
	if other := newProfile(im, []fetch.Read{{Layer: im.digest, Off: 1, Len: 1}}, nil); len(other.Reads) != 0 {
		t.Errorf("a read of another image's layer is kept: %v", other.Reads)
	}
}

// TestBadProfiles has files that no imgfs has written.
func TestBadProfiles(t *testing.T) {
	image := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("2", 64)}
	good := `{"version":1,"image":"` + image.String() + `","layers":[{"digest":"` + image.String() + `","tail":5}],"reads":[[0,1,2,0]]}`
	if _, err := parseProfile([]byte(good), image); err != nil {
		t.Fatal(err)
	}
	for what, edit := range map[string][2]string{
		"version": {`"version":1`, `"version":2`}, "image": {`"image":"sha256:2`, `"image":"sha256:3`}, "layer": {"[0,1,2,0]", "[1,1,2,0]"},
		"offset": {"[0,1,2,0]", "[0,-1,2,0]"}, "length": {"[0,1,2,0]", "[0,1,0,0]"}, "much": {"[0,1,2,0]", "[0,1,99999999999,0]"},
		"age": {"[0,1,2,0]", "[0,1,2,9]"}, "tail": {`"tail":5`, `"tail":-5`}, "number": {"[0,1,2,0]", "[0,1,2e99,0]"}, "end": {"}", ""},
		"digest": {`"digest":"sha256:2`, `"digest":"md5:2`}, "many": {"[[0,1,2,0]]", "[" + strings.Repeat("[0,1,2,0],", fetch.MaxTraceReads) + "[0,1,2,0]]"},
		"sum": {"[[0,1,2,0]]", fmt.Sprintf("[[0,1,%d,0],[0,1,%d,0]]", fetch.MaxTraceBytes, 1)},
	} {
		if _, err := parseProfile([]byte(strings.Replace(good, edit[0], edit[1], 1)), image); !errors.Is(err, iofs.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := parseProfile(bytes.Repeat([]byte(" "), maxProfile+1), image); !errors.Is(err, iofs.ErrInvalid) {
		t.Errorf("a large file: %v", err)
	}
}

// TestManyProfiles keeps the youngest.
func TestManyProfiles(t *testing.T) {
	s := openAt(t, t.TempDir(), "")
	defer s.Close()
	var all []v1.Hash
	for i := range 5 {
		h := sha256Hash([]byte{byte(i)})
		all = append(all, h)
		data, err := json.Marshal(profile{Version: profileVersion, Image: h})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.keepProfile(h, data); err != nil {
			t.Fatal(err)
		}
		old := time.Now().Add(time.Duration(i-10) * time.Hour)
		if err := os.Chtimes(filepath.Join(s.o.Dir, "profiles", ProfileName(h)), old, old); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.dropProfiles(2); err != nil {
		t.Fatal(err)
	}
	for i, h := range all {
		if here := s.keptProfile(h) != nil; here != (i >= 3) {
			t.Errorf("profile %d is here: %v", i, here)
		}
	}
}
