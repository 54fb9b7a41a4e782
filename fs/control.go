package fs

import (
	"bytes"
	"errors"
	iofs "io/fs"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// control is the directory .imgfs and all below it but what is an image's: files
// that are rendered, directories that are listed and symbolic links, when they
// are looked up. What they are is in control_tree.go; this file answers the
// kernel for them.
//
// A node has a number from its first LOOKUP to the FORGET of its last one, and
// nothing of it is kept longer. Entries and attributes have no timeout, so the
// kernel looks a name up for each open. Without OPEN there is no handle to keep a
// rendering in: size and a new mtime come from it, by which the kernel drops the
// pages of the one before, and READ serves the latest. GETATTR renders nothing
// again: a reader asks for it between two reads, and would get the end of
// another rendering.
type control struct {
	f    *fileSystem
	root item

	mu    sync.Mutex
	epoch uint64 // of the numbers
	last  uint64
	nodes map[images.Ino]*controlNode
	names map[nodeKey]*controlNode
}

// item is what a name in .imgfs is: one of its fields is set.
type item struct {
	file  func(*bytes.Buffer) error            // a file, rendered
	live  func() ([]byte, time.Time)           // a file that only grows
	link  string                               // a symbolic link's target
	dir   *folder                              // a directory
	image func() (images.Ino, error)           // the root directory of an image, or of a layer
	entry func(out *fuse.EntryOut) fuse.Status // a directory of the namespace
}

// folder is a directory of .imgfs. Errors become errnos, and are kept in
// .imgfs/errors unless they are the bare fs.ErrNotExist.
type folder struct {
	// lookup finds a name. removing says that the caller is about to rmdir it.
	lookup func(name string, removing bool) (item, error)
	list   func() ([]listed, error)
	remove func(name string) error // nil: nothing can be removed
	still  bool                    // what it lists does not change
}

// nodeKey is what has one number: a name in a directory, as one type, and as a
// link to one target. A name may become another thing, and the kernel, which keeps
// what a link says, must not see a number change its type or its target.
type nodeKey struct {
	dir  images.Ino
	name string
	mode uint32
	link string
}

type controlNode struct {
	key     nodeKey
	ino     images.Ino
	lookups uint64 // that the kernel has not forgotten
	item    item
	data    []byte // rendered
	time    time.Time
}

// Inode numbers of .imgfs: that of the directory itself, and those of all below
// it, which begin with an epoch, so that a server that takes a mount over does
// not mistake the numbers of the one before for its own:
//
//	45 44           32 31           0
//	+--+---------------+-------------+
//	|1 |     epoch     |   counter   |
//	+--+---------------+-------------+
const (
	controlIno   images.Ino = 2
	firstControl images.Ino = 1 << 45
	epochBits               = 13
	counterBits             = 32
)

func newControl(f *fileSystem) *control {
	c := &control{f: f, epoch: (uint64(f.started.UnixMilli()>>6) + uint64(f.o.Restarts)) & (1<<epochBits - 1),
		nodes: map[images.Ino]*controlNode{}, names: map[nodeKey]*controlNode{}}
	c.root = item{dir: c.top()}
	c.nodes[controlIno] = &controlNode{ino: controlIno, key: nodeKey{dir: images.RootIno, name: controlDir, mode: syscall.S_IFDIR},
		lookups: 1, item: c.root, time: f.started}
	return c
}

// has reports whether a number of the namespace's kind is one of .imgfs.
func (c *control) has(ino images.Ino) bool {
	return ino == controlIno || ino >= firstControl && ino.Kind() == images.KindNode
}

// node returns a copy of a node as it is now; nil when there is none.
func (c *control) node(ino images.Ino) *controlNode {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.nodes[ino]
	if n == nil {
		return nil
	}
	copied := *n
	return &copied
}

// mode is the type of what an item makes a node of; 0 for what has a number
// elsewhere.
func (x *item) mode() uint32 {
	switch {
	case x.file != nil || x.live != nil:
		return syscall.S_IFREG
	case x.link != "":
		return syscall.S_IFLNK
	case x.dir != nil:
		return syscall.S_IFDIR
	}
	return 0
}

// hold counts a lookup of the node of key, making it when there is none.
func (c *control) hold(key nodeKey, x item) images.Ino {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.names[key]
	if n == nil {
		for {
			c.last = (c.last + 1) & (1<<counterBits - 1)
			ino := firstControl | images.Ino(c.epoch<<counterBits|c.last)
			if c.nodes[ino] == nil {
				n = &controlNode{key: key, ino: ino}
				break
			}
		}
		c.names[key], c.nodes[n.ino] = n, n
	}
	n.item = x
	n.lookups++
	return n.ino
}

// forget counts lookups back. A node without any is gone.
func (c *control) forget(ino images.Ino, lookups uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.nodes[ino]
	if n == nil || ino == controlIno {
		return
	}
	n.lookups -= min(lookups, n.lookups)
	if n.lookups == 0 {
		delete(c.nodes, ino)
		delete(c.names, n.key)
	}
}

// drop has the kernel forget what it knows below an image that is shown in a
// directory of .imgfs; false when n is not one.
func (c *control) drop(n images.Name) bool {
	if n.Repo != images.DanglingDir && n.Repo != images.ChainsDir {
		return false
	}
	c.mu.Lock()
	d := c.names[nodeKey{dir: controlIno, name: strings.TrimPrefix(n.Repo, controlDir+"/"), mode: syscall.S_IFDIR}]
	c.mu.Unlock()
	if d != nil { // else the kernel knows nothing there
		c.f.notify.entry(uint64(d.ino), n.Tag)
	}
	return true
}

// self answers a LOOKUP of .imgfs.
func (c *control) self(out *fuse.EntryOut) fuse.Status {
	out.NodeId = uint64(controlIno)
	setTimeout(&out.EntryValid, &out.EntryValidNsec, day)
	setTimeout(&out.AttrValid, &out.AttrValidNsec, day)
	c.attr(c.node(controlIno), &out.Attr)
	return fuse.OK
}

// lookup answers a LOOKUP in a directory of .imgfs.
func (c *control) lookup(dir images.Ino, name string, tid uint32, out *fuse.EntryOut) fuse.Status {
	d := c.node(dir)
	if d == nil {
		return fuse.Status(syscall.ESTALE)
	}
	if d.item.dir == nil {
		return fuse.ENOTDIR
	}
	x, err := d.item.dir.lookup(name, d.item.dir.remove != nil && changeOf(tid).call == callRmdir)
	if err != nil {
		return c.refused(d, name, "lookup", err)
	}
	if x.entry != nil {
		return x.entry(out)
	}
	if x.image != nil {
		return c.imageEntry(d, name, x, out)
	}
	ino := c.hold(nodeKey{dir, name, x.mode(), x.link}, x)
	if x.file != nil {
		if err := c.render(ino, x); err != nil {
			c.forget(ino, 1)
			return c.refused(d, name, "rendering", err)
		}
	}
	out.NodeId = uint64(ino)
	c.attr(c.node(ino), &out.Attr)
	return fuse.OK
}

// imageEntry answers with the root directory of an image, which is not cached
// under this name.
func (c *control) imageEntry(d *controlNode, name string, x item, out *fuse.EntryOut) fuse.Status {
	ino, err := x.image()
	var a images.Attr
	final := false
	if err == nil {
		final, err = c.f.store.Stat(background(), ino, &a)
	}
	if err != nil {
		return c.refused(d, name, "open", err)
	}
	c.f.fillEntry(ino, &a, final, out)
	setTimeout(&out.EntryValid, &out.EntryValidNsec, 0)
	return fuse.OK
}

// refused turns an error into its errno, and keeps the reason. The bare
// fs.ErrNotExist is for names that nothing can be.
func (c *control) refused(d *controlNode, name, op string, err error) fuse.Status {
	errno := errnoOf(err)
	if err != iofs.ErrNotExist {
		object := strings.TrimSuffix(c.path(d)+"/"+name, "/")
		if c.f.errors.add(object, op, errno, err) && !errors.Is(err, iofs.ErrNotExist) {
			c.f.log.Warn(op+" failed", "object", object, "errno", errno.Error(), "err", err)
		}
	}
	return fuse.Status(errno)
}

// path is that of a node below the mount.
func (c *control) path(n *controlNode) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	path := n.key.name
	for n.key.dir != images.RootIno {
		if n = c.nodes[n.key.dir]; n == nil {
			break
		}
		path = n.key.name + "/" + path
	}
	return path
}

