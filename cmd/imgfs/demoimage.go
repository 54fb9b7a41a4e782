package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// demoTime is the time of everything in the demo's image, which is the same,
// byte for byte, at every start.
var demoTime = time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC)

// demoImages are the images of the demo by tag: base is one eStargz layer, and
// latest adds a layer of plain gzip.
func demoImages() (map[string]v1.Image, error) {
	base, err := demoImage(demoBase())
	if err != nil {
		return nil, err
	}
	latest, err := demoImage(demoBase(), demoTop())
	if err != nil {
		return nil, err
	}
	return map[string]v1.Image{"base": base, "latest": latest}, nil
}

// demoImage stacks layers; the first is made eStargz, the others plain gzip.
func demoImage(layers ...[]demoFile) (v1.Image, error) {
	img, err := mutate.ConfigFile(mutate.MediaType(empty.Image, types.OCIManifestSchema1), &v1.ConfigFile{
		Architecture: runtime.GOARCH, OS: "linux",
		Created: v1.Time{Time: demoTime},
		RootFS:  v1.RootFS{Type: "layers"},
		Config:  v1.Config{Env: []string{"PATH=/usr/bin:/bin"}, Cmd: []string{"/bin/hello"}},
	})
	if err != nil {
		return nil, err
	}
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	for i, files := range layers {
		archive, err := demoTar(files)
		if err != nil {
			return nil, err
		}
		pack := packGzip
		if i == 0 {
			pack = packEstargz
		}
		add, err := pack(archive)
		if err != nil {
			return nil, err
		}
		add.History = v1.History{
			Created: v1.Time{Time: demoTime}, CreatedBy: fmt.Sprintf("imgfs demo: layer %d", i+1),
		}
		if img, err = mutate.Append(img, add); err != nil {
			return nil, err
		}
	}
	return img, nil
}

// demoFile is an entry of a layer: a directory when name ends in a slash, a
// symbolic or hard link, or a file.
type demoFile struct {
	name     string
	mode     int64
	data     string
	symlink  string
	hardlink string
}

// demoBase is the lower layer.
func demoBase() []demoFile {
	// Noise, so that compression leaves something to fetch; seeded, so that it is
	// the same noise every time.
	noise := make([]byte, 1<<20)
	if _, err := rand.NewChaCha8([32]byte{}).Read(noise); err != nil {
		panic(err) // never fails, as its documentation says
	}
	return []demoFile{
		{name: "bin", mode: 0o777, symlink: "usr/bin"},
		{name: "etc/", mode: 0o755},
		{name: "etc/hostname", mode: 0o644, data: "demo\n"},
		{name: "etc/hosts", mode: 0o644, data: "127.0.0.1 localhost demo\n::1 localhost demo\n"},
		{name: "etc/motd", mode: 0o644, data: "This is the base image.\n"},
		{name: "etc/os-release", mode: 0o644, symlink: "../usr/lib/os-release"},
		{name: "etc/passwd", mode: 0o644, data: "root:x:0:0:root:/root:/bin/sh\ndemo:x:1000:1000:demo:/home/demo:/bin/sh\n"},
		{name: "home/", mode: 0o755},
		{name: "home/demo/", mode: 0o750},
		{name: "tmp/", mode: 0o1777},
		{name: "usr/", mode: 0o755},
		{name: "usr/bin/", mode: 0o755},
		{name: "usr/bin/hello", mode: 0o755, data: "#!/bin/sh\necho \"Hello from a file that was fetched when you ran it.\"\n"},
		{name: "usr/bin/hi", mode: 0o755, hardlink: "usr/bin/hello"},
		{name: "usr/lib/", mode: 0o755},
		{name: "usr/lib/os-release", mode: 0o644, data: "NAME=\"imgfs demo\"\nID=demo\nVERSION_ID=1\nPRETTY_NAME=\"imgfs demo 1\"\n"},
		{name: "usr/share/", mode: 0o755},
		{name: "usr/share/demo/", mode: 0o755},
		{name: "usr/share/demo/a/", mode: 0o755},
		{name: "usr/share/demo/a/b/", mode: 0o755},
		{name: "usr/share/demo/a/b/deep.txt", mode: 0o644, data: "Four directories down.\n"},
		{name: "usr/share/demo/noise", mode: 0o644, data: string(noise)},
	}
}

// demoTop is the upper layer: it adds, replaces and removes.
func demoTop() []demoFile {
	return []demoFile{
		{name: "etc/", mode: 0o755},
		{name: "etc/.wh.hostname", mode: 0o644},
		{name: "etc/motd", mode: 0o644, data: "This is the latest image: its upper layer replaced this file.\n"},
		{name: "home/", mode: 0o755},
		{name: "home/demo/", mode: 0o750},
		{name: "home/demo/README", mode: 0o644, data: "Added by the upper layer; etc/hostname was removed by it.\n"},
	}
}

func demoTar(files []demoFile) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, ModTime: demoTime, Size: int64(len(f.data)), Typeflag: tar.TypeReg}
		switch {
		case f.symlink != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.symlink
		case f.hardlink != "":
			h.Typeflag, h.Linkname = tar.TypeLink, f.hardlink
		case f.name[len(f.name)-1] == '/':
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, f.data); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), w.Close()
}

// blob is a layer whose compressed bytes are in memory; it is a v1.Layer.
type blob struct {
	data           []byte
	digest, diffID v1.Hash
}

func (b *blob) Digest() (v1.Hash, error)             { return b.digest, nil }
func (b *blob) DiffID() (v1.Hash, error)             { return b.diffID, nil }
func (b *blob) Size() (int64, error)                 { return int64(len(b.data)), nil }
func (b *blob) MediaType() (types.MediaType, error)  { return types.OCILayer, nil }
func (b *blob) Compressed() (io.ReadCloser, error)   { return io.NopCloser(bytes.NewReader(b.data)), nil }
func (b *blob) Uncompressed() (io.ReadCloser, error) { return gzip.NewReader(bytes.NewReader(b.data)) }

// addendum is the layer of data, whose content has the given diffID.
func addendum(data []byte, diffID v1.Hash) (mutate.Addendum, error) {
	digest, _, err := v1.SHA256(bytes.NewReader(data))
	if err != nil {
		return mutate.Addendum{}, err
	}
	return mutate.Addendum{Layer: &blob{data, digest, diffID}, MediaType: types.OCILayer}, nil
}

func packGzip(archive []byte) (mutate.Addendum, error) {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(archive); err != nil {
		return mutate.Addendum{}, err
	}
	if err := w.Close(); err != nil {
		return mutate.Addendum{}, err
	}
	diffID, _, err := v1.SHA256(bytes.NewReader(archive))
	if err != nil {
		return mutate.Addendum{}, err
	}
	return addendum(out.Bytes(), diffID)
}

func packEstargz(archive []byte) (mutate.Addendum, error) {
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(archive), 0, int64(len(archive))), estargz.WithChunkSize(256<<10))
	if err != nil {
		return mutate.Addendum{}, err
	}
	data, err := io.ReadAll(b)
	if err != nil {
		return mutate.Addendum{}, err
	}
	if err := b.Close(); err != nil {
		return mutate.Addendum{}, err
	}
	diffID, err := v1.NewHash(b.DiffID().String())
	if err != nil {
		return mutate.Addendum{}, err
	}
	add, err := addendum(data, diffID)
	add.Annotations = map[string]string{estargz.TOCJSONDigestAnnotation: b.TOCDigest().String()}
	return add, err
}
