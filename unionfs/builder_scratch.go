package unionfs

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// scratch gives out the pieces that the arrays of a Builder are in. The first of
// them are memory; when a layer needs more than that, they are of an unlinked file:
// the kernel may write them out, so that they are no burden on memory, and they are
// gone when the process is.
type scratch struct {
	dir     string
	f       *os.File // nil until it is needed
	memory  int64    // bytes of pieces that are memory
	end     int64    // where the next piece goes in the file
	have    int64    // bytes that are allocated on the disk
	closing bool     // the file goes as a whole
}

// maxMemory is how much of a scratch is memory: enough for some 20,000 entries.
// A page of it is had in a tenth of the time that one of a file takes. All of them
// together have maxMemories: an image may have hundreds of layers.
const (
	maxMemory   = 8 << 20
	maxMemories = 48 << 20
)

// memories is a variable of the package because the process has one memory.
var memories atomic.Int64

// hold takes n bytes of memory, or gives -n back; it reports false when there is no
// room.
func (s *scratch) hold(n int64) bool {
	if n > 0 && (s.memory+n > maxMemory || memories.Load()+n > maxMemories) {
		return false // nearly: others may have come between, each with a piece
	}
	s.memory += n
	memories.Add(n)
	return true
}

// firstPiece is the size of an array's first piece in bytes, lastDoubling the
// size from which on arrays grow by that much instead of twofold.
// allocateStep is what is allocated at once, so that a small layer, whose pieces
// are all first ones, asks the file system once.
const (
	allocateStep = 1 << 20
	firstPiece   = 1 << 16 // also the largest page size there is
	lastDoubling = 64 << 20
)

// open makes the file.
func (s *scratch) open() error {
	f, err := os.CreateTemp(s.dir, "build-*.tmp")
	if err != nil {
		return fmt.Errorf("unionfs: making scratch file: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return fmt.Errorf("unionfs: making scratch file: %w", err)
	}
	s.f = f
	return nil
}

// inMemory is the place of a piece that is memory.
const inMemory = -1

// piece maps n new zero bytes, a multiple of the page size, and tells where in the
// file they are. There they are allocated on the disk: on a full one this fails,
// instead of a store later by a signal.
func (s *scratch) piece(n int64) (m []byte, off int64, err error) {
	if s.hold(n) {
		m, err = unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err == nil {
			return m, inMemory, nil
		}
		s.hold(-n)
	}
	if s.f == nil {
		if err := s.open(); err != nil {
			return nil, 0, err
		}
	}
	if need := s.end + n - s.have; need > 0 {
		need = max(need, allocateStep)
		if err := s.allocate(need); err != nil {
			return nil, 0, fmt.Errorf("unionfs: growing scratch file: %w", err)
		}
		s.have += need
	}
	m, err = unix.Mmap(int(s.f.Fd()), s.end, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, 0, fmt.Errorf("unionfs: mapping scratch file: %w", err)
	}
	off = s.end
	s.end += n
	return m, off, nil
}

// allocate allocates n more bytes at the end of the file.
func (s *scratch) allocate(n int64) error {
	fd := int(s.f.Fd())
	for {
		err := unix.Fallocate(fd, 0, s.have, n)
		switch {
		case err == unix.EINTR:
			continue
		case errors.Is(err, unix.EOPNOTSUPP) || err == unix.ENOSYS:
		default:
			return err
		}
		break
	}
	// A file system without fallocate: zeros do the same.
	zero := make([]byte, 1<<16)
	for off := int64(0); off < n; off += int64(len(zero)) {
		if _, err := s.f.WriteAt(zero[:min(n-off, int64(len(zero)))], s.have+off); err != nil {
			return err
		}
	}
	return nil
}

// extend makes a piece that is memory larger, without copying it; ok is false when
// there is no room for that.
func (s *scratch) extend(m []byte, size int64) (larger []byte, ok bool) {
	more := size - int64(len(m))
	if !s.hold(more) {
		return nil, false
	}
	larger, err := unix.Mremap(m, int(size), unix.MREMAP_MAYMOVE)
	if err != nil {
		s.hold(-more)
		return nil, false
	}
	return larger, true
}

// release unmaps a piece and gives its place on the disk back.
func (s *scratch) release(m []byte, off int64) {
	if m == nil {
		return
	}
	_ = unix.Munmap(m)
	if off == inMemory {
		s.hold(-int64(len(m)))
		return
	}
	if s.closing {
		return
	}
	_ = unix.Fallocate(int(s.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, int64(len(m)))
}

func (s *scratch) close() error {
	if s.f == nil {
		return nil
	}
	return s.f.Close()
}

// array is a growing array of bytes in a scratch file. Growing it may move it:
// a slice of it is valid until the next grow.
type array struct {
	s   *scratch
	mem []byte // the piece
	off int64  // of the piece in the scratch file
	n   int64  // bytes in use
}

// grow appends k bytes, zero unless the array was shortened before, and returns them.
func (a *array) grow(k int64) ([]byte, error) {
	if err := a.reserve(k); err != nil {
		return nil, err
	}
	b := a.mem[a.n : a.n+k : a.n+k]
	a.n += k
	return b, nil
}

// reserve makes room so that growing by k bytes cannot fail.
func (a *array) reserve(k int64) error {
	if a.n+k <= int64(len(a.mem)) {
		return nil
	}
	size := max(int64(len(a.mem)), firstPiece)
	for size < a.n+k {
		size += min(size, lastDoubling)
	}
	if a.mem != nil && a.off == inMemory {
		if m, ok := a.s.extend(a.mem, size); ok {
			a.mem = m
			return nil
		}
	}
	m, off, err := a.s.piece(size)
	if err != nil {
		return err
	}
	copy(m, a.mem[:a.n])
	a.s.release(a.mem, a.off)
	a.mem, a.off = m, off
	return nil
}

// bytes are those in use.
func (a *array) bytes() []byte { return a.mem[:a.n] }

// at is record i of records of the given size.
func (a *array) at(i uint32, size int64) []byte {
	return a.mem[int64(i)*size : int64(i)*size+size : int64(i)*size+size]
}

// count is the number of records of the given size.
func (a *array) count(size int64) uint32 { return uint32(a.n / size) }

func (a *array) free() {
	a.s.release(a.mem, a.off)
	a.mem, a.n = nil, 0
}

// words is the array as 32-bit words in the machine's order.
func (a *array) words() []uint32 {
	if a.n == 0 {
		return nil
	}
	return unsafe.Slice((*uint32)(unsafe.Pointer(unsafe.SliceData(a.mem))), a.n/4)
}

// buckets is a hash table in a scratch array: each bucket holds 1 + the number
// of the first record of a chain, 0 for none. The records hold the rest of the
// chain and their hash.
type buckets struct{ array }

// slot is the bucket of a hash.
func (t *buckets) slot(hash uint32) *uint32 {
	w := t.words()
	return &w[hash&uint32(len(w)-1)]
}

// first is the record that the chain of a hash begins with, plus one.
func (t *buckets) first(hash uint32) uint32 {
	if t.n == 0 {
		return 0
	}
	return *t.slot(hash)
}

// fit makes the table as large as the number of records wants it. When it grew
// it is empty and the caller puts its records in again.
func (t *buckets) fit(records uint32) (grown bool, err error) {
	if int64(records) < t.n/4 {
		return false, nil
	}
	size := max(2*t.n, firstPiece)
	next := array{s: t.s}
	if _, err := next.grow(size); err != nil {
		return false, err
	}
	t.free()
	t.array = next
	return true, nil
}
