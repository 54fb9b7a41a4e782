package unionfs

import (
	"crypto/sha256"
	"fmt"
	"hash/maphash"
	iofs "io/fs"
	"maps"
	"slices"
	"sync"
)

// NoID is what [Builder.Add] returns for an entry that is no inode of the layer:
// a whiteout, a link to another layer's file, a name that layers ignore.
const NoID ID = 1<<31 - 1

var errClosed = fmt.Errorf("unionfs: builder: %w", iofs.ErrClosed)

// Fields of a node, the record of one name while a layer is built. It begins
// like a child record.
const (
	nodeParent = 12 // u32: number of the directory
	nodeSib    = 16 // u32: 1 + the next node of the directory
	nodeNext   = 20 // u32: 1 + the next node of the hash chain
	nodeHash   = 24 // u32
	nodeSize   = 28

	setOff  = 0  // u32: offset of a set of attributes
	setLen  = 4  // u32
	setNext = 8  // u32: 1 + the next set of the hash chain
	setHash = 12 // u32
	setSize = 16

	contNext = 28 // u32: 1 + the next content of the hash chain
)

// Builder compiles a layer from its entries, and is a [Layer] while it does so:
// the numbers that it gives are final from the first moment. Its records live in
// mapped scratch files, so that the Go heap stays small whatever the layer holds.
//
// One goroutine adds (Add, BeginContent, SetContent, Complete, Write); any number
// may read at the same time. An [EntryError] refuses one entry and leaves the
// Builder usable (parents of the entry may have been made); after any other
// error of Add or SetContent it is of no more use. Every method that reads
// returns an error that is io/fs.ErrClosed after Close.
type Builder struct {
	seed maphash.Seed

	mu sync.RWMutex
	s  *scratch

	dirs, files, nodes, names   array // records as in a layer index, but for nodes
	contents, chunks, digests   array
	xattrs, sets                array
	nodeTab, setTab, contentTab buckets
	xattrNames                  map[string]struct{}

	live     uint32 // nodes that a name leads to
	implicit uint32 // live implicit directories but the root
	replaced int
	packEnd  int64
	expanded int64
	earliest struct {
		sec  int64
		nsec uint32
		set  bool
	}
	done   bool
	closed bool

	bell bell
}

// bell wakes who waits for a Builder. Its lock comes after the Builder's and is
// not the Builder's, so that asking to be woken never waits for Write.
type bell struct {
	mu    sync.Mutex
	ch    chan struct{} // nil while nobody waits
	ended bool          // failed or closed: nobody need wait
	err   error         // what the layer failed with
}

// ring wakes who waits.
func (l *bell) ring() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wake()
}

func (l *bell) wake() {
	if l.ch != nil {
		close(l.ch)
		l.ch = nil
	}
}

// end rings for the last time, with an error or none. The first error stays.
func (l *bell) end(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.err = err
	}
	l.ended = true
	l.wake()
}

func (l *bell) failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

var _ Layer = (*Builder)(nil)

// NewBuilder starts a layer that has nothing but an implicit root. The scratch
// file that a large layer needs is made in dir and has no name there.
func NewBuilder(dir string) (*Builder, error) {
	s := &scratch{dir: dir}
	b := &Builder{s: s, seed: maphash.MakeSeed(), xattrNames: map[string]struct{}{}}
	for _, a := range b.arrays() {
		a.s = s
	}
	r, err := b.dirs.grow(dirSize)
	if err != nil {
		b.Close()
		return nil, err
	}
	putAttr(r, true, &Attr{Mode: modeDir | 0o755, Nlink: 2})
	r[inoFlags] = flagImplicit
	return b, nil
}

func (b *Builder) arrays() []*array {
	return []*array{&b.dirs, &b.files, &b.nodes, &b.names, &b.contents, &b.chunks, &b.digests,
		&b.xattrs, &b.sets, &b.nodeTab.array, &b.setTab.array, &b.contentTab.array}
}

// Close frees the scratch file; later calls return io/fs.ErrClosed. Who waits
// for Changed wakes.
func (b *Builder) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil
	}
	b.closed = true
	b.bell.end(nil)
	b.s.closing = true
	for _, a := range b.arrays() {
		a.free()
	}
	return b.s.close()
}

