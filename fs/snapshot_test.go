package fs

import (
	"fmt"
	"slices"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// A reader sees the directory as it was when it began, from one listing; one
// whose snapshot is gone goes on.
func TestSnapshots(t *testing.T) {
	var s snapshots
	lists := 0
	names := func(n int) func() ([]listed, error) {
		return func() (l []listed, _ error) {
			lists++
			for i := range n {
				l = append(l, listed{fmt.Sprintf("name-%03d", i), syscall.S_IFDIR})
			}
			return l, nil
		}
	}
	read := func(off uint64, n int) (got []string, next uint64) {
		t.Helper()
		buf := make([]byte, 512)
		out := fuse.NewDirEntryList(buf, off)
		if err := s.readDir(7, 1, off, out, false, names(n)); err != nil {
			t.Fatal(err)
		}
		return parseDirents(buf), out.Offset
	}
	var all []string
	off := uint64(0)
	for i := 0; ; i++ {
		part, next := read(off, 100-i) // names go while it reads
		if len(part) == 0 {
			break
		}
		all, off = append(all, part...), next
	}
	want := []string{".", ".."}
	for i := range 100 {
		want = append(want, fmt.Sprintf("name-%03d", i))
	}
	if !slices.Equal(all, want) || lists != 1 {
		t.Errorf("read %q in %d listings, want %q in 1", all, lists, want)
	}
	_, next := read(0, 100)
	for range maxSnapshots {
		read(0, 3)
	}
	if len(s.list) > maxSnapshots {
		t.Errorf("%d snapshots are kept, want at most %d", len(s.list), maxSnapshots)
	}
	lists = 0
	first, next := read(next, 100)
	if first[0] <= "name-000" || lists != 1 {
		t.Errorf("a reader without its snapshot goes on at %q after %d listings", first[0], lists)
	}
	if read(next, 100); lists != 1 {
		t.Errorf("it lists %d times, want once", lists)
	}
}

// parseDirents returns the names in a buffer of fuse_dirents.
func parseDirents(buf []byte) (names []string) {
	const header = 24 // ino, off, namelen, type
	for len(buf) > header {
		n := int(buf[16]) | int(buf[17])<<8
		if n == 0 {
			break
		}
		names = append(names, string(buf[header:header+n]))
		buf = buf[min(len(buf), (header+n+7)&^7):]
	}
	return names
}
