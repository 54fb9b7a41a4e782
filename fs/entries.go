package fs

import (
	"log/slog"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// maxTelling is how many directories are told of at one time. Each takes a
// thread, while somebody holds the directory's lock.
const maxTelling = 256

// nameQueue tells the kernel of names, those of a directory one after the other,
// and directories beside each other: one whose lock is held for long does not
// hold up the rest.
type nameQueue struct {
	log     *slog.Logger
	running sync.WaitGroup
	slots   chan struct{}

	mu     sync.Mutex
	server *fuse.Server
	dirs   map[uint64][]*nameNotice // those that a goroutine works on; what it has not begun
	count  int
	closed bool
}

type nameNotice struct {
	name string
	done chan struct{}
}

// told is what waiting for nothing is.
func told() <-chan struct{} {
	done := make(chan struct{})
	close(done)
	return done
}

func newNameQueue(log *slog.Logger) *nameQueue {
	return &nameQueue{log: log, slots: make(chan struct{}, maxTelling), dirs: map[uint64][]*nameNotice{}}
}

func (q *nameQueue) start(s *fuse.Server) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.server = s
}

// close ends the delivery, and waits for what is being delivered.
func (q *nameQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.running.Wait()
}

// add queues a name. The channel is closed when the kernel has been told.
func (q *nameQueue) add(dir uint64, name string) <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.server == nil {
		return told()
	}
	list, works := q.dirs[dir]
	for _, x := range list {
		if x.name == name {
			return x.done // it has not begun, so it comes after this change too
		}
	}
	if q.count >= maxNotices {
		q.log.Error("too many notifications for the kernel, one is lost", "node", dir, "name", name)
		return told()
	}
	x := &nameNotice{name, make(chan struct{})}
	q.count++
	q.dirs[dir] = append(list, x)
	if !works {
		server := q.server
		q.running.Go(func() { q.tell(server, dir) })
	}
	return x.done
}

// busy reports whether the kernel has yet to be told of names in a directory.
func (q *nameQueue) busy(dir uint64) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	_, works := q.dirs[dir]
	return works
}

// tell delivers the names of a directory until there are none.
func (q *nameQueue) tell(s *fuse.Server, dir uint64) {
	q.slots <- struct{}{}
	defer func() { <-q.slots }()
	for {
		q.mu.Lock()
		list := q.dirs[dir]
		if len(list) == 0 || q.closed {
			for _, x := range list {
				close(x.done)
			}
			q.count -= len(list)
			delete(q.dirs, dir)
			q.mu.Unlock()
			return
		}
		x := list[0]
		q.dirs[dir] = list[1:]
		q.count--
		q.mu.Unlock()
		if st := s.EntryNotify(dir, x.name); st != fuse.Status(syscall.EBADF) && st != fuse.ENODEV { // else unmounted
			check(q.log, st, dir, x.name)
		}
		close(x.done)
	}
}
