package fetch

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/imgfs/imgfs/fetch/registrytest"
)

func TestChoose(t *testing.T) {
	entry := func(p string) v1.Descriptor {
		d := v1.Descriptor{MediaType: types.OCIManifestSchema1}
		if p != "" {
			q, err := v1.ParsePlatform(p)
			if err != nil {
				t.Fatal(err)
			}
			d.Platform = q
		}
		return d
	}
	for _, r := range []struct{ want, have, best string }{
		{"linux/amd64", "linux/arm64 linux/amd64 unknown/unknown", "linux/amd64"},
		{"linux/amd64", "windows/amd64 linux/386", ""},
		{"linux/amd64", "linux/amd64/v2 linux/amd64/v1", "linux/amd64/v1"},
		{"linux/amd64/v3", "linux/amd64 linux/amd64/v2 linux/amd64/v4", "linux/amd64/v2"},
		{"linux/amd64", "linux/x86_64", "linux/x86_64"},
		{"linux/amd64", "linux/amd64/v2", ""},
		{"linux/arm/v7", "linux/arm/v5 linux/arm/v6 linux/arm64", "linux/arm/v6"},
		{"linux/arm/v7", "linux/arm/v6 linux/arm/v7", "linux/arm/v7"},
		{"linux/arm", "linux/arm/v6 linux/arm/7", "linux/arm/7"},
		{"linux/arm/v6", "linux/arm/v7 linux/arm/v5", "linux/arm/v5"},
		{"linux/arm/v6", "linux/arm/v7", ""},
		{"linux/armhf", "linux/arm/v6 linux/arm/v7", "linux/arm/v7"},
		{"linux/arm64", "linux/arm/v8 linux/arm64", "linux/arm64"},
		{"linux/arm64", "linux/arm64/v8", "linux/arm64/v8"},
		{"linux/arm64/v9", "linux/arm64/v8", "linux/arm64/v8"},
		{"linux/arm64/v8.2", "linux/arm64 linux/arm64/v8.1 linux/arm64/v8.5", "linux/arm64/v8.1"},
		{"linux/arm64", "linux/arm64/v9", ""},
		{"linux/s390x", "linux/s390x", "linux/s390x"},
		{"linux/riscv64", "linux/riscv64/rva20", ""},
		{"linux/riscv64/rva20", "linux/riscv64 linux/riscv64/rva20", "linux/riscv64/rva20"},
	} {
		w, _ := v1.ParsePlatform(r.want)
		var entries []v1.Descriptor
		have := strings.Fields(r.have)
		for _, p := range have {
			entries = append(entries, entry(p))
		}
		got := ""
		if i := choose(normalize(*w), entries); i >= 0 {
			got = have[i]
		}
		if got != r.best {
			t.Errorf("choose(%s, %s) = %q, want %q", r.want, r.have, got, r.best)
		}
	}
	if p := normalize(v1.Platform{}); p.OS != "linux" || p.Architecture == "" {
		t.Errorf("the default platform is %v", p)
	}
}

// add is an index entry for an image or an index.
func add(t testing.TB, what mutate.Appendable, platform string) mutate.IndexAddendum {
	t.Helper()
	a := mutate.IndexAddendum{Add: what}
	if platform != "" {
		p, err := v1.ParsePlatform(platform)
		if err != nil {
			t.Fatal(err)
		}
		a.Platform = p
	}
	return a
}

