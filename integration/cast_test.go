package integration

import (
	"bytes"
	endian "encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	kgzip "github.com/klauspost/compress/gzip"
)

// The cast: images that scripts and the guide push into their registry. They are
// the same, to the byte, on every machine, with histories such as docker build
// writes them.

// A castStep is a step of an image's history; it has a layer when it has entries.
type castStep struct {
	by      string
	entries []entry
}

type castImage struct {
	created string
	conf    v1.Config
	steps   []castStep
}

// castArch is what the cast is made for, on every machine: an ID depends on it.
const castArch = "amd64"

// filler is the content of a file: n bytes that compress to about half.
func filler(name string, n int) string {
	var seed [32]byte
	copy(seed[:], name)
	r := rand.NewChaCha8(seed)
	var b strings.Builder
	b.Grow(n + 16)
	for b.Len() < n {
		var word [8]byte
		endian.LittleEndian.PutUint64(word[:], r.Uint64())
		b.WriteString(hex.EncodeToString(word[:]))
	}
	return b.String()[:n]
}

func bulk(name string, n int, opts ...option) entry { return file(name, filler(name, n), opts...) }

const pathVariable = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// debianSteps are the lowest steps of several images of the cast.
func debianSteps() []castStep {
	return []castStep{{"# debian.sh --arch 'amd64' out/ 'bookworm' '@1709164800'", []entry{
		dir("bin"), dir("etc"), dir("usr"), dir("usr/bin"), dir("usr/lib"), dir("var"),
		file("etc/debian_version", "12.5\n"), file("etc/os-release", "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\n"),
		bulk("bin/sh", 125_688, mode(0o755)), bulk("usr/bin/perl", 3_796_200, mode(0o755)), bulk("usr/lib/libc.so.6", 1_922_136, mode(0o755)),
	}}}
}

func ubuntuSteps() []castStep {
	return []castStep{
		{"/bin/sh -c #(nop) ADD file:3c74e7e08cbf9a876 in / ", []entry{
			dir("bin"), dir("etc"), dir("lib"), dir("usr"), dir("usr/bin"), dir("tmp", mode(0o1777)),
			file("etc/os-release", "NAME=\"Ubuntu\"\nVERSION=\"18.04.6 LTS (Bionic Beaver)\"\nID=ubuntu\n"), symlink("etc/mtab", "/proc/mounts"),
			bulk("bin/bash", 1_113_504, mode(0o755)), bulk("lib/libc.so.6", 2_030_928, mode(0o755)),
		}},
		{"/bin/sh -c #(nop)  CMD [\"/bin/bash\"]", nil},
	}
}

func mongoSteps(version string) []castStep {
	return append(ubuntuSteps(),
		castStep{"/bin/sh -c groupadd -r mongodb && useradd -r -g mongodb mongodb", []entry{file("etc/passwd", "root:x:0:0:root:/root:/bin/bash\nmongodb:x:999:999::/home/mongodb:/bin/sh\n")}},
		castStep{"/bin/sh -c #(nop)  ENV MONGO_VERSION=" + version, nil},
		castStep{"/bin/sh -c set -x \t&& apt-get update \t&& apt-get install -y mongodb-org=$MONGO_VERSION", []entry{
			file("usr/bin/mongod", filler("mongod "+version, 4_194_304), mode(0o755)), file("etc/mongod.version", version+"\n")}},
		castStep{"/bin/sh -c #(nop)  VOLUME [/data/db /data/configdb]", nil},
		castStep{"/bin/sh -c #(nop)  EXPOSE 27017", nil},
		castStep{"/bin/sh -c #(nop)  CMD [\"mongod\"]", nil},
	)
}

