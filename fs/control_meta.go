package fs

import (
	"bytes"
	"encoding/json"
	"fmt"
	iofs "io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/images"
)

// metaDir is .imgfs/meta, or a directory below it, for what is at path below the
// mount. It walks the namespace, of what is here alone, and ends in the directories
// of images. What is below .imgfs itself (dangling images, other platforms) can be
// walked to and is not listed.
func (c *control) metaDir(path string) *folder {
	return &folder{
		lookup: func(name string, _ bool) (item, error) {
			n := images.Name{Repo: path, Tag: name}
			if valid(n) || path == images.DanglingDir && hexRE.MatchString(name) {
				if _, ok, err := c.f.store.Manifest(n); err != nil || ok {
					return item{dir: c.metaImage(n)}, err
				}
			}
			sub := join(path, name)
			switch sub {
			case controlDir, images.DanglingDir, images.PlatformsDir:
				return item{dir: c.metaDir(sub)}, nil
			}
			if c.f.store.HasPath(sub) {
				return item{dir: c.metaDir(sub)}, nil
			}
			if target, ok := c.metaSpelling(path, name); ok {
				return item{link: target}, nil
			}
			return item{}, iofs.ErrNotExist
		},
		list: func() ([]listed, error) {
			if path == images.DanglingDir {
				return c.danglingNames()
			}
			dirs, tags, err := c.f.store.Children(path)
			if err != nil {
				return nil, err
			}
			names := map[string]bool{}
			for _, n := range slices.Concat(dirs, tags) {
				names[n] = true
			}
			if path == "" {
				delete(names, controlDir)
			}
			return directories(slices.Sorted(maps.Keys(names))), nil
		},
	}
}

// metaSpelling resolves docker's spellings of what is here.
func (c *control) metaSpelling(path, name string) (target string, ok bool) {
	target, ok = spelling(path, name)
	if !ok || target == "." {
		return target, ok
	}
	repo, tag, _ := strings.Cut(target, "/")
	_, here, err := c.f.store.Manifest(images.Name{Repo: join(path, repo), Tag: tag})
	return target, here && err == nil
}

// metaImage is the directory with what is known of an image.
func (c *control) metaImage(n images.Name) *folder {
	info := func(render func(*bytes.Buffer, images.Info) error) item {
		return item{file: func(b *bytes.Buffer) error {
			i, err := c.f.store.Image(n)
			if err != nil {
				return err
			}
			return render(b, i)
		}}
	}
	details := func(render func(*bytes.Buffer, *imageDetails) error) item {
		return item{file: func(b *bytes.Buffer) error {
			d, err := c.f.store.Details(background(), n)
			if err != nil {
				return err
			}
			return render(b, newDetails(d))
		}}
	}
	line := func(of func(images.Info) string) item {
		return info(func(b *bytes.Buffer, i images.Info) error {
			fmt.Fprintln(b, of(i))
			return nil
		})
	}
	// All names of the ID: several manifests may have one config. Neither of them is
	// read, so that an image can be removed when they have gone and nobody answers.
	names := func(render func(*bytes.Buffer, []string) error) item {
		return info(func(b *bytes.Buffer, i images.Info) error {
			id, err := c.f.store.FindID(i.ID.String())
			if err != nil {
				return err
			}
			names := []string{}
			for _, n := range id.Names {
				names = append(names, n.String())
			}
			return render(b, names)
		})
	}
	items := map[string]item{
		"digest":        line(func(i images.Info) string { return i.Top.String() }),
		"id":            line(func(i images.Info) string { return i.ID.String() }),
		"created":       line(func(i images.Info) string { return madeAt(i.Created) }),
		"size":          info(sizeText),
		"size.json":     info(func(b *bytes.Buffer, i images.Info) error { return encode(b, imageOf(i)) }),
		"config.json":   details(func(b *bytes.Buffer, d *imageDetails) error { b.Write(d.RawConfig); return nil }),
		"manifest.json": details(func(b *bytes.Buffer, d *imageDetails) error { b.Write(d.RawManifest); return nil }),
		"history":       details(historyText),
		"history.json":  details(func(b *bytes.Buffer, d *imageDetails) error { return encode(b, d.steps) }),
		"Dockerfile":    details(dockerfileOf),
		"layers":        details(layersText),
		"layers.json":   details(func(b *bytes.Buffer, d *imageDetails) error { return encode(b, d.layers()) }),
		"env":           details(envText),
		"fetched":       details(fetchedText),
		"fetched.json":  details(fetchedJSON),
		"names":         names(writeLines),
		"names.json":    names(func(b *bytes.Buffer, names []string) error { return encode(b, names) }),
	}
	return fixed(slices.Sorted(maps.Keys(items)), items)
}

func writeLines(b *bytes.Buffer, lines []string) error {
	for _, l := range lines {
		b.WriteString(oneLine(l))
		b.WriteByte('\n')
	}
	return nil
}