func TestResolveIndex(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{})
	c := client(t, s, Options{})
	amd, arm, att := image(t, 2), image(t, 1), image(t, 1)
	flat := mutate.AppendManifests(empty.Index,
		add(t, att, "unknown/unknown"), add(t, arm, "linux/arm64/v8"), add(t, amd, "linux/amd64"))
	docker := mutate.IndexMediaType(flat, types.DockerManifestList)
	nested := mutate.AppendManifests(empty.Index, add(t, flat, ""))
	nested = mutate.AppendManifests(empty.Index, add(t, arm, "linux/riscv64"), add(t, nested, ""))
	deep := v1.ImageIndex(flat)
	for range maxDepth {
		deep = mutate.AppendManifests(empty.Index, add(t, deep, ""))
	}
	bare := mutate.AppendManifests(empty.Index, add(t, att, "unknown/unknown"), add(t, amd, ""))

	for _, r := range []struct {
		tag, platform string
		index         v1.ImageIndex
		want          v1.Image
		kind          string
		manifests     int
	}{
		{"flat", "linux/amd64", flat, amd, "", 2},
		{"flat", "linux/arm64", flat, arm, "", 2},
		{"flat", "linux/s390x", flat, nil, "platform not exist", 1},
		{"docker", "linux/amd64", docker, amd, "", 2},
		{"nested", "linux/amd64", nested, amd, "", 4},
		{"nested", "linux/riscv64", nested, arm, "", 2},
		{"nested", "linux/386", nested, nil, "platform not exist", 3},
		{"deep", "linux/amd64", deep, nil, "not image invalid", maxDepth},
		{"bare", "linux/amd64", bare, amd, "", 2},
		{"empty", "linux/amd64", empty.Index, nil, "platform not exist", 1},
	} {
		t.Run(r.tag+" "+r.platform, func(t *testing.T) {
			ref := s.Push(t, "a/b:"+r.tag, r.index)
			s.Reset()
			p, _ := v1.ParsePlatform(r.platform)
			img, err := c.Resolve(t.Context(), ref, *p)
			wantKind(t, err, r.kind)
			if n := s.Requests("/manifests/"); n != r.manifests {
				t.Errorf("%d manifest requests, want %d", n, r.manifests)
			}
			if err != nil {
				if r.tag == "flat" && !strings.Contains(err.Error(), "linux/arm64/v8, linux/amd64") {
					t.Errorf("error %v does not list what there is", err)
				}
				return
			}
			checkImage(t, img, r.want)
			if top, _ := r.index.Digest(); img.Top.Digest != top || hashOf(img.TopRaw) != top {
				t.Errorf("Top %v, want %v", img.Top.Digest, top)
			}
		})
	}
}

func checkImage(t testing.TB, img *Image, want v1.Image) {
	t.Helper()
	h, _ := want.Digest()
	raw, _ := want.RawManifest()
	config, _ := want.RawConfigFile()
	layers, _ := want.Layers()
	if img.Desc.Digest != h || !bytes.Equal(img.RawManifest, raw) || !bytes.Equal(img.RawConfig, config) || img.Desc.Size != int64(len(raw)) {
		t.Errorf("image %v of %d bytes, want %v of %d", img.Desc.Digest, img.Desc.Size, h, len(raw))
	}
	if len(img.Manifest.Layers) != len(layers) || len(img.Config.RootFS.DiffIDs) != len(layers) {
		t.Errorf("%d layers, want %d", len(img.Manifest.Layers), len(layers))
	}
}

// A manifest by itself is the image, whatever its platform; by tag and by digest.
func TestResolveManifest(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{})
	c := client(t, s, Options{})
	img := image(t, 3)
	byTag := s.Push(t, "a/b:v1", img)
	h, _ := img.Digest()
	for _, r := range []name.Reference{byTag, s.Ref(t, "a/b@"+h.String())} {
		got, err := c.Resolve(t.Context(), r, v1.Platform{OS: "plan9", Architecture: "mips"})
		if err != nil {
			t.Fatal(err)
		}
		checkImage(t, got, img)
		if got.Ref != r || got.Top.Digest != h {
			t.Errorf("Ref %v, Top %v; want %v, %v", got.Ref, got.Top.Digest, r, h)
		}
	}
	oci := mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), types.OCIConfigJSON)
	got, err := c.Resolve(t.Context(), s.Push(t, "a/b:oci", oci), v1.Platform{})
	if err != nil {
		t.Fatal(err)
	}
	checkImage(t, got, oci)
}

// A config that is other bytes than its digest says is never taken.
func TestResolveConfigFaults(t *testing.T) {
	type F = registrytest.Fault
	for _, r := range []struct {
		name     string
		fault    *F
		kind     string
		requests int
	}{
		{"wrong bytes", &F{Corrupt: true}, "digest", 1},
		{"404", &F{Status: 404}, "not exist", 1},
		{"longer", &F{Longer: 5}, "not image invalid", 1},
		{"truncated once", &F{Cut: 20, Times: 1}, "", 2},
	} {
		t.Run(r.name, func(t *testing.T) {
			bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
				ref := s.Push(t, "a/b:v1", image(t, 1))
				r.fault.Path = "/blobs/"
				s.Add(r.fault)
				_, err := c.Resolve(t.Context(), ref, v1.Platform{})
				wantKind(t, err, r.kind)
				if n := s.Requests("/blobs/"); n != r.requests {
					t.Errorf("%d config requests, want %d", n, r.requests)
				}
			})
		})
	}
}

