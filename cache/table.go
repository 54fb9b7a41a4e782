package cache

import (
	"bufio"
	"errors"
	"hash/crc32"
	"io"
	iofs "io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
)

// The shared table is a file of buckets of 4096 bytes. Bucket 0 is the header;
// a digest's first bits choose among the 2^n others. A bucket:
//
//	0     4    6               64                         4096
//	| crc | n  | zero          | n records of 96 bytes ... |
//
// Everything in it is a hint: it is not synced, a bucket whose checksum does not
// match is empty, and a full one forgets a record when the table cannot grow.
const (
	bucketSize = 4096
	bucketHead = 64
	recordSize = 96
	perBucket  = (bucketSize - bucketHead) / recordSize // 42

	tableName    = "shared"
	tableMagic   = "imgfstab"
	tableVersion = 1

	minTableBits = 4  // 16 buckets, 64 KiB
	maxTableBits = 18 // 262,144 buckets, 1 GiB, 11 million contents
)

type bucket [bucketSize]byte

type record struct {
	digest [32]byte
	place
}

type table struct {
	c    *Cache
	bufs sync.Pool
	cur  atomic.Pointer[tableFile]
	wmu  sync.Mutex // one writer at a time; finding takes no lock
}

// tableFile is the file and how many of a digest's bits choose the bucket.
type tableFile struct {
	f    *os.File
	bits int
}

func (t *tableFile) bucketOf(digest *[32]byte) int64 {
	return 1 + int64(be32(digest)>>(32-t.bits))
}

func be32(d *[32]byte) uint32 {
	return uint32(d[0])<<24 | uint32(d[1])<<16 | uint32(d[2])<<8 | uint32(d[3])
}

// openTable opens the table, or begins a new one when it is missing or damaged.
func openTable(c *Cache) (*table, error) {
	t := &table{c: c}
	t.bufs.New = func() any { return new(bucket) }
	f, err := c.root.OpenFile(tableName, os.O_RDWR, 0o600)
	if err == nil {
		bits, err := readTableHeader(f)
		if err == nil {
			t.cur.Store(&tableFile{f, bits})
			return t, nil
		}
		c.logf("cache: shared table begins anew", "err", err)
		f.Close()
	} else if !errors.Is(err, iofs.ErrNotExist) {
		return nil, err
	}
	f, err = c.root.OpenFile(tableName, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := writeTableHeader(f, minTableBits); err != nil {
		c.logf("cache: shared table not written", "err", err) // works until the restart, as far as the disk takes it
	}
	t.cur.Store(&tableFile{f, minTableBits})
	return t, nil
}

var errTable = errors.New("damaged shared table")

func readTableHeader(f io.ReaderAt) (bits int, err error) {
	var b bucket
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return 0, errTable
	}
	bits = int(b[16])
	if !b.ok() || string(b[8:16]) != tableMagic || b[17] != tableVersion || bits < minTableBits || bits > maxTableBits {
		return 0, errTable
	}
	return bits, nil
}

func writeTableHeader(f *os.File, bits int) error {
	var b bucket
	copy(b[8:], tableMagic)
	b[16], b[17] = byte(bits), tableVersion
	b.seal()
	_, err := f.WriteAt(b[:], 0)
	return err
}

func (t *table) close() { t.cur.Load().f.Close() }

func (b *bucket) seal()    { le.PutUint32(b[0:], crc32.Checksum(b[4:], castagnoli)) }
func (b *bucket) ok() bool { return le.Uint32(b[0:]) == crc32.Checksum(b[4:], castagnoli) }
func (b *bucket) len() int { return min(int(le.Uint16(b[4:])), perBucket) }

func (b *bucket) at(i int) []byte {
	off := bucketHead + i*recordSize
	return b[off : off+recordSize]
}

func (b *bucket) index(digest *[32]byte) int {
	for i := range b.len() {
		if [32]byte(b.at(i)[:32]) == *digest {
			return i
		}
	}
	return -1
}

// put sets record i: digest 32, pack 32, epoch 8, off 8, size 8, first 4, chunks 4.
func (b *bucket) put(i int, r *record) {
	p := b.at(i)
	copy(p, r.digest[:])
	copy(p[32:], r.pack[:])
	le.PutUint64(p[64:], r.epoch)
	le.PutUint64(p[72:], uint64(r.off))
	le.PutUint64(p[80:], uint64(r.size))
	le.PutUint32(p[88:], r.first)
	le.PutUint32(p[92:], r.chunks)
}

func (b *bucket) get(i int, r *place) bool {
	p := b.at(i)
	r.pack = key(p[32:64])
	r.epoch = le.Uint64(p[64:])
	r.off, r.size = int64(le.Uint64(p[72:])), int64(le.Uint64(p[80:]))
	r.first, r.chunks = le.Uint32(p[88:]), le.Uint32(p[92:])
	return r.epoch != 0 && validRange(r.off, r.size) && r.chunks > 0 && uint64(r.first)+uint64(r.chunks) <= maxChunks
}