// render makes the contents of a node that is held.
func (c *control) render(ino images.Ino, x item) error {
	var b bytes.Buffer
	if err := x.file(&b); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.nodes[ino]
	if !n.time.IsZero() && bytes.Equal(n.data, b.Bytes()) {
		return nil
	}
	now := time.Now()
	if !now.After(n.time) {
		now = n.time.Add(1) // the kernel must see another mtime
	}
	n.data, n.time = bytes.Clone(b.Bytes()), now
	return nil
}

// contents is what a file holds now, and since when.
func (c *control) contents(n *controlNode) ([]byte, time.Time) {
	if n.item.live == nil {
		return n.data, n.time
	}
	data, t := n.item.live()
	if t.IsZero() {
		t = c.f.started
	}
	return data, t
}

func (c *control) attr(n *controlNode, out *fuse.Attr) {
	out.Ino = uint64(n.ino)
	out.Uid, out.Gid = c.f.uid, c.f.gid
	out.Blksize = 4096
	t := c.f.started
	switch n.key.mode {
	case syscall.S_IFDIR:
		out.Mode, out.Nlink = syscall.S_IFDIR|0o755, 2
		if !n.item.dir.still {
			t = time.Now() // what the kernel has cached of its listing does not count
		}
	case syscall.S_IFLNK:
		out.Mode, out.Nlink, out.Size = syscall.S_IFLNK|0o777, 1, uint64(len(n.item.link))
	default:
		var data []byte
		data, t = c.contents(n)
		out.Mode, out.Nlink, out.Size = syscall.S_IFREG|0o444, 1, uint64(len(data))
	}
	setTime(&out.Mtime, &out.Mtimensec, t)
	setTime(&out.Ctime, &out.Ctimensec, t)
	setTime(&out.Atime, &out.Atimensec, t)
}

