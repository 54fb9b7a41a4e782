package integration

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// What may come of a bad image.
type outcome int

const (
	fails  outcome = iota // every use fails with EIO, EINVAL or the errno of the row, and .imgfs/errors says why
	either                // as above, or it is shown, and what is shown is right
	works                 // the oddity is legal
)

// A badImage is an image that no honest tool makes.
type badImage struct {
	name   string
	layers []blob
	want   outcome
	errno  error             // instead of EIO and EINVAL
	shown  map[string]string // the contents of files, if it is shown
}

// escape is a name that must never appear outside a cache directory.
const escape = "imgfs-escape"

func gzipLayer(t testing.TB, entries ...entry) blob {
	archive := tarball(t, entries...)
	return bytesBlob(mediaGzip, gzipped(archive), archive)
}

// badArchives are images whose archives are wrong.
func badArchives(t testing.TB) []badImage {
	x := map[string]string{"x": "x"}
	one := func(name string, want outcome, shown map[string]string, entries ...entry) badImage {
		return badImage{name: name, want: want, shown: shown, layers: []blob{gzipLayer(t, append([]entry{file("x", "x")}, entries...)...)}}
	}
	up := strings.Repeat("../", 12)
	return []badImage{
		one("dotdot", either, x, file(up+escape, "e")),
		one("dotdot-inside", either, x, file("a/../../"+escape, "e")),
		one("dotdot-link", either, x, hardlink("l", up+"etc/passwd")),
		one("absolute", works, map[string]string{"x": "x", "abs": "a"}, file("/abs", "a")),
		one("symlink-parent", either, x, symlink("out", up+"tmp"), file("out/"+escape, "e")),
		one("symlink-loop", either, x, symlink("loop", "loop"), file("loop/"+escape, "e")),
		one("long-component", either, x, file("a/"+strings.Repeat("c", 4096), "c")),
		one("deep", either, x, file(strings.Repeat("d/", 5000)+"f", "f")),
		one("link-nowhere", fails, nil, hardlink("l", "no/such/file")),
		one("link-itself", fails, nil, hardlink("l", "l")),
		one("link-directory", fails, nil, dir("d"), hardlink("l", "d")),
		one("link-cycle", fails, nil, hardlink("l1", "l2"), hardlink("l2", "l1")),
		one("whiteout-root", either, x, file(".wh..", "")),
		one("whiteout-nothing", either, x, file(".wh.", "")),
		one("whiteout-dotdot", either, x, file("a/.wh...", "")),
		one("root-is-a-file", either, x, file(".", "f")),
		one("root-is-a-link", either, x, symlink(".", "/etc")),
		one("file-below-file", either, x, file("x/y", "y")),
		one("huge-xattr", either, x, file("h", "h", xattr("user.huge", strings.Repeat("v", 900<<10)))),
		one("huge-device", either, x, special(tar.TypeChar, "dev", device(1<<20, 1<<20))),
		one("huge-owner", either, x, file("o", "o", func(h *tar.Header) { h.Uid = 1 << 40 })),
		one("far-time", either, x, file("t", "t", mtime(1<<50, 0)), file("u", "u", mtime(-1<<50, 0))),
		one("empty", works, nil),
	}
}