const sum = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// manifests that are refused, and some that are not; the type is the header's.
var documents = []struct{ name, kind, raw, want string }{
	{"image", "", `{"schemaVersion":2,"config":{"size":2,"digest":"` + sum + `"},"layers":[]}`, "manifest"},
	{"image without layers", "", `{"schemaVersion":2,"config":{"size":2,"digest":"` + sum + `"}}`, "manifest"},
	{"index", "", `{"schemaVersion":2,"manifests":[]}`, "index"},
	{"index by header", "application/vnd.oci.image.index.v1+json; charset=utf-8", `{"manifests":[]}`, "index"},
	{"header is nonsense", "text/html", `{"manifests":[]}`, "index"},
	{"both", "", `{"manifests":[],"config":{"size":2,"digest":"` + sum + `"},"layers":[]}`, ""},
	{"neither", "", `{}`, ""},
	{"null", "", `null`, ""},
	{"type and shape differ", "", `{"mediaType":"application/vnd.oci.image.index.v1+json","config":{},"layers":[]}`, ""},
	{"header and shape differ", string(types.OCIImageIndex), `{"config":{},"layers":[]}`, ""},
	{"schema 1", "", `{"schemaVersion":1,"fsLayers":[{"blobSum":"x"}],"history":[]}`, ""},
	{"schema 1 by header", string(types.DockerManifestSchema1Signed), `{"config":{},"layers":[]}`, ""},
	{"other type", "", `{"mediaType":"application/vnd.oci.artifact.manifest.v1+json","blobs":[]}`, ""},
	{"artifact", "", `{"config":{"mediaType":"application/vnd.cncf.helm.config.v1+json","size":2,"digest":"` + sum + `"},"layers":[]}`, ""},
	{"no digest", "", `{"config":{"size":2},"layers":[]}`, ""},
	{"sha512", "", `{"config":{"size":2,"digest":"sha512:` + strings.Repeat("0", 128) + `"},"layers":[]}`, ""},
	{"short digest", "", `{"config":{"size":2,"digest":"sha256:00"},"layers":[]}`, ""},
	{"negative size", "", `{"config":{"size":-1,"digest":"` + sum + `"},"layers":[]}`, ""},
	{"huge config", "", `{"config":{"size":9000000000,"digest":"` + sum + `"},"layers":[]}`, ""},
	{"huge layer", "", `{"config":{"size":1,"digest":"` + sum + `"},"layers":[{"size":9223372036854775807,"digest":"` + sum + `"}]}`, ""},
	{"overflow", "", `{"config":{"size":1e40,"digest":"` + sum + `"},"layers":[]}`, ""},
	{"huge entry", "", `{"manifests":[{"size":5000000,"digest":"` + sum + `"}]}`, ""},
}

func TestParseDocument(t *testing.T) {
	many := func(n int) string {
		return strings.TrimSuffix(strings.Repeat(`{"size":1,"digest":"`+sum+`"},`, n), ",")
	}
	rows := append(documents[:len(documents):len(documents)],
		struct{ name, kind, raw, want string }{"513 layers", "", `{"config":{"size":1,"digest":"` + sum + `"},"layers":[` + many(513) + `]}`, ""},
		struct{ name, kind, raw, want string }{"512 layers", "", `{"config":{"size":1,"digest":"` + sum + `"},"layers":[` + many(512) + `]}`, "manifest"},
		struct{ name, kind, raw, want string }{"1025 entries", "", `{"manifests":[` + many(1025) + `]}`, ""},
	)
	for _, r := range rows {
		doc, err := parseDocument([]byte(r.raw), r.kind)
		got := ""
		if err == nil && doc.index != nil {
			got = "index"
		} else if err == nil && doc.manifest != nil {
			got = "manifest"
		}
		if got != r.want {
			t.Errorf("%s: parseDocument = %q (%v), want %q", r.name, got, err, r.want)
		}
		if err != nil {
			wantKind(t, err.named("resolve", "x"), "not image invalid")
		}
	}
}

