package integration

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// formats are the forms that every layer is tested in.
var formats = []string{"gzip", "zstd", "tar", "estargz", "zstdchunked"}

const (
	mediaGzip types.MediaType = "application/vnd.oci.image.layer.v1.tar+gzip"
	mediaZstd types.MediaType = "application/vnd.oci.image.layer.v1.tar+zstd"
	mediaTar  types.MediaType = "application/vnd.oci.image.layer.v1.tar"
)

// A blob is a layer as a registry has it: a file of the corpus, or bytes.
// It implements v1.Layer.
type blob struct {
	Media       types.MediaType
	Hash, Diff  v1.Hash
	Length      int64
	Annotations map[string]string
	Path        string
	data        []byte
}

func (b blob) Digest() (v1.Hash, error)             { return b.Hash, nil }
func (b blob) DiffID() (v1.Hash, error)             { return b.Diff, nil }
func (b blob) Size() (int64, error)                 { return b.Length, nil }
func (b blob) MediaType() (types.MediaType, error)  { return b.Media, nil }
func (b blob) Uncompressed() (io.ReadCloser, error) { return nil, errors.New("not here") }
func (b blob) Compressed() (io.ReadCloser, error) {
	if b.Path == "" {
		return io.NopCloser(bytes.NewReader(b.data)), nil
	}
	return os.Open(b.Path)
}

// bytesBlob is a layer of the given bytes; archive is what they are uncompressed.
func bytesBlob(media types.MediaType, data, archive []byte) blob {
	hash, n, _ := v1.SHA256(bytes.NewReader(data))
	diff, _, _ := v1.SHA256(bytes.NewReader(archive))
	return blob{Media: media, Hash: hash, Diff: diff, Length: n, data: data}
}

// gzipped compresses into memory.
func gzipped(data []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(data)
	w.Close()
	return b.Bytes()
}

// layer returns a layer of the corpus in a format, made if it is not here.
func (c *corpus) layer(t testing.TB, name, format string) blob {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	key := name + "." + format
	if b, ok := c.layers[key]; ok {
		return b
	}
	desc := filepath.Join(c.dir, key+".json")
	if b, err := readBlob(desc); err == nil {
		c.layers[key] = b
		return b
	}
	archive := c.tar(t, name)
	if name == "sparse" && (format == "estargz" || format == "zstdchunked") {
		archive = c.tar(t, "unsparse") // neither tool can write holes
	}
	unlock, err := lockFile(filepath.Join(c.dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	b, err := c.convert(archive, filepath.Join(c.dir, key), format)
	if err != nil {
		t.Fatalf("making layer %s in format %s: %v", name, format, err)
	}
	data, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeFile(desc, func(w io.Writer) error { _, err := w.Write(data); return err }); err != nil {
		t.Fatal(err)
	}
	c.layers[key] = b
	return b
}

func readBlob(desc string) (b blob, err error) {
	data, err := os.ReadFile(desc)
	if err != nil {
		return b, err
	}
	if err := json.Unmarshal(data, &b); err != nil {
		return b, err
	}
	_, err = os.Stat(b.Path)
	return b, err
}

func (c *corpus) convert(archive, path, format string) (b blob, err error) {
	b = blob{Path: path}
	switch format {
	case "tar":
		b.Media, b.Path = mediaTar, archive
	case "gzip":
		b.Media = mediaGzip
		err = compress(archive, path, func(w io.Writer) (io.WriteCloser, error) { return kgzip.NewWriterLevel(w, 6) })
	case "zstd":
		b.Media = mediaZstd
		err = compress(archive, path, func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) })
	case "estargz":
		b.Media = mediaGzip
		b.Diff, b.Annotations, err = toEstargz(archive, path)
	case "zstdchunked":
		b.Media = mediaZstd
		b.Annotations, err = toZstdChunked(archive, path)
	default:
		err = errors.New("unknown format")
	}
	if err != nil {
		return b, err
	}
	if b.Diff == (v1.Hash{}) {
		if b.Diff, _, err = hashFile(archive); err != nil {
			return b, err
		}
	}
	if b.Hash, b.Length, err = hashFile(b.Path); err != nil {
		return b, err
	}
	return b, b.check()
}

// check reports whether the blob is what it says: a fault of a tool that makes
// layers must not be taken for one of the mount.
func (b blob) check() error {
	f, err := os.Open(b.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	r := io.Reader(f)
	switch b.Media {
	case mediaGzip:
		r, err = kgzip.NewReader(f)
	case mediaZstd:
		var d *zstd.Decoder
		d, err = zstd.NewReader(f)
		r = d
		if err == nil {
			defer d.Close()
		}
	}
	if err != nil {
		return err
	}
	diff, _, err := v1.SHA256(r)
	if err == nil && diff != b.Diff {
		err = fmt.Errorf("uncompressed, the blob has the digest %v, want %v", diff, b.Diff)
	}
	return err
}

func hashFile(path string) (v1.Hash, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return v1.Hash{}, 0, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h.Sum(nil))}, n, err
}

func compress(archive, path string, format func(io.Writer) (io.WriteCloser, error)) error {
	in, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer in.Close()
	return writeFile(path, func(out io.Writer) error {
		w, err := format(out)
		if err != nil {
			return err
		}
		if _, err := io.Copy(w, in); err != nil {
			return err
		}
		return w.Close()
	})
}

