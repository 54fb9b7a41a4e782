package unionfs

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"math/bits"
	"os"
	"runtime/debug"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The container that layer indexes and trees are kept in: a header of one page,
// the sections one after the other, a CRC32C for each block of them, nothing
// behind. docs/format.md draws it. The header and the table of checksums are
// verified when a file is opened; a block when it is first touched.
const (
	sectionHeader = 4096    // bytes of the header
	sectionBlock  = 1 << 16 // bytes that one checksum covers
	sectionAlign  = 64      // every section begins at a multiple of it: one cache line
	maxSections   = 16      // entries in the header's table of sections
	maxHeaderMeta = 2048    // bytes in the header that the kind of file defines

	// maxSectionFile bounds a file: checksums of 64 KiB blocks of it are 4 MiB.
	maxSectionFile = 1 << 36

	headMagic    = 0   // 8 bytes: the kind of file
	headVersion  = 8   // u32
	headCRC      = 12  // u32: CRC32C of the header with this field zero
	headSize     = 16  // u64: bytes of the file
	headData     = 24  // u64: bytes of all sections with their padding, from sectionHeader on
	headTableCRC = 32  // u32: CRC32C of the table of checksums, which follows the sections
	headSections = 64  // maxSections × (offset u64, length u64), offsets into the file
	headMeta     = 512 // maxHeaderMeta bytes
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sectionWriter writes a file of sections, front to back, then its header. Its
// methods are for one goroutine. The first error sticks and is finish's.
type sectionWriter struct {
	f    *os.File
	w    *bufio.Writer
	head [sectionHeader]byte
	off  int64  // bytes of sections and padding so far
	cur  int    // open section, -1 for none
	crc  uint32 // of the block being filled
	sums []byte // checksums of the blocks that are full
	err  error
}

// newSectionWriter starts a file of the kind that magic (8 bytes) and version
// name at the beginning of f, which must be empty.
func newSectionWriter(f *os.File, magic string, version uint32) *sectionWriter {
	w := &sectionWriter{f: f, w: bufio.NewWriterSize(f, 1<<18), cur: -1}
	copy(w.head[headMagic:headVersion], magic)
	binary.LittleEndian.PutUint32(w.head[headVersion:], version)
	_, w.err = w.w.Write(w.head[:]) // its place; finish writes it again
	return w
}

// begin ends the open section and begins section i (< maxSections). A section
// that is never begun is empty.
func (w *sectionWriter) begin(i int) {
	w.end()
	var zero [sectionAlign]byte
	if r := w.off % sectionAlign; r != 0 {
		w.append(zero[:sectionAlign-r])
	}
	w.cur = i
	binary.LittleEndian.PutUint64(w.head[headSections+16*i:], uint64(sectionHeader+w.off))
}

// end closes the open section.
func (w *sectionWriter) end() {
	if w.cur < 0 {
		return
	}
	at := w.head[headSections+16*w.cur:]
	binary.LittleEndian.PutUint64(at[8:], uint64(sectionHeader+w.off)-binary.LittleEndian.Uint64(at))
	w.cur = -1
}

// Write appends p to the open section.
func (w *sectionWriter) Write(p []byte) (int, error) {
	w.append(p)
	if w.err != nil {
		return 0, w.err
	}
	return len(p), nil
}

func (w *sectionWriter) append(p []byte) {
	if w.err != nil {
		return
	}
	if w.off+int64(len(p)) > maxSectionFile {
		w.err = fmt.Errorf("unionfs: writing %q: larger than %d bytes", w.f.Name(), int64(maxSectionFile))
		return
	}
	if _, w.err = w.w.Write(p); w.err != nil {
		return
	}
	for len(p) > 0 {
		n := min(len(p), int(sectionBlock-w.off%sectionBlock))
		w.crc = crc32.Update(w.crc, castagnoli, p[:n])
		p, w.off = p[n:], w.off+int64(n)
		if w.off%sectionBlock == 0 {
			w.sum()
		}
	}
}

func (w *sectionWriter) sum() {
	w.sums = binary.LittleEndian.AppendUint32(w.sums, w.crc)
	w.crc = 0
}

// written is the number of bytes in the open section.
func (w *sectionWriter) written() int64 {
	if w.cur < 0 {
		return 0
	}
	return sectionHeader + w.off - int64(binary.LittleEndian.Uint64(w.head[headSections+16*w.cur:]))
}

// finish ends the last section and writes the checksums and the header, with
// meta (at most maxHeaderMeta bytes) in it. It does not sync the file.
func (w *sectionWriter) finish(meta []byte) error {
	w.end()
	if w.off%sectionBlock != 0 {
		w.sum()
	}
	if w.err == nil {
		_, w.err = w.w.Write(w.sums)
	}
	if w.err == nil {
		w.err = w.w.Flush()
	}
	if w.err != nil {
		return w.err
	}
	h := w.head[:]
	binary.LittleEndian.PutUint64(h[headSize:], uint64(sectionHeader+w.off+int64(len(w.sums))))
	binary.LittleEndian.PutUint64(h[headData:], uint64(w.off))
	binary.LittleEndian.PutUint32(h[headTableCRC:], crc32.Checksum(w.sums, castagnoli))
	copy(h[headMeta:headMeta+maxHeaderMeta], meta)
	sealHeader(h)
	_, w.err = w.f.WriteAt(h, 0)
	return w.err
}

// sealHeader puts the checksum of header h into it.
func sealHeader(h []byte) {
	binary.LittleEndian.PutUint32(h[headCRC:], 0)
	binary.LittleEndian.PutUint32(h[headCRC:], crc32.Checksum(h, castagnoli))
}

// sectionReader is a mapped file of sections. Its methods are safe for
// concurrent use, but close, which nobody may race. What its methods return
// aliases the mapping and is valid until close.
type sectionReader struct {
	data    []byte          // the file
	sums    []byte          // the table of checksums in it
	body    uint64          // bytes of all sections
	good    []atomic.Uint32 // a bit for each block that was verified
	sect    [maxSections]struct{ off, n uint64 }
	damaged error // ErrDamaged with the file's name, made once so that no access allocates
}

// openSections maps the file at path and verifies its header and its table of
// checksums. The error is ErrDamaged when they do not match, also when the
// kind or the version is another.
func openSections(path, magic string, version uint32) (*sectionReader, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	damaged := fmt.Errorf("unionfs: opening %q: %w", path, ErrDamaged)
	if !st.Mode().IsRegular() || st.Size() < sectionHeader || st.Size() > maxSectionFile*2 || st.Size() > math.MaxInt {
		return nil, damaged
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("unionfs: mapping %q: %v", path, err)
	}
	s := &sectionReader{data: m, damaged: damaged}
	if !s.check(magic, version) {
		s.close()
		return nil, damaged
	}
	return s, nil
}

// check verifies the header and the table of checksums, and fills s from them.
func (s *sectionReader) check(magic string, version uint32) (ok bool) {
	defer faultGuard(&ok)()
	h := s.data[:sectionHeader]
	if string(h[headMagic:headVersion]) != magic || binary.LittleEndian.Uint32(h[headVersion:]) != version {
		return false
	}
	var zero [4]byte
	crc := crc32.Checksum(h[:headCRC], castagnoli)
	crc = crc32.Update(crc, castagnoli, zero[:])
	crc = crc32.Update(crc, castagnoli, h[headCRC+4:])
	if crc != binary.LittleEndian.Uint32(h[headCRC:]) {
		return false
	}
	size := uint64(len(s.data))
	s.body = binary.LittleEndian.Uint64(h[headData:])
	if binary.LittleEndian.Uint64(h[headSize:]) != size || s.body > maxSectionFile {
		return false
	}
	blocks := (s.body + sectionBlock - 1) / sectionBlock
	if sectionHeader+s.body+4*blocks != size {
		return false
	}
	s.sums = s.data[sectionHeader+s.body:]
	if crc32.Checksum(s.sums, castagnoli) != binary.LittleEndian.Uint32(h[headTableCRC:]) {
		return false
	}
	for i := range s.sect {
		at := h[headSections+16*i:]
		off, n := binary.LittleEndian.Uint64(at), binary.LittleEndian.Uint64(at[8:])
		if n == 0 {
			continue
		}
		if off < sectionHeader || off-sectionHeader > s.body || n > s.body-(off-sectionHeader) {
			return false
		}
		s.sect[i].off, s.sect[i].n = off, n
	}
	s.good = make([]atomic.Uint32, (blocks+31)/32)
	return true
}

// faultGuard makes a fault in the mapping (the disk cannot read, the file was
// cut under us) set *ok to false instead of ending the process. Defer what it
// returns.
func faultGuard(ok *bool) func() {
	old := debug.SetPanicOnFault(true)
	return func() {
		debug.SetPanicOnFault(old)
		if r := recover(); r != nil {
			if _, fault := r.(interface{ Addr() uintptr }); !fault {
				panic(r)
			}
			*ok = false
		}
	}
}

// meta is the part of the header that the kind of file defines.
func (s *sectionReader) meta() []byte { return s.data[headMeta : headMeta+maxHeaderMeta] }

// len is the length of section i in bytes.
func (s *sectionReader) len(i int) uint64 { return s.sect[i].n }

// count is the number of records of the given size in section i, and whether
// they fill it and can be counted by 32 bits.
func (s *sectionReader) count(i int, size uint64) (uint32, bool) {
	n := s.sect[i].n
	return uint32(n / size), n%size == 0 && n/size <= math.MaxUint32
}

// bytes returns n bytes of section i from off on, verified, or ErrDamaged.
func (s *sectionReader) bytes(i int, off, n uint64) ([]byte, error) {
	sec := &s.sect[i]
	if off > sec.n || n > sec.n-off {
		return nil, s.damaged
	}
	if n == 0 {
		return nil, nil
	}
	at := sec.off + off
	first, last := (at-sectionHeader)/sectionBlock, (at-sectionHeader+n-1)/sectionBlock
	for b := first; b <= last; b++ {
		if s.good[b/32].Load()&(1<<(b%32)) == 0 && !s.verifyBlock(b) {
			return nil, s.damaged
		}
	}
	return s.data[at : at+n : at+n], nil
}

// record returns record r of section i, whose records have the given size.
func (s *sectionReader) record(i int, r uint32, size uint64) ([]byte, error) {
	return s.bytes(i, uint64(r)*size, size)
}

// str is bytes as a string that aliases the mapping.
func (s *sectionReader) str(i int, off, n uint64) (string, error) {
	b, err := s.bytes(i, off, n)
	return unsafe.String(unsafe.SliceData(b), len(b)), err
}

// verifyBlock checks block b against its checksum and remembers that it was right.
func (s *sectionReader) verifyBlock(b uint64) (ok bool) {
	defer faultGuard(&ok)()
	off := b * sectionBlock
	n := min(uint64(sectionBlock), s.body-off)
	off += sectionHeader
	if crc32.Checksum(s.data[off:off+n], castagnoli) != binary.LittleEndian.Uint32(s.sums[4*b:]) {
		return false
	}
	s.good[b/32].Or(1 << (b % 32))
	return true
}

// touched counts the blocks that were verified, the header, and the checksums.
func (s *sectionReader) touched() (read, size int64) {
	read = sectionHeader + int64(len(s.sums))
	for i := range s.good {
		read += int64(bits.OnesCount32(s.good[i].Load())) * sectionBlock
	}
	size = int64(len(s.data))
	return min(read, size), size
}

// verify checks every block, also those that were checked before.
func (s *sectionReader) verify() error {
	for b := range (s.body + sectionBlock - 1) / sectionBlock {
		if !s.verifyBlock(b) {
			return s.damaged
		}
	}
	return nil
}

// forget drops the resident pages of the mapping.
func (s *sectionReader) forget() { _ = unix.Madvise(s.data, unix.MADV_DONTNEED) }

// close unmaps the file.
func (s *sectionReader) close() error {
	if s.data == nil {
		return nil
	}
	m := s.data
	s.data, s.sums, s.body, s.good = nil, nil, 0, nil
	s.sect = [maxSections]struct{ off, n uint64 }{}
	return unix.Munmap(m)
}
