package fs

import (
	"log/slog"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// notifier tells the kernel what of its caches is no longer true. It does so
// beside the requests: a notification takes locks that the kernel may hold while
// it waits for the answer to one. Names have a queue of their own: one waits for
// what is being made or looked up in its directory, which may be a pull.
type notifier struct {
	names, inodes *queue
	running       sync.WaitGroup

	mu     sync.Mutex
	server *fuse.Server
}

// notice is a range of inodes whose pages and attributes are to be dropped, or,
// with a name, an entry of the directory first.
type notice struct {
	first, last uint64
	name        string
}

func newNotifier(log *slog.Logger) *notifier {
	return &notifier{names: newQueue(log), inodes: newQueue(log)}
}

// start begins to deliver to s; close ends it.
func (n *notifier) start(s *fuse.Server) {
	n.mu.Lock()
	n.server = s
	n.mu.Unlock()
	n.running.Go(func() { n.names.run(s) })
	n.running.Go(func() { n.inodes.run(s) })
}

// close ends the delivery, and waits for what is being delivered.
func (n *notifier) close() {
	n.names.close()
	n.inodes.close()
	n.running.Wait()
}

// inode has the kernel drop what it caches of an inode.
func (n *notifier) inode(node uint64) { n.inodes.add(notice{first: node, last: node}) }

// files has the kernel drop what it caches of a range of inodes.
func (n *notifier) files(r images.Range) {
	n.inodes.add(notice{first: uint64(r.First), last: uint64(r.Last)})
}

// entry has the kernel forget a name in a directory, and all below it.
func (n *notifier) entry(dir uint64, name string) { n.names.add(notice{first: dir, name: name}) }

// listing drops what the kernel caches of a directory of the namespace, before
// the request that is being answered is. It takes none of the directory's locks.
func (n *notifier) listing(node uint64) {
	n.mu.Lock()
	s := n.server
	n.mu.Unlock()
	if s != nil {
		s.InodeNotify(node, 0, 0)
	}
}

// maxNotices bounds a queue. Beyond it notices are lost, and said to be.
const maxNotices = 1 << 16

// queue is notices that are delivered one after the other.
type queue struct {
	log *slog.Logger

	mu      sync.Mutex
	wake    *sync.Cond
	list    []notice
	pending map[notice]bool // what is in list
	closed  bool
}

func newQueue(log *slog.Logger) *queue {
	q := &queue{log: log, pending: map[notice]bool{}}
	q.wake = sync.NewCond(&q.mu)
	return q
}

func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.wake.Broadcast()
}

func (q *queue) add(x notice) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.pending[x] {
		return
	}
	if len(q.list) >= maxNotices {
		q.log.Error("too many notifications for the kernel, one is lost", "node", x.first, "name", x.name)
		return
	}
	q.pending[x] = true
	q.list = append(q.list, x)
	q.wake.Signal()
}

// next waits for a notice; ok is false when the queue is closed.
func (q *queue) next() (x notice, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.list) == 0 && !q.closed {
		q.wake.Wait()
	}
	if q.closed {
		return notice{}, false
	}
	x = q.list[0]
	q.list = q.list[1:]
	delete(q.pending, x)
	return x, true
}

func (q *queue) run(s *fuse.Server) {
	for {
		x, ok := q.next()
		if !ok {
			return
		}
		if x.name != "" {
			q.check(x, s.EntryNotify(x.first, x.name))
			continue
		}
		for node := x.first; node <= x.last; node++ {
			st := s.InodeNotify(node, 0, 0)
			if st == fuse.Status(syscall.EBADF) || st == fuse.ENODEV {
				return // unmounted
			}
			q.check(x, st)
		}
	}
}

// check logs what the kernel has against a notification; that it does not know
// the inode or the name is nothing.
func (q *queue) check(x notice, st fuse.Status) {
	if !st.Ok() && st != fuse.ENOENT && st != fuse.Status(syscall.ENOTDIR) && st != fuse.Status(syscall.ENOTEMPTY) {
		q.log.Warn("the kernel refused a notification", "node", x.first, "name", x.name, "err", st.String())
	}
}