// toEstargz converts as ctr-remote and buildkit do, with the same package.
func toEstargz(archive, path string) (diff v1.Hash, annotations map[string]string, err error) {
	in, err := os.Open(archive)
	if err != nil {
		return diff, nil, err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return diff, nil, err
	}
	built, err := estargz.Build(io.NewSectionReader(in, 0, info.Size()), estargz.WithCompressionLevel(gzip.DefaultCompression))
	if err != nil {
		return diff, nil, err
	}
	defer built.Close()
	if err := writeFile(path, func(w io.Writer) error { _, err := io.Copy(w, built); return err }); err != nil {
		return diff, nil, err
	}
	diff, err = v1.NewHash(built.DiffID().String())
	uncompressed, serr := built.UncompressedSize()
	return diff, map[string]string{
		estargz.TOCJSONDigestAnnotation:         built.TOCDigest().String(),
		estargz.StoreUncompressedSizeAnnotation: fmt.Sprint(uncompressed),
	}, errors.Join(err, serr)
}

// toZstdChunked converts by skopeo, whose library is the one that podman and
// buildah push with.
func toZstdChunked(archive, path string) (map[string]string, error) {
	tmp, err := os.MkdirTemp(filepath.Dir(path), "skopeo-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	b := blob{Path: archive, Media: mediaTar}
	if b.Hash, b.Length, err = hashFile(archive); err != nil {
		return nil, err
	}
	b.Diff = b.Hash
	img, err := newImage(b)
	if err != nil {
		return nil, err
	}
	if err := writeLayout(filepath.Join(tmp, "from"), img); err != nil {
		return nil, err
	}
	out, err := exec.Command("skopeo", "--insecure-policy", "copy", "-q", "--dest-compress-format", "zstd:chunked",
		"oci:"+tmp+"/from:image", "oci:"+tmp+"/to:image").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("skopeo: %w: %s", err, out)
	}
	to, err := layout.FromPath(filepath.Join(tmp, "to"))
	if err != nil {
		return nil, err
	}
	index, err := to.ImageIndex()
	if err != nil {
		return nil, err
	}
	list, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	converted, err := to.Image(list.Manifests[0].Digest)
	if err != nil {
		return nil, err
	}
	m, err := converted.Manifest()
	if err != nil {
		return nil, err
	}
	desc := m.Layers[0]
	annotations := map[string]string{}
	for _, key := range []string{"manifest-position", "manifest-checksum"} {
		// Before 1.10 skopeo wrote the same under a shorter name.
		value := cmp.Or(desc.Annotations["io.github.containers.zstd-chunked."+key], desc.Annotations["io.containers.zstd-chunked."+key])
		if value == "" {
			return nil, fmt.Errorf("skopeo made a layer %s without %s: %v", desc.MediaType, key, desc.Annotations)
		}
		annotations["io.github.containers.zstd-chunked."+key] = value
	}
	return annotations, os.Rename(filepath.Join(tmp, "to/blobs/sha256", desc.Digest.Hex), path)
}

// newImage makes an OCI image of layers, lowest first, for this machine's platform.
func newImage(layers ...blob) (v1.Image, error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	conf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	conf = conf.DeepCopy()
	conf.OS, conf.Architecture = "linux", runtime.GOARCH
	conf.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	if img, err = mutate.ConfigFile(img, conf); err != nil {
		return nil, err
	}
	for _, l := range layers {
		img, err = mutate.Append(img, mutate.Addendum{Layer: l, MediaType: l.Media, Annotations: l.Annotations,
			History: v1.History{CreatedBy: "imgfs test layer " + filepath.Base(l.Path)}})
		if err != nil {
			return nil, err
		}
	}
	return img, nil
}

// image is an image of the corpus in a format.
func (c *corpus) image(t testing.TB, name, format string) v1.Image {
	t.Helper()
	var layers []blob
	for _, l := range images[name] {
		layers = append(layers, c.layer(t, l, format))
	}
	img, err := newImage(layers...)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// writeLayout writes an OCI layout of one image, tagged "image".
func writeLayout(dir string, img v1.Image) error {
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "image"}))
}

// pushDockerIndex pushes the image nginx with Docker's media types, in a manifest
// list whose other platforms hold something else, and returns the list's digest.
func pushDockerIndex(t testing.TB, repo, tag string) string {
	t.Helper()
	c := openCorpus(t)
	var layers []blob
	for _, l := range images["nginx"] {
		b := c.layer(t, l, "gzip")
		b.Media = types.DockerLayer
		layers = append(layers, b)
	}
	docker := func(layers ...blob) v1.Image {
		img, err := newImage(layers...)
		if err != nil {
			t.Fatal(err)
		}
		return mutate.ConfigMediaType(mutate.MediaType(img, types.DockerManifestSchema2), types.DockerConfigJSON)
	}
	archive := tarball(t, file("etc/os-release", "another platform\n"))
	other := docker(bytesBlob(types.DockerLayer, gzipped(archive), archive))
	index := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.DockerManifestList),
		mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "windows", Architecture: runtime.GOARCH}}},
		mutate.IndexAddendum{Add: docker(layers...), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}},
	)
	ref, err := name.NewTag(backend.start(t)+"/"+repo+":"+tag, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, index); err != nil {
		t.Fatal(err)
	}
	digest, err := index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return digest.String()
}