// add puts r into the bucket; false when it is full.
func (b *bucket) add(r *record) bool {
	i := b.index(&r.digest)
	if i < 0 {
		if i = b.len(); i == perBucket {
			return false
		}
		le.PutUint16(b[4:], uint16(i+1))
	}
	b.put(i, r)
	return true
}

// read reads bucket i; one that is missing or damaged is empty.
func (t *tableFile) read(i int64, b *bucket) error {
	_, err := t.f.ReadAt(b[:], i*bucketSize)
	if err != nil && err != io.EOF {
		return err
	}
	if err == io.EOF || !b.ok() {
		*b = bucket{}
	}
	return nil
}

// find reads digest's record. A reader that meets a writer may see a torn bucket,
// which is empty to it: a miss.
func (t *table) find(digest [32]byte, r *place) bool {
	b := t.bufs.Get().(*bucket)
	defer t.bufs.Put(b)
	for range 2 { // again when the table was replaced meanwhile
		cur := t.cur.Load()
		if cur.read(cur.bucketOf(&digest), b) == nil {
			i := b.index(&digest)
			return i >= 0 && b.get(i, r)
		}
	}
	return false
}

// insert keeps recs; it sorts them.
func (t *table) insert(recs []record) error {
	t.wmu.Lock()
	defer t.wmu.Unlock()
	slices.SortFunc(recs, func(a, b record) int { return slices.Compare(a.digest[:], b.digest[:]) })
	for cur := t.cur.Load(); len(recs)>>cur.bits > 0 && t.shouldGrow(cur, len(recs)); cur = t.cur.Load() {
		if err := t.grow(cur); err != nil {
			return err
		}
	}
	var b bucket
	for i := 0; i < len(recs); {
		cur := t.cur.Load()
		at := cur.bucketOf(&recs[i].digest)
		if err := cur.read(at, &b); err != nil {
			return err
		}
		n, full := i, false
		for ; n < len(recs) && cur.bucketOf(&recs[n].digest) == at; n++ {
			if b.add(&recs[n]) {
				continue
			}
			if t.shouldGrow(cur, 0) {
				full = true
				break
			}
			b.put(int(recs[n].digest[31])%perBucket, &recs[n])
		}
		if n > i {
			b.seal()
			if err := t.c.step("table-write"); err != nil {
				return err
			}
			if _, err := cur.f.WriteAt(b[:], at*bucketSize); err != nil {
				return err
			}
		}
		i = n
		if full {
			if err := t.grow(cur); err != nil {
				return err
			}
		}
	}
	return nil
}

// shouldGrow reports whether the table is too small for more records on top of
// what it has. It looks at a few buckets only: a table whose one bucket is full but
// not the others (digests can be chosen) does not grow.
func (t *table) shouldGrow(cur *tableFile, more int) bool {
	if cur.bits >= maxTableBits {
		return false
	}
	const looks = 16
	var b bucket
	n := 0
	for range looks {
		if cur.read(1+rand.Int64N(int64(1)<<cur.bits), &b) == nil {
			n += b.len()
		}
	}
	return n/looks+more>>cur.bits > perBucket*3/5
}

// grow doubles the table: bucket i becomes 2i and 2i+1 of a new file, which is
// renamed into place. Places in packs that are gone or were emptied are left out.
func (t *table) grow(old *tableFile) (err error) {
	const tmp = tempDir + "/" + tableName
	f, err := t.c.root.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			t.c.root.Remove(tmp)
		}
	}()
	// Before every pack is loaded, a place in one that is not looks void.
	t.c.waitScan()
	if err = writeTableHeader(f, old.bits+1); err != nil {
		return err
	}
	w := bufio.NewWriterSize(io.NewOffsetWriter(f, bucketSize), 64*bucketSize)
	var b bucket
	for i := range int64(1) << old.bits {
		if err = old.read(i+1, &b); err != nil {
			return err
		}
		for _, half := range t.split(&b, old.bits) {
			half.seal()
			if _, err = w.Write(half[:]); err != nil {
				return err
			}
		}
	}
	if err = w.Flush(); err != nil {
		return err
	}
	if err = t.c.root.Rename(tmp, tableName); err != nil {
		return err
	}
	t.cur.Store(&tableFile{f, old.bits + 1})
	old.f.Close()
	return nil
}

func (t *table) split(b *bucket, bits int) (halves [2]bucket) {
	for i := range b.len() {
		r := record{digest: [32]byte(b.at(i)[:32])}
		if b.get(i, &r.place) && t.c.packEpoch(r.pack) == r.epoch {
			halves[be32(&r.digest)>>(31-bits)&1].add(&r)
		}
	}
	return halves
}