func FuzzDocument(f *testing.F) {
	for _, r := range documents {
		f.Add([]byte(r.raw), r.kind)
	}
	f.Fuzz(func(t *testing.T, raw []byte, kind string) {
		doc, err := parseDocument(raw, kind)
		if err != nil {
			return
		}
		if (doc.index == nil) == (doc.manifest == nil) || isIndex(doc.kind) != (doc.index != nil) {
			t.Fatalf("parseDocument(%q, %q) = %+v", raw, kind, doc)
		}
		if doc.index != nil {
			if len(doc.index.Manifests) > maxEntries {
				t.Fatalf("%d entries", len(doc.index.Manifests))
			}
			if i := choose(DefaultPlatform(), doc.index.Manifests); i >= 0 && attestation(doc.index.Manifests[i]) {
				t.Fatal("an attestation is chosen")
			}
			if s := platforms(doc.index.Manifests); len(s) > 33*300 || strings.ContainsAny(s, "\n\x00\x1b") {
				t.Fatalf("platforms = %q", s)
			}
			return
		}
		for _, d := range append(doc.manifest.Layers, doc.manifest.Config) {
			if d.Size < 0 || d.Size > maxLayer || len(d.Digest.Hex) != 64 || len(doc.manifest.Layers) > maxLayers {
				t.Fatalf("descriptor %+v", d)
			}
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"rootfs":{"type":"layers","diff_ids":["`+sum+`"]}}`), 1)
	f.Add([]byte(`null`), 0)
	f.Fuzz(func(t *testing.T, raw []byte, layers int) {
		if c, err := parseConfig(raw, layers); err == nil && (c == nil || len(c.RootFS.DiffIDs) != layers) {
			t.Fatalf("parseConfig(%q, %d) = %+v", raw, layers, c)
		}
	})
}

// An index that lies about what it lists, and a config that does not fit.
func TestResolveLies(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{})
	c := client(t, s, Options{})
	img := image(t, 2)
	s.Push(t, "a/b:v1", img)
	h, _ := img.Digest()
	size, _ := img.Size()
	p := fmt.Sprintf(`,"platform":{"os":"linux","architecture":%q}`, DefaultPlatform().Architecture)
	index := func(kind types.MediaType, size int64, platform string) string {
		return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"size":%d,"digest":%q%s}]}`,
			types.OCIImageIndex, kind, size, h, platform)
	}
	m, _ := img.Manifest()
	m = m.DeepCopy()
	m.Layers = m.Layers[:1]
	short, _ := json.Marshal(m)
	for _, r := range []struct{ name, raw, kind string }{
		{"good", index(types.DockerManifestSchema2, size, p), ""},
		{"other size", index(types.DockerManifestSchema2, size+1, p), "digest"},
		{"an index that is a manifest", index(types.OCIImageIndex, size, ""), "not image invalid"},
		{"fewer layers than diffIDs", string(short), "not image invalid"},
	} {
		t.Run(r.name, func(t *testing.T) {
			kind := types.OCIImageIndex
			if r.raw == string(short) {
				kind = types.DockerManifestSchema2
			}
			s.PutManifest(t, "a/b", "lie", string(kind), []byte(r.raw))
			_, err := c.Resolve(t.Context(), s.Ref(t, "a/b:lie"), v1.Platform{})
			wantKind(t, err, r.kind)
		})
	}
}

func TestHasRepositoryAndNamespace(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{Auth: registrytest.Bearer})
	c := client(t, s, Options{})
	for _, repo := range []string{"a-b/x", "a/b", "a/c/d", "ab", "z"} {
		s.Push(t, repo+":v1", image(t, 1))
	}
	for repo, want := range map[string]bool{"a/b": true, "a/c/d": true, "a/c": false, "a": false, "q": false} {
		if got, err := c.HasRepository(t.Context(), s.Ref(t, repo+":x").Context()); got != want || err != nil {
			t.Errorf("HasRepository(%s) = %v, %v, want %v", repo, got, err, want)
		}
	}
	reg := s.Ref(t, "a:x").Context().Registry
	for prefix, want := range map[string]bool{"a": true, "a/c": true, "a-b": true, "ab": false, "zz": false, "a/b": false, "0": false} {
		got, known, err := c.HasNamespace(t.Context(), reg, prefix)
		if got != want || !known || err != nil {
			t.Errorf("HasNamespace(%s) = %v, %v, %v, want %v", prefix, got, known, err, want)
		}
	}
	type F = registrytest.Fault
	for _, f := range []*F{{Status: 404}, {Status: 403}, {Status: 501}, {Status: 200, Body: "<html>"}, {Status: 405}} {
		f.Path = "/_catalog"
		s.Clear()
		s.Add(f)
		if has, known, err := c.HasNamespace(t.Context(), reg, "a"); has || known || err != nil {
			t.Errorf("HasNamespace with %d = %v, %v, %v", f.Status, has, known, err)
		}
	}
	s.Clear()
	s.Add(&F{Path: "/_catalog", Reset: true})
	c.backoff = func(int) time.Duration { return 0 }
	_, _, err := c.HasNamespace(t.Context(), reg, "a")
	wantKind(t, err, "unreachable")
}