// Changed returns a channel that is closed when something is added, a content
// is complete, or the layer is done, failed or closed.
func (b *Builder) Changed() <-chan struct{} {
	l := &b.bell
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ch == nil {
		l.ch = make(chan struct{})
	}
	ch := l.ch
	if l.ended {
		l.wake()
	}
	return ch
}

// Fail ends the layer with an error: it will never be done. The first error
// stays. What was added can still be asked for.
func (b *Builder) Fail(err error) { b.bell.end(err) }

// Err is the error that the layer failed with, or nil.
func (b *Builder) Err() error { return b.bell.failure() }

// Complete says that no entry will come any more: what the Builder answers is
// final, link counts and the times of implicit directories (the earliest of the
// layer) included.
func (b *Builder) Complete() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.done || b.writable() != nil {
		return
	}
	for i := range b.dirs.count(dirSize) {
		if r := b.dirs.at(i, dirSize); r[inoFlags]&flagImplicit != 0 {
			put64(r, inoMtime, b.earliest.sec)
			put32(r, inoNsec, b.earliest.nsec)
		}
	}
	b.done = true
	b.bell.ring()
}

// Done reports whether Complete was called.
func (b *Builder) Done() bool {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.done
}

// Replaced counts the names whose inode, or whose explicit attributes, a later
// entry of the same layer has replaced so far. While it is 0, nothing that was
// said of an entry has become untrue.
func (b *Builder) Replaced() int {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.replaced
}

// HasImplicit reports whether the layer so far names a directory other than its
// root only as a parent of something.
func (b *Builder) HasImplicit() bool {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.implicit > 0
}

// Stats returns the totals so far.
func (b *Builder) Stats() Stats {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.stats()
}

func (b *Builder) stats() Stats {
	return Stats{
		Dirs: b.dirs.count(dirSize), Files: b.files.count(fileSize), Names: b.live,
		Contents: b.contents.count(contentSize), Chunks: b.chunks.count(chunkSize),
		Expanded: b.expanded, PackSize: b.packEnd,
	}
}

// XattrNameSet returns every attribute name seen so far, sorted.
func (b *Builder) XattrNameSet() []string {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return slices.Sorted(maps.Keys(b.xattrNames))
}

// inode returns the record of id. The lock is held.
func (b *Builder) inode(id ID) ([]byte, error) {
	if b.closed {
		return nil, errClosed
	}
	if id.IsDir() {
		if id.Index() < b.dirs.count(dirSize) {
			return b.dirs.at(id.Index(), dirSize), nil
		}
	} else if id.Index() < b.files.count(fileSize) {
		return b.files.at(id.Index(), fileSize), nil
	}
	return nil, notKind(id, "number of the layer")
}

func (b *Builder) dir(id ID) ([]byte, error) {
	if !id.IsDir() {
		return nil, notDir(id)
	}
	return b.inode(id)
}

func (b *Builder) name(off, n uint32) []byte { return b.names.bytes()[off : off+n] }

// Lookup tells what the layer says of name in dir so far.
func (b *Builder) Lookup(dir ID, name string) (Child, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if _, err := b.dir(dir); err != nil {
		return Child{}, err
	}
	n := b.find(dir.Index(), name)
	if n == 0 {
		return Child{}, nil
	}
	return b.child(b.nodes.at(n-1, nodeSize)), nil
}

// child reads what a node says.
func (b *Builder) child(r []byte) Child {
	c := Child{Kind: ChildKind(r[childKind])}
	switch c.Kind {
	case ChildInode:
		c.ID = ID(get32(r, childID))
	case ChildLink:
		off := get32(r, childID)
		c.Target = string(b.name(off+2, uint32(get16(b.names.bytes(), int(off)))))
	}
	return c
}

// Opaque reports whether dir hides what lower layers have in it, so far.
func (b *Builder) Opaque(dir ID) (bool, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	r, err := b.dir(dir)
	if err != nil {
		return false, err
	}
	return r[inoFlags]&flagOpaque != 0, nil
}

