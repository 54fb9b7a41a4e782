package fs

import (
	"slices"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

const (
	// maxSnapshots bounds the listings that are being read at one time, and
	// maxListed the names in all of them but the latest.
	maxSnapshots = 64
	maxListed    = 1 << 20
)

// snapshots are the listings of directories that change: what a directory held
// when its reader began. So a directory of 10,000 names is listed once for each
// reader, not once for each READDIR, and nothing is left out or said twice while
// names come and go. A snapshot is known by the offsets of its entries:
//
//	63 62              32 31             0
//	+--+-----------------+---------------+
//	|0 |     snapshot    |   position    |   of the next entry; "." is 0, ".." is 1
//	+--+-----------------+---------------+
//
// There are no open directories, so nobody says when a reader has ended: the
// ones unused for longest go. A reader whose snapshot is gone goes on at its
// position in a new one.
type snapshots struct {
	mu   sync.Mutex
	last uint32
	list []*snapshot // the latest used last
}

type snapshot struct {
	id    uint32
	dir   images.Ino
	names []listed
}

// listed is a name of a directory.
type listed struct {
	name string
	mode uint32 // its type: S_IFDIR, S_IFREG, S_IFLNK
}

// readDir answers a READDIR of dir at offset off. list is called when a reader
// begins, or when its snapshot is gone. The entries carry no attributes: who
// wants them looks the name up.
func (s *snapshots) readDir(dir, parent images.Ino, off uint64, out *fuse.DirEntryList, plus bool, list func() ([]listed, error)) error {
	snap := s.find(dir, off)
	if snap == nil {
		names, err := list()
		if err != nil {
			return err
		}
		snap = s.add(dir, off, names)
	}
	for pos := int(uint32(off)); pos < len(snap.names)+2; pos++ {
		d := fuse.DirEntry{Mode: syscall.S_IFDIR, Off: uint64(snap.id)<<32 | uint64(pos+1)}
		switch pos {
		case 0:
			d.Name, d.Ino = ".", uint64(dir)
		case 1:
			d.Name, d.Ino = "..", uint64(parent)
		default:
			d.Name, d.Mode = snap.names[pos-2].name, snap.names[pos-2].mode
		}
		if plus && out.AddDirLookupEntry(d) == nil || !plus && !out.AddDirEntry(d) {
			break
		}
	}
	return nil
}

// find returns the snapshot that off is in; nil when there is none any more, or a
// reader begins.
func (s *snapshots) find(dir images.Ino, off uint64) *snapshot {
	if off == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.list, func(x *snapshot) bool { return x.id == uint32(off>>32) && x.dir == dir })
	if i < 0 {
		return nil
	}
	x := s.list[i]
	s.list = append(slices.Delete(s.list, i, i+1), x)
	return x
}

// add keeps a snapshot: a new one for a reader that begins, else the one of off
// again.
func (s *snapshots) add(dir images.Ino, off uint64, names []listed) *snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := &snapshot{id: uint32(off>>32) & (1<<31 - 1), dir: dir, names: names}
	if off == 0 {
		s.last = s.last%(1<<31-1) + 1
		x.id = s.last
	}
	s.list = append(s.list, x)
	sum := 0
	for i := len(s.list) - 2; i >= 0; i-- {
		if sum += len(s.list[i].names); sum > maxListed || len(s.list)-i > maxSnapshots {
			s.list = slices.Delete(s.list, 0, i+1)
			break
		}
	}
	return x
}
