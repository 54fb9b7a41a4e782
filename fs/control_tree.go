package fs

import (
	"bytes"
	"errors"
	"fmt"
	iofs "io/fs"
	"regexp"
	"slices"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// What .imgfs holds. docs/namespace.md has the table.

// fixed is a directory with a fixed list of names; entries with an empty item are
// not there.
func fixed(names []string, items map[string]item) *folder {
	names = slices.DeleteFunc(slices.Clone(names), func(n string) bool { x := items[n]; return x.mode() == 0 })
	return &folder{
		still: true,
		lookup: func(name string, _ bool) (item, error) {
			x := items[name]
			if x.mode() == 0 {
				return item{}, iofs.ErrNotExist
			}
			return x, nil
		},
		list: func() ([]listed, error) {
			var l []listed
			for _, n := range names {
				x := items[n]
				l = append(l, listed{n, x.mode()})
			}
			return l, nil
		},
	}
}

// top is .imgfs itself.
func (c *control) top() *folder {
	f := c.f
	file := func(render func(*bytes.Buffer) error) item { return item{file: render} }
	items := map[string]item{
		"images": file(c.imagesText), "images.json": file(c.imagesJSON),
		"df": file(c.dfText), "df.json": file(c.dfJSON),
		"errors": file(f.errors.text), "errors.json": file(f.errors.json),
		"events": {live: f.events.contents}, "events.json": {live: f.events.contents},
		"stats": file(c.statsText), "stats.json": file(c.statsJSON),
		"pulls": file(c.pullsText), "pulls.json": file(c.pullsJSON),
		"layers.json": file(c.layersJSON), "chains.json": file(c.chainsJSON),
		"ids": {dir: c.ids()}, "dangling": {dir: c.dangling()}, "layers": {dir: c.layers()},
		"chains": {dir: c.chains()}, "platforms": {dir: c.platforms()}, "meta": {dir: c.metaDir("")},
	}
	if f.o.Metrics != nil {
		items["metrics"] = file(func(b *bytes.Buffer) error { return f.o.Metrics(b) })
	}
	if f.o.Socket != "" {
		items["socket"] = item{link: f.o.Socket}
	}
	return fixed([]string{"chains", "chains.json", "dangling", "df", "df.json", "errors", "errors.json", "events", "events.json",
		"ids", "images", "images.json", "layers", "layers.json", "meta", "metrics", "platforms", "pulls", "pulls.json", "socket",
		"stats", "stats.json"}, items)
}

var (
	hexRE = regexp.MustCompile(`^[0-9a-f]{64}$`)
	// An image ID or the beginning of one, as docker takes it.
	idRE = regexp.MustCompile(`^(?:sha256:)?[0-9a-f]{1,64}$`)
)

// hash is the digest with these 64 digits.
func hash(hex string) v1.Hash { return v1.Hash{Algorithm: "sha256", Hex: hex} }

// leaving is what a caller finds of a name that it is about to rmdir: an empty
// directory, so that the kernel lets its RMDIR through, whatever the name is for
// others and without opening an image for it.
func leaving() item { return item{dir: fixed(nil, nil)} }

// ids are symbolic links from the image IDs, and from their beginnings, which are
// not listed.
func (c *control) ids() *folder {
	return &folder{
		lookup: func(name string, removing bool) (item, error) {
			if !idRE.MatchString(name) {
				return item{}, iofs.ErrNotExist
			}
			id, err := c.f.store.FindID(name)
			if err != nil {
				return item{}, unsaid(err)
			}
			if removing {
				return leaving(), nil
			}
			_, names, err := c.f.store.Shown(id.ID)
			if err != nil {
				return item{}, unsaid(err)
			}
			if len(names) == 0 {
				return item{link: "../dangling/" + id.ID.Hex}, nil
			}
			n := firstName(names)
			return item{link: "../../" + n.Repo + "/" + n.Tag}, nil
		},
		list: func() ([]listed, error) {
			ids, err := c.f.store.IDs()
			return hexes(ids, func(id v1.Hash) v1.Hash { return id }, syscall.S_IFLNK), err
		},
		remove: func(name string) error {
			if !idRE.MatchString(name) {
				return iofs.ErrNotExist
			}
			id, err := c.f.store.FindID(name)
			if err != nil {
				return unsaid(err)
			}
			return c.removeID(id.ID)
		},
	}
}

// unsaid is err, or the bare fs.ErrNotExist when it is nothing else: that there is
// no such image is not worth an entry in .imgfs/errors, that there are several is.
func unsaid(err error) error {
	if errors.Is(err, iofs.ErrNotExist) && !errors.Is(err, images.ErrAmbiguous) {
		return iofs.ErrNotExist
	}
	return err
}

// firstName is the name by which an image with several is shown: a tag of the
// mount's own platform, if it has one.
func firstName(names []images.Name) images.Name {
	rank := func(n images.Name) int {
		r := 0
		if n.IsDigest() {
			r++
		}
		if strings.HasPrefix(n.Repo, images.PlatformsDir+"/") {
			r += 2
		}
		return r
	}
	return slices.MinFunc(names, func(a, b images.Name) int { return rank(a) - rank(b) })
}

// hexes lists the digests of a list, each once.
func hexes[T any](list []T, of func(T) v1.Hash, mode uint32) []listed {
	l := make([]listed, 0, len(list))
	for _, x := range list {
		l = append(l, listed{of(x).Hex, mode})
	}
	slices.SortFunc(l, func(a, b listed) int { return strings.Compare(a.name, b.name) })
	return slices.Compact(l)
}

func (c *control) removeID(id v1.Hash) error {
	ch, err := c.f.store.RemoveID(id)
	if err != nil {
		return err
	}
	c.f.log.Info("deleted", "image", id.String(), "names", len(ch.Untagged))
	for _, n := range ch.Untagged {
		c.f.events.add("untag", n, id.String())
	}
	for _, gone := range ch.Deleted {
		c.f.events.add("delete", images.Name{}, gone.String())
	}
	c.f.space.tell(ch, nil)
	return nil
}

// dangling are the images without a name.
func (c *control) dangling() *folder {
	name := func(hex string) images.Name { return images.Name{Repo: images.DanglingDir, Tag: hex} }
	here := func(hex string) (bool, error) {
		if !hexRE.MatchString(hex) {
			return false, nil
		}
		_, ok, err := c.f.store.Manifest(name(hex))
		if errors.Is(err, images.ErrAmbiguous) {
			return true, nil
		}
		return ok, err
	}
	return &folder{
		lookup: func(hex string, removing bool) (item, error) {
			switch ok, err := here(hex); {
			case err != nil:
				return item{}, err
			case !ok:
				return item{}, iofs.ErrNotExist
			case removing:
				return leaving(), nil
			}
			return item{image: func() (images.Ino, error) { return c.f.store.Root(background(), name(hex)) }}, nil
		},
		list: func() ([]listed, error) { return c.danglingNames() },
		remove: func(hex string) error {
			switch ok, err := here(hex); {
			case err != nil:
				return err
			case !ok:
				return iofs.ErrNotExist
			}
			return c.removeID(hash(hex))
		},
	}
}

func (c *control) danglingNames() ([]listed, error) {
	ids, err := c.f.store.Dangling()
	return hexes(ids, func(id v1.Hash) v1.Hash { return id }, syscall.S_IFDIR), err
}

// layers are the layers alone, in the form that overlayfs takes. Where a layer's key
// is not the digest of its blob, that digest is a link to it, which is not listed.
func (c *control) layers() *folder {
	find := func(hex string) (v1.Hash, error) {
		if !hexRE.MatchString(hex) {
			return v1.Hash{}, iofs.ErrNotExist
		}
		key, err := c.f.store.FindLayer(hash(hex))
		return key, unsaid(err)
	}
	return &folder{
		lookup: func(hex string, removing bool) (item, error) {
			key, err := find(hex)
			switch {
			case err != nil:
				return item{}, err
			case removing:
				return leaving(), nil
			case key.Hex != hex:
				return item{link: key.Hex}, nil
			}
			return item{image: func() (images.Ino, error) { return c.f.store.LayerRoot(background(), key) }}, nil
		},
		list: func() ([]listed, error) {
			infos, err := c.f.store.Layers()
			return hexes(infos, func(i images.LayerInfo) v1.Hash { return i.Key }, syscall.S_IFDIR), err
		},
		remove: func(hex string) error {
			key, err := find(hex)
			if err != nil {
				return err
			}
			if _, err := c.f.store.DropLayer(background(), key); err != nil {
				return unsaid(err)
			}
			c.f.events.add("drop", images.Name{}, key.String())
			return nil
		},
	}
}

// chains are the intermediate images.
func (c *control) chains() *folder {
	find := func(hex string) (images.Chain, error) {
		if !hexRE.MatchString(hex) {
			return images.Chain{}, iofs.ErrNotExist
		}
		ch, ok, err := c.f.store.Chain(hash(hex))
		if err == nil && !ok {
			err = iofs.ErrNotExist
		}
		return ch, err
	}
	return &folder{
		lookup: func(hex string, removing bool) (item, error) {
			if _, err := find(hex); err != nil {
				return item{}, err
			}
			if removing {
				return leaving(), nil
			}
			n := images.Name{Repo: images.ChainsDir, Tag: hex}
			return item{image: func() (images.Ino, error) { return c.f.store.Root(background(), n) }}, nil
		},
		list: func() ([]listed, error) {
			list, err := c.f.store.Chains()
			return hexes(list, func(x images.Chain) v1.Hash { return x.ID }, syscall.S_IFDIR), err
		},
		remove: func(hex string) error {
			ch, err := find(hex)
			if err != nil {
				return err
			}
			return fmt.Errorf("fs: %d images depend on it: %w", len(ch.Images), images.ErrConflict)
		},
	}
}

// platformRE is os-arch[-variant] with the names that the image-spec takes from
// Go; others would make nodes that nothing can ever be in.
var platformRE = regexp.MustCompile(`^(?:aix|android|darwin|dragonfly|freebsd|illumos|ios|linux|netbsd|openbsd|plan9|solaris|wasip1|windows)-` +
	`(?:386|amd64|arm|arm64|loong64|mips|mips64|mips64le|mipsle|ppc64|ppc64le|riscv64|s390x|wasm)(?:-v[0-9]{1,2}(?:\.[0-9]{1,2})?)?$`)

// platforms are the namespaces of other platforms. Those that something is in are
// listed, all can be walked into.
func (c *control) platforms() *folder {
	return &folder{
		lookup: func(name string, _ bool) (item, error) {
			if !platformRE.MatchString(name) {
				return item{}, iofs.ErrNotExist
			}
			return item{entry: func(out *fuse.EntryOut) fuse.Status {
				st := c.f.space.entry(found{kind: foundDir, path: images.PlatformsDir + "/" + name}, out)
				setTimeout(&out.EntryValid, &out.EntryValidNsec, 0)
				return st
			}}, nil
		},
		list: func() ([]listed, error) {
			dirs, _, err := c.f.store.Children(images.PlatformsDir)
			return directories(dirs), err
		},
	}
}

func directories(names []string) []listed {
	l := make([]listed, 0, len(names))
	for _, n := range names {
		l = append(l, listed{n, syscall.S_IFDIR})
	}
	return l
}