// badBlobs are images whose blobs are not what their descriptors say.
func badBlobs(t testing.TB, r *registry) []badImage {
	x := map[string]string{"x": "x"}
	archive := tarball(t, file("x", "x"), file("y", strings.Repeat("y", 100_000)))
	packed := gzipped(archive)
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	zpacked := enc.EncodeAll(archive, nil)
	own := tarball(t, file("x", "x"), file("y", "an archive of its own"))
	wrongDiff := bytesBlob(mediaGzip, gzipped(own), []byte("another archive"))
	huge := tarball(t, file("x", "x"))
	var lying bytes.Buffer
	h := file("big", "", size(1<<50))
	if err := tar.NewWriter(&lying).WriteHeader(&h.head); err != nil {
		t.Fatal(err)
	}
	huge = append(bytes.TrimRight(huge, "\x00"), make([]byte, 512-len(bytes.TrimRight(huge, "\x00"))%512)...)
	huge = append(huge, lying.Bytes()...)
	list := []badImage{
		{name: "type-says-tar", layers: []blob{bytesBlob(mediaTar, packed, archive)}, want: works, shown: x},
		{name: "type-says-zstd", layers: []blob{bytesBlob(mediaZstd, packed, archive)}, want: works, shown: x},
		{name: "type-says-gzip", layers: []blob{bytesBlob(mediaGzip, zpacked, archive)}, want: works, shown: x},
		{name: "type-says-docker", layers: []blob{bytesBlob(types.DockerLayer, archive, archive)}, want: works, shown: x},
		{name: "two-members", layers: []blob{bytesBlob(mediaGzip, append(gzipped(archive[:700]), gzipped(archive[700:])...), archive)}, want: works, shown: x},
		{name: "two-frames", layers: []blob{bytesBlob(mediaZstd, enc.EncodeAll(archive[700:], enc.EncodeAll(archive[:700], nil)), archive)}, want: works, shown: x},
		{name: "truncated", layers: []blob{bytesBlob(mediaGzip, packed[:len(packed)/2], archive)}, want: fails},
		{name: "garbage-after", layers: []blob{bytesBlob(mediaGzip, append(bytes.Clone(packed), "garbage"...), archive)}, want: either, shown: x},
		{name: "not-an-archive", layers: []blob{bytesBlob(mediaGzip, gzipped([]byte(strings.Repeat("no tar ", 1000))), archive)}, want: fails},
		{name: "random", layers: []blob{bytesBlob(mediaGzip, bigAt(t, 0, 50_000), archive)}, want: fails},
		{name: "wrong-diffid", layers: []blob{wrongDiff}, want: fails},
		{name: "petabyte", layers: []blob{bytesBlob(mediaGzip, gzipped(huge), huge)}, want: fails},
	}
	flipped := bytes.Clone(packed)
	flipped[len(flipped)/2] ^= 0x20
	for name, body := range map[string][]byte{"corrupt": flipped, "short": packed[:len(packed)-100], "long": append(bytes.Clone(packed), packed...), "nothing": nil} {
		// A layer of its own, so that its digest is no other image's.
		own := tarball(t, file("x", "x"), file("y", name+strings.Repeat("y", 100_000)))
		b := bytesBlob(mediaGzip, gzipped(own), own)
		r.answer("/blobs/"+b.Hash.String(), "application/octet-stream", body)
		list = append(list, badImage{name: "served-" + name, layers: []blob{b}, want: fails})
	}
	return list
}

// TestHostile walks into bad images, all on one mount: each gives a clear errno
// and a reason, or what is right; the mount lives, and nothing is written
// outside of its cache directory.
func TestHostile(t *testing.T) {
	r := startSmall(t)
	r.pushTar(t, "good/v1", []entry{file("x", "good")})
	m := startMount(t, "--timeout", "20s")
	for _, bad := range append(append(badArchives(t), badBlobs(t, r)...), badTables(t)...) {
		t.Run(bad.name, func(t *testing.T) {
			path := "bad-" + bad.name + "/v1"
			r.pushBlobs(t, path, bad.layers...)
			checkBad(t, m, r, bad, m.path(r.host, path))
		})
	}
	if data, err := os.ReadFile(m.path(r.host, "good/v1/x")); err != nil || string(data) != "good" {
		t.Errorf("the good image beside them: %q, %v", data, err)
	}
	checkNothingEscaped(t, m)
	if size := m.rss(); size > 200<<20 && !raceServer() {
		t.Errorf("RSS %d bytes after all of them", size)
	}
}

func checkBad(t *testing.T, m *mount, r *registry, bad badImage, root string) {
	t.Helper()
	var errs []error
	within(t, time.Minute, "use", func() error {
		_, err := os.ReadDir(root)
		errs = append(errs, err)
		for name, want := range bad.shown {
			data, err := os.ReadFile(filepath.Join(root, name))
			errs = append(errs, err)
			if err == nil && string(data) != want {
				t.Errorf("%s = %q, want %q", name, data, want)
			}
		}
		return nil
	})
	err := errors.Join(errs...)
	switch {
	case err == nil && bad.want == fails:
		t.Errorf("a bad image is shown: %v", names(t, root))
	case err != nil && bad.want == works:
		t.Errorf("a legal image fails: %v\n.imgfs/errors:\n%s", err, m.errors())
	case err != nil:
		clear := errors.Is(err, unix.EIO) || errors.Is(err, unix.EINVAL)
		if bad.errno != nil {
			clear = errors.Is(err, bad.errno)
		}
		if !clear {
			t.Errorf("errno: %v, want EIO or EINVAL (or %v)", err, bad.errno)
		}
		text := m.errors()
		why := strings.Contains(text, "bad-"+bad.name)
		for _, l := range bad.layers { // a file's inode is its layer's, not an image's
			why = why || strings.Contains(text, l.Hash.Hex)
		}
		if !why {
			t.Errorf(".imgfs/errors does not say why bad-%s failed:\n%s", bad.name, text)
		}
	}
	if _, err := os.ReadFile(m.path(r.host, "good/v1/x")); err != nil {
		t.Errorf("the good image, after it: %v", err)
	}
}