func (c *control) getattr(ino images.Ino, out *fuse.AttrOut) fuse.Status {
	n := c.node(ino)
	if n == nil {
		return fuse.Status(syscall.ESTALE)
	}
	if ino == controlIno {
		setTimeout(&out.AttrValid, &out.AttrValidNsec, day)
	}
	c.attr(n, &out.Attr)
	return fuse.OK
}

func (c *control) readlink(ino images.Ino) ([]byte, fuse.Status) {
	n := c.node(ino)
	switch {
	case n == nil:
		return nil, fuse.Status(syscall.ESTALE)
	case n.item.link == "":
		return nil, fuse.EINVAL
	}
	return []byte(n.item.link), fuse.OK
}

func (c *control) read(ino images.Ino, p []byte, off int64) (fuse.ReadResult, fuse.Status) {
	n := c.node(ino)
	switch {
	case n == nil:
		return nil, fuse.Status(syscall.ESTALE)
	case n.key.mode != syscall.S_IFREG:
		return nil, fuse.EISDIR
	}
	data, _ := c.contents(n)
	if off < 0 || off >= int64(len(data)) {
		return fuse.ReadResultData(nil), fuse.OK
	}
	return fuse.ReadResultData(p[:copy(p, data[off:])]), fuse.OK
}

func (c *control) readDir(ino images.Ino, off uint64, out *fuse.DirEntryList, plus bool) fuse.Status {
	n := c.node(ino)
	switch {
	case n == nil:
		return fuse.Status(syscall.ESTALE)
	case n.item.dir == nil:
		return fuse.ENOTDIR
	}
	if err := c.f.snaps.readDir(ino, n.key.dir, off, out, plus, n.item.dir.list); err != nil {
		return c.refused(n, "", "readdir", err)
	}
	return fuse.OK
}

// rmdir removes what a directory of .imgfs lets go of.
func (c *control) rmdir(ino images.Ino, name string) fuse.Status {
	d := c.node(ino)
	switch {
	case d == nil:
		return fuse.Status(syscall.ESTALE)
	case d.item.dir == nil || d.item.dir.remove == nil:
		return fuse.EPERM
	}
	if err := d.item.dir.remove(name); err != nil {
		return c.refused(d, name, "rmdir", err)
	}
	return fuse.OK
}
