package fs

import (
	"bytes"
	"encoding/json"
	"fmt"
	"sort"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// control is the directory .imgfs and its files.
//
// A file is rendered when its name is looked up, which the kernel does for each
// open because entries have no timeout. Without OPEN there is no handle to keep
// a rendering in: size and a new mtime come from it, by which the kernel drops
// the pages of the one before, and READ serves the latest.
type control struct {
	f     *fileSystem
	files []controlFile

	mu       sync.Mutex
	rendered map[images.Ino]rendering
}

type controlFile struct {
	name   string
	render func(*bytes.Buffer) error
}

type rendering struct {
	data []byte
	time time.Time
}

// Inode numbers of the control directory and its files.
const (
	controlIno   images.Ino = 2
	firstControl images.Ino = 16
)

func newControl(f *fileSystem) *control {
	c := &control{f: f, rendered: map[images.Ino]rendering{}}
	c.files = []controlFile{
		{"errors", f.errors.text},
		{"errors.json", f.errors.json},
		{"images", c.imagesText},
		{"images.json", c.imagesJSON},
		{"stats", c.statsText},
		{"stats.json", c.statsJSON},
	}
	return c
}

// file returns the control file with this number; nil when there is none.
func (c *control) file(ino images.Ino) *controlFile {
	if ino < firstControl || ino >= firstControl+images.Ino(len(c.files)) {
		return nil
	}
	return &c.files[ino-firstControl]
}

// lookup answers for names that are the control directory's; ok is false for
// others.
func (c *control) lookup(dir images.Ino, name string, out *fuse.EntryOut) (st fuse.Status, ok bool) {
	switch dir {
	case images.RootIno:
		if name != controlDir {
			return 0, false
		}
		out.NodeId = uint64(controlIno)
		setTimeout(&out.EntryValid, &out.EntryValidNsec, day)
		setTimeout(&out.AttrValid, &out.AttrValidNsec, day)
		c.attr(controlIno, &out.Attr)
		return fuse.OK, true
	case controlIno:
		for i := range c.files {
			if c.files[i].name != name {
				continue
			}
			ino := firstControl + images.Ino(i)
			if err := c.render(ino); err != nil {
				c.f.log.Error("rendering a control file", "name", name, "err", err)
				return fuse.EIO, true
			}
			out.NodeId = uint64(ino)
			c.attr(ino, &out.Attr)
			return fuse.OK, true
		}
		return fuse.ENOENT, true
	}
	return 0, false
}

func (c *control) render(ino images.Ino) error {
	var b bytes.Buffer
	if err := c.file(ino).render(&b); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.rendered[ino]
	if old.data != nil && bytes.Equal(old.data, b.Bytes()) {
		return nil
	}
	now := time.Now()
	if !now.After(old.time) {
		now = old.time.Add(1) // the kernel must see another mtime
	}
	c.rendered[ino] = rendering{data: append([]byte{}, b.Bytes()...), time: now}
	return nil
}

func (c *control) attr(ino images.Ino, out *fuse.Attr) {
	out.Ino = uint64(ino)
	out.Uid, out.Gid = c.f.uid, c.f.gid
	out.Blksize = 4096
	t := c.f.started
	if ino == controlIno {
		out.Mode, out.Nlink = syscall.S_IFDIR|0o755, 2
	} else {
		c.mu.Lock()
		r := c.rendered[ino]
		c.mu.Unlock()
		out.Mode, out.Nlink, out.Size = syscall.S_IFREG|0o444, 1, uint64(len(r.data))
		t = r.time
	}
	setTime(&out.Mtime, &out.Mtimensec, t)
	setTime(&out.Ctime, &out.Ctimensec, t)
	setTime(&out.Atime, &out.Atimensec, t)
}

// getattr answers for the control directory and its files; false for others. It
// renders nothing: a reader asks for it between two reads.
func (c *control) getattr(ino images.Ino, out *fuse.AttrOut) bool {
	if ino == controlIno {
		setTimeout(&out.AttrValid, &out.AttrValidNsec, day)
	} else if c.file(ino) == nil {
		return false
	}
	c.attr(ino, &out.Attr)
	return true
}

func (c *control) read(ino images.Ino, p []byte, off int64) (fuse.ReadResult, fuse.Status) {
	if c.file(ino) == nil {
		return nil, fuse.EISDIR
	}
	c.mu.Lock()
	data := c.rendered[ino].data
	c.mu.Unlock()
	if off < 0 || off >= int64(len(data)) {
		return fuse.ReadResultData(nil), fuse.OK
	}
	return fuse.ReadResultData(p[:copy(p, data[off:])]), fuse.OK
}

func (c *control) readDir(pos int, out *fuse.DirEntryList, plus bool) fuse.Status {
	if pos < 2 && !addDots(out, pos, controlIno, images.RootIno, plus) {
		return fuse.OK
	}
	for i := max(pos-2, 0); i < len(c.files); i++ {
		d := fuse.DirEntry{Name: c.files[i].name, Mode: syscall.S_IFREG, Ino: uint64(firstControl) + uint64(i), Off: uint64(i + 3)}
		if plus && out.AddDirLookupEntry(d) == nil || !plus && !out.AddDirEntry(d) {
			break
		}
	}
	return fuse.OK
}

// imageJSON is one element of images.json.
type imageJSON struct {
	Repository string    `json:"repository"`
	Tag        string    `json:"tag"` // "<none>" for an image named by digest only
	ID         string    `json:"id"`
	Digest     string    `json:"digest"`   // what the registry answers for the tag
	Manifest   string    `json:"manifest"` // of this platform
	Created    time.Time `json:"created"`
	Pulled     time.Time `json:"pulled"`
	Size       int64     `json:"size"` // expanded bytes; -1 while a layer is arriving
	Compressed int64     `json:"compressed"`
	Layers     int       `json:"layers"`
	Platform   string    `json:"platform"`
}

func (c *control) list() ([]imageJSON, error) {
	infos, err := c.f.store.List()
	if err != nil {
		return nil, err
	}
	list := make([]imageJSON, 0, len(infos))
	for _, i := range infos {
		tag := i.Name.Tag
		if i.Name.IsDigest() {
			tag = "<none>"
		}
		list = append(list, imageJSON{Repository: i.Name.Repo, Tag: tag, ID: i.ID.String(), Digest: i.Top.String(),
			Manifest: i.Digest.String(), Created: i.Created, Pulled: i.Pulled, Size: i.Expanded, Compressed: i.Compressed,
			Layers: i.Layers, Platform: i.Platform})
	}
	return list, nil
}

func (c *control) imagesJSON(b *bytes.Buffer) error {
	list, err := c.list()
	if err != nil {
		return err
	}
	return encode(b, list)
}

func encode(b *bytes.Buffer, v any) error {
	e := json.NewEncoder(b)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func (c *control) imagesText(b *bytes.Buffer) error {
	list, err := c.list()
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(b, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "REPOSITORY\tTAG\tIMAGE ID\tCREATED\tSIZE")
	for _, i := range list {
		id := strings.TrimPrefix(i.ID, "sha256:")
		size := fmt.Sprint(i.Size)
		if i.Size < 0 {
			size = "arriving"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", i.Repository, i.Tag, id[:min(12, len(id))], i.Created.Format(time.RFC3339), size)
	}
	return w.Flush()
}

func (c *control) statsJSON(b *bytes.Buffer) error { return encode(b, c.f.stats()) }

func (c *control) statsText(b *bytes.Buffer) error {
	s := c.f.stats()
	fmt.Fprintf(b, "pid %d\nstarted %s\n", s.PID, s.Started.Format(time.RFC3339))
	names := make([]string, 0, len(s.Fuse))
	for name := range s.Fuse {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		fmt.Fprintf(b, "fuse.%s %d\n", name, s.Fuse[name])
	}
	fmt.Fprintf(b, "registry.requests %d\nregistry.bytes %d\nregistry.retries %d\n", s.Registry.Requests, s.Registry.Bytes, s.Registry.Retries)
	fmt.Fprintf(b, "cache.limit %d\ncache.used %d\ncache.free %d\n", s.Cache.Limit, s.Cache.Used, s.Cache.Free)
	fmt.Fprintf(b, "catalogue.reads %d\nerrors %d\n", s.Catalogue.Reads, s.Errors)
	return nil
}
