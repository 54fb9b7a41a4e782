package fs

import (
	"log/slog"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgfs/imgfs/images"
)

// notifier tells the kernel what of its caches is no longer true. It does so
// beside the requests: a notification takes locks that the kernel may hold while
// it waits for the answer to one. A name's takes the lock of its directory, which
// whoever makes or looks up a name there holds, during a pull perhaps. So names
// are told of directory by directory, and nobody waits for longer than maxTell.
type notifier struct {
	names   *nameQueue
	inodes  *queue
	running sync.WaitGroup

	mu     sync.Mutex
	server *fuse.Server
}

// notice is a range of inodes whose pages and attributes are to be dropped.
type notice struct {
	first, last uint64
	told        chan<- struct{} // has room for what is sent when it was delivered; may be nil
}

func newNotifier(log *slog.Logger) *notifier {
	return &notifier{names: newNameQueue(log), inodes: newQueue(log)}
}

// start begins to deliver to s; close ends it.
func (n *notifier) start(s *fuse.Server) {
	n.mu.Lock()
	n.server = s
	n.mu.Unlock()
	n.names.start(s)
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
// told, if not nil, is sent something when it has.
func (n *notifier) files(r images.Range, told chan<- struct{}) {
	n.inodes.add(notice{first: uint64(r.First), last: uint64(r.Last), told: told})
}

// entry has the kernel forget a name in a directory, and all below it. It returns
// at once; the channel is closed when that has happened, or never will.
func (n *notifier) entry(dir uint64, name string) <-chan struct{} { return n.names.add(dir, name) }

// maxTell is how long a request waits for what it changed to be told. A touch of
// an image holds the lock of the image's root, and tells its directory; whoever
// renames or removes the image meanwhile holds the directory's and waits for the
// root's. So this is also how long the two hold each other up.
const maxTell = 250 * time.Millisecond

// wait waits for what entry returned, together no longer than maxTell. The caller
// may be in a system call that holds locks, though not those of the directories;
// somebody who holds one may wait for one of these, and goes on when the time is
// over.
func (n *notifier) wait(list []<-chan struct{}) {
	if len(list) == 0 {
		return
	}
	t := time.NewTimer(maxTell)
	defer t.Stop()
	for _, done := range list {
		select {
		case <-done:
		case <-t.C:
			return
		}
	}
}

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
		q.log.Error("too many notifications for the kernel, one is lost", "node", x.first)
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
		for node := x.first; node <= x.last; node++ {
			st := s.InodeNotify(node, 0, 0)
			if st == fuse.Status(syscall.EBADF) || st == fuse.ENODEV {
				return // unmounted
			}
			check(q.log, st, node, "")
		}
		if x.told != nil {
			select {
			case x.told <- struct{}{}:
			default:
			}
		}
	}
}

// check logs what the kernel has against a notification; that it does not know
// the inode or the name is nothing.
func check(log *slog.Logger, st fuse.Status, node uint64, name string) {
	if !st.Ok() && st != fuse.ENOENT && st != fuse.Status(syscall.ENOTDIR) && st != fuse.Status(syscall.ENOTEMPTY) {
		log.Warn("the kernel refused a notification", "node", node, "name", name, "err", st.String())
	}
}