func sizeText(b *bytes.Buffer, i images.Info) error {
	n := func(v int64) string { return bytesOr(v, "arriving") }
	return table(b, [][]string{{"COMPRESSED", "EXPANDED", "SHARED", "UNIQUE", "CACHED"},
		{n(i.Compressed), n(i.Expanded), n(i.Shared), n(i.Unique), n(i.Cached)}})
}

// imageDetails are those of the store, with the configuration parsed and its history
// joined to the layers.
type imageDetails struct {
	images.Details
	config v1.ConfigFile
	steps  []step
}

// step is an element of history.json.
type step struct {
	Created    time.Time `json:"created"`
	CreatedBy  string    `json:"createdBy"`
	Comment    string    `json:"comment"`
	EmptyLayer bool      `json:"emptyLayer"`
	Size       int64     `json:"size"`  // expanded bytes of its layer; 0 when it has none, -1 when it is not known
	Layer      string    `json:"layer"` // the digest of its blob; ""
}

func newDetails(d images.Details) *imageDetails {
	x := &imageDetails{Details: d, steps: []step{}}
	// What is not understood of a configuration is not shown. The image was opened
	// by it, so that the parts that matter are as they should be.
	_ = json.Unmarshal(d.RawConfig, &x.config)
	next := 0
	for _, h := range x.config.History {
		s := step{Created: h.Created.Time, CreatedBy: h.CreatedBy, Comment: h.Comment, EmptyLayer: h.EmptyLayer}
		if !h.EmptyLayer && next < len(d.Layers) {
			s.Size, s.Layer = d.Layers[next].Expanded, d.Layers[next].Digest.String()
			next++
		}
		x.steps = append(x.steps, s)
	}
	for ; next < len(d.Layers); next++ { // of which the history says nothing
		x.steps = append(x.steps, step{Size: d.Layers[next].Expanded, Layer: d.Layers[next].Digest.String()})
	}
	return x
}

// layers are the image's, lowest first, with their commands.
func (d *imageDetails) layers() []layerJSON {
	list := make([]layerJSON, 0, len(d.Layers))
	for _, l := range d.Layers {
		list = append(list, layerOf(l))
	}
	next := 0
	for i := range d.steps {
		if d.steps[i].Layer != "" {
			list[next].Command = &d.steps[i].CreatedBy
			next++
		}
	}
	return list
}

// historyText has the columns of `docker history --no-trunc`, the newest step
// first.
func historyText(b *bytes.Buffer, d *imageDetails) error {
	rows := [][]string{{"IMAGE", "CREATED", "CREATED BY", "SIZE", "COMMENT"}}
	id := d.ID.String()
	for _, s := range slices.Backward(d.steps) {
		rows = append(rows, []string{id, madeAt(s.Created), oneLine(s.CreatedBy), bytesOr(s.Size, "arriving"), oneLine(s.Comment)})
		id = "<missing>"
	}
	return table(b, rows)
}

func dockerfileOf(b *bytes.Buffer, d *imageDetails) error {
	b.WriteString(dockerfile(d.ID.String(), d.steps))
	return nil
}

func layersText(b *bytes.Buffer, d *imageDetails) error {
	rows := [][]string{{"DIGEST", "COMPRESSED", "SIZE", "CACHED", "COMMAND"}}
	for _, l := range d.layers() {
		command := ""
		if l.Command != nil {
			command = oneLine(*l.Command)
		}
		rows = append(rows, []string{l.Digest, bytesOr(l.Compressed, ""), bytesOr(l.Expanded, "arriving"), bytesOr(l.Cached, ""), command})
	}
	return table(b, rows)
}

func envText(b *bytes.Buffer, d *imageDetails) error { return writeLines(b, d.config.Config.Env) }

func fetchedText(b *bytes.Buffer, d *imageDetails) error {
	rows := [][]string{{"DIGEST", "METHOD", "LAZY", "STATE", "CACHED", "SIZE", "WHY NOT LAZILY"}}
	for _, l := range d.Layers {
		state := l.State
		if l.State == "streaming" {
			state += fmt.Sprintf(" (%d of %d)", l.Arrived, l.Compressed)
		}
		lazy := "no"
		if l.Lazy {
			lazy = "yes"
		}
		rows = append(rows, []string{l.Digest.String(), l.Method, lazy, state, strconv.FormatInt(l.Cached, 10), bytesOr(l.Expanded, "arriving"), oneLine(l.Why)})
	}
	return table(b, rows)
}

func fetchedJSON(b *bytes.Buffer, d *imageDetails) error {
	type fetched struct {
		Key        string `json:"key"`
		Digest     string `json:"digest"`
		Method     string `json:"method"`
		Lazy       bool   `json:"lazy"`
		Why        string `json:"why"`
		State      string `json:"state"`
		Compressed int64  `json:"compressed"`
		Arrived    int64  `json:"arrived"`
		Cached     int64  `json:"cached"`
		Expanded   int64  `json:"expanded"`
	}
	list := []fetched{}
	for _, l := range d.Layers {
		list = append(list, fetched{l.Key.String(), l.Digest.String(), l.Method, l.Lazy, l.Why, l.State, l.Compressed, l.Arrived, l.Cached, l.Expanded})
	}
	return encode(b, list)
}