// cast returns the images by name.
func cast() map[string]castImage {
	mongo := func(created, version string) castImage {
		return castImage{created, v1.Config{Env: []string{pathVariable, "MONGO_VERSION=" + version}, Cmd: []string{"mongod"},
			ExposedPorts: map[string]struct{}{"27017/tcp": {}}, Volumes: map[string]struct{}{"/data/db": {}, "/data/configdb": {}}}, mongoSteps(version)}
	}
	return map[string]castImage{
		"ubuntu": {"2023-05-30T09:32:09Z", v1.Config{Env: []string{pathVariable}, Cmd: []string{"/bin/bash"}}, ubuntuSteps()},
		"debian": {"2024-02-29T00:00:00Z", v1.Config{Env: []string{pathVariable}, Cmd: []string{"bash"}}, debianSteps()},
		"redis": {"2024-05-22T23:18:59Z", v1.Config{Env: []string{pathVariable, "REDIS_VERSION=7.2.5"}, Cmd: []string{"redis-server"}, WorkingDir: "/data",
			ExposedPorts: map[string]struct{}{"6379/tcp": {}}, Entrypoint: []string{"docker-entrypoint.sh"}}, append(debianSteps(),
			castStep{"RUN /bin/sh -c set -eux; groupadd -r -g 999 redis; useradd -r -g redis -u 999 redis # buildkit", []entry{file("etc/group", "root:x:0:\nredis:x:999:\n")}},
			castStep{"ENV REDIS_VERSION=7.2.5", nil},
			castStep{"RUN /bin/sh -c set -eux; wget -O redis.tar.gz \"$REDIS_DOWNLOAD_URL\"; make -C /usr/src/redis install # buildkit", []entry{
				dir("usr/local"), dir("usr/local/bin"), bulk("usr/local/bin/redis-server", 2_621_440, mode(0o755)), hardlink("usr/local/bin/redis-sentinel", "usr/local/bin/redis-server")}},
			castStep{"VOLUME [/data]", nil},
			castStep{"WORKDIR /data", []entry{dir("data", owner(999, 999))}},
			castStep{"COPY docker-entrypoint.sh /usr/local/bin/ # buildkit", []entry{file("usr/local/bin/docker-entrypoint.sh", "#!/bin/sh\nexec \"$@\"\n", mode(0o755))}},
			castStep{"ENTRYPOINT [\"docker-entrypoint.sh\"]", nil},
			castStep{"EXPOSE map[6379/tcp:{}]", nil},
			castStep{"CMD [\"redis-server\"]", nil})},
		"nginx": {"2024-05-29T17:40:02Z", v1.Config{Env: []string{pathVariable, "NGINX_VERSION=1.27.0"}, Cmd: []string{"nginx", "-g", "daemon off;"}}, append(debianSteps(),
			castStep{"ENV NGINX_VERSION=1.27.0", nil},
			castStep{"RUN /bin/sh -c apt-get update && apt-get install -y nginx=${NGINX_VERSION} # buildkit", []entry{
				dir("etc/nginx"), file("etc/nginx/nginx.conf", "worker_processes auto;\n"), dir("usr/sbin"), bulk("usr/sbin/nginx", 1_441_792, mode(0o755))}},
			castStep{"CMD [\"nginx\" \"-g\" \"daemon off;\"]", nil})},
		"mongo-old": mongo("2018-09-05T10:00:00Z", "3.2.20"),
		"mongo":     mongo("2018-12-26T22:01:39Z", "3.2.21"),
	}
}

// makeCast builds an image of the cast for an architecture.
func makeCast(which, arch string) (v1.Image, error) {
	c, ok := cast()[which]
	if !ok {
		return nil, fmt.Errorf("no image %q in the cast", which)
	}
	created, err := time.Parse(time.RFC3339, c.created)
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	conf := &v1.ConfigFile{OS: "linux", Architecture: arch, Config: c.conf, RootFS: v1.RootFS{Type: "layers"}}
	if img, err = mutate.ConfigFile(img, conf); err != nil {
		return nil, err
	}
	for i, s := range c.steps {
		add := mutate.Addendum{History: v1.History{CreatedBy: s.by, EmptyLayer: s.entries == nil, Created: v1.Time{Time: created.Add(time.Duration(i-len(c.steps)) * time.Second)}}}
		if strings.HasSuffix(s.by, "# buildkit") {
			add.History.Comment = "buildkit.dockerfile.v0"
		}
		if s.entries != nil {
			var archive bytes.Buffer
			if err := writeTar(&archive, s.entries); err != nil {
				return nil, err
			}
			var packed bytes.Buffer // not by Go's own gzip, whose bytes change with its version
			w := kgzip.NewWriter(&packed)
			if _, err := w.Write(archive.Bytes()); err != nil {
				return nil, err
			}
			if err := w.Close(); err != nil {
				return nil, err
			}
			add.Layer, add.MediaType = bytesBlob(mediaGzip, packed.Bytes(), archive.Bytes()), mediaGzip
		}
		if img, err = mutate.Append(img, add); err != nil {
			return nil, err
		}
	}
	return mutate.CreatedAt(img, v1.Time{Time: created})
}

// pushCast pushes an image of the cast as NAME:TAG; with index, inside an index
// that has it for arm64 too.
func pushCast(ref, which string, index bool) error {
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		return err
	}
	img, err := makeCast(which, castArch)
	if err != nil {
		return err
	}
	if !index {
		return remote.Write(tag, img)
	}
	other, err := makeCast(which, "arm64")
	if err != nil {
		return err
	}
	return remote.WriteIndex(tag, mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: castArch}}},
		mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}}))
}

// TestCast checks that the images are the same as ever: the guide shows their IDs.
func TestCast(t *testing.T) {
	for which := range cast() {
		a, err := makeCast(which, "amd64")
		if err != nil {
			t.Fatal(err)
		}
		b, err := makeCast(which, "amd64")
		if err != nil {
			t.Fatal(err)
		}
		ida, erra := a.Digest()
		idb, errb := b.Digest()
		if ida != idb || erra != nil || errb != nil {
			t.Errorf("%s: %v (%v) and %v (%v), want one digest", which, ida, erra, idb, errb)
		}
	}
}