// Parent returns the directory that holds dir, and dir's name in it. The root is
// its own parent, "".
func (b *Builder) Parent(dir ID) (ID, string, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	r, err := b.dir(dir)
	if err != nil {
		return 0, "", err
	}
	return DirID(get32(r, dirParent)), string(b.name(get32(r, dirName), uint32(r[inoNameLen]))), nil
}

// Attr fills a with the attributes of id. Link counts, and what an implicit
// directory has, may change until the Builder is done.
func (b *Builder) Attr(id ID, a *Attr) error {
	b.mu.RLock()
	defer b.mu.RUnlock()
	r, err := b.inode(id)
	if err != nil {
		return err
	}
	attrOf(r, id.IsDir(), a)
	return nil
}

// Readlink returns the target of a symbolic link, or io/fs.ErrInvalid when id is
// something else.
func (b *Builder) Readlink(id ID) (string, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	r, err := b.inode(id)
	if err != nil {
		return "", err
	}
	if id.IsDir() || get16(r, inoMode)&modeType != modeLink {
		return "", notKind(id, "symbolic link")
	}
	return string(b.target(r)), nil
}

// target is where a symbolic link leads.
func (b *Builder) target(r []byte) []byte {
	return b.name(get32(r, fileAux), uint32(get64(r, fileLen)))
}

// xattrSet returns the heap of sets from id's set on; nil when it has none. The lock is held.
func (b *Builder) xattrSet(id ID) ([]byte, error) {
	r, err := b.inode(id)
	if err != nil {
		return nil, err
	}
	at := get32(r, inoXattrs)
	if at == 0 {
		return nil, nil
	}
	return b.xattrs.bytes()[at-1:], nil
}

// Xattr returns the value of an extended attribute of id; ok is false when it
// has none of that name.
func (b *Builder) Xattr(id ID, name string) (value string, ok bool, err error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	set, err := b.xattrSet(id)
	if err != nil || set == nil {
		return "", false, err
	}
	v, ok, _ := xattrOf(set, name)
	return string(v), ok, nil
}

// XattrNames returns the names of id's extended attributes, sorted.
func (b *Builder) XattrNames(id ID) ([]string, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	set, err := b.xattrSet(id)
	if err != nil || set == nil {
		return nil, err
	}
	names, _ := xattrNamesOf(set)
	return names, nil
}

// Content tells where the content of a regular file is. While its bytes pass,
// NChunks is 0; before BeginContent PackOff is -1 too.
func (b *Builder) Content(id ID) (ContentInfo, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	r, err := b.regular(id)
	if err != nil {
		return ContentInfo{}, err
	}
	n, size := get32(r, fileAux), get64(r, fileLen)
	switch {
	case size == 0:
		return ContentInfo{Digest: sha256.Sum256(nil)}, nil
	case n == none:
		return ContentInfo{Size: size, PackOff: -1}, nil
	}
	return b.content(n), nil
}

func (b *Builder) content(n uint32) ContentInfo {
	r := b.contents.at(n, contentSize)
	c := contentOf(r)
	if d := get32(r, contDigest); d != none {
		c.Digest = Digest(b.digests.at(d, digestSize))
	}
	return c
}

// Chunk returns chunk n of the layer and its size in bytes. The error is
// io/fs.ErrInvalid when there is none so far.
func (b *Builder) Chunk(n uint32) (c Chunk, size int64, err error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.closed {
		return Chunk{}, 0, errClosed
	}
	if n >= b.chunks.count(chunkSize) {
		return Chunk{}, 0, &EntryError{Name: fmt.Sprint("chunk ", n), Reason: "not in the layer"}
	}
	r := b.chunks.at(n, chunkSize)
	c = chunkOf(r)
	c.Digest = Digest(b.digests.at(get32(r, chunkDigest), digestSize))
	return c, int64(get32(r, chunkLen)), nil
}

// regular returns the record of a regular file. The lock is held.
func (b *Builder) regular(id ID) ([]byte, error) {
	r, err := b.inode(id)
	if err != nil {
		return nil, err
	}
	if id.IsDir() || get16(r, inoMode)&modeType != modeReg {
		return nil, notKind(id, "regular file")
	}
	return r, nil
}