func checkNothingEscaped(t *testing.T, m *mount) {
	t.Helper()
	wantNames(t, filepath.Dir(m.dir), "cache", "home", "log", "mnt")
	for _, dir := range []string{"/", "/tmp", "/etc", scratch.dir, filepath.Dir(m.dir), m.cache} {
		if _, err := os.Lstat(filepath.Join(dir, escape)); err == nil {
			t.Errorf("a layer has written %s/%s", dir, escape)
		}
	}
}

// TestHostileManifests walks to what is no image.
func TestHostileManifests(t *testing.T) {
	r := startSmall(t)
	m := startMount(t, "--timeout", "10s")
	nested := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.index.v1+json","size":10,"digest":"sha256:` + strings.Repeat("0", 64) + `","platform":{"os":"linux","architecture":"amd64"}}]}`
	for _, row := range []struct{ name, media, body string }{
		{"schema1", "application/vnd.docker.distribution.manifest.v1+prettyjws", `{"schemaVersion":1,"name":"a","tag":"v1","fsLayers":[]}`},
		{"not-json", string(types.OCIManifestSchema1), `<html>no</html>`},
		{"empty", string(types.OCIManifestSchema1), ``},
		{"array", string(types.OCIManifestSchema1), `[]`},
		{"artifact", string(types.OCIManifestSchema1), `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"application/x-thing","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`},
		{"negative-size", string(types.OCIManifestSchema1), `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:` + strings.Repeat("0", 64) + `","size":-5},"layers":[]}`},
		{"bad-digest", string(types.OCIManifestSchema1), `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:../../../` + escape + `","size":5},"layers":[]}`},
		{"missing-nested", string(types.OCIImageIndex), nested},
		{"huge", string(types.OCIManifestSchema1), `{"schemaVersion":2,"annotations":{"a":"` + strings.Repeat("a", 20<<20) + `"}}`},
		{"text", "text/html", `<html>a captive portal</html>`},
	} {
		t.Run(row.name, func(t *testing.T) {
			r.answer("/v2/"+row.name+"/manifests/v1", row.media, []byte(row.body))
			within(t, 30*time.Second, "ls", func() error {
				_, err := os.ReadDir(m.path(r.host, row.name, "v1"))
				if err == nil {
					t.Error("what is no image is shown")
				} else if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOENT) {
					t.Errorf("ls: %v, want EINVAL, EIO or ENOENT", err)
				}
				return nil
			})
			if text := m.errors(); !strings.Contains(text, row.name) {
				t.Errorf(".imgfs/errors does not say why:\n%s", text)
			}
		})
	}
	checkNothingEscaped(t, m)
}

// TestHostileBomb streams a layer of 1 MB that unpacks to 1 GiB into a small cache.
func TestHostileBomb(t *testing.T) {
	const unpacked = 1 << 30
	r := startSmall(t)
	var packed bytes.Buffer
	if err := writeBomb(&packed, unpacked); err != nil {
		t.Fatal(err)
	}
	b := bytesBlob(mediaGzip, packed.Bytes(), nil)
	diff, err := bombDiff(unpacked)
	if err != nil {
		t.Fatal(err)
	}
	b.Diff = diff
	r.pushBlobs(t, "bomb/v1", b)
	m := startMount(t, "--cache-size", "64MiB")
	within(t, 2*time.Minute, "reading a bomb", func() error {
		f, err := os.Open(m.path(r.host, "bomb/v1/zeros"))
		if err != nil {
			return err
		}
		defer f.Close()
		n, err := io.Copy(io.Discard, f)
		if err == nil && n != unpacked {
			return fmt.Errorf("%d bytes, want %d", n, unpacked)
		}
		return err
	})
	if n := diskUsage(t, m.cache); n > 96<<20 {
		t.Errorf("the cache takes %d bytes on the disk, want at most 64 MiB and indexes", n)
	}
	if size := m.rss(); size > 200<<20 && !raceServer() {
		t.Errorf("RSS %d bytes", size)
	}
}

// TestHostileChain pulls an image whose config claims the uncompressed digests of
// another image's layers, then that other image: it must not see the first's files.
func TestHostileChain(t *testing.T) {
	r := startSmall(t)
	lower := estargzLayer(t, file("lower", "lower"))
	honest := estargzLayer(t, file("f", "honest"))
	liar := estargzLayer(t, file("f", "a lie, and longer"), file("planted", "p"))
	liar.Diff = honest.Diff
	r.pushBlobs(t, "liar/v1", lower, liar)
	r.pushBlobs(t, "honest/v1", lower, honest)
	m := startMount(t)
	os.ReadDir(m.path(r.host, "liar/v1"))
	os.ReadFile(m.path(r.host, "liar/v1/f"))
	if data, err := os.ReadFile(m.path(r.host, "honest/v1/f")); err != nil || string(data) != "honest" {
		t.Errorf("honest/v1/f = %q, %v, want honest", data, err)
	}
	wantNames(t, m.path(r.host, "honest/v1"), "f", "lower")
}
