package fs

import (
	"log/slog"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// notifier tells the kernel what of its caches is no longer true. It does so
// beside the requests: a notification takes locks that the kernel may hold while
// it waits for the answer to one.
type notifier struct {
	log *slog.Logger

	mu      sync.Mutex
	wake    *sync.Cond
	server  *fuse.Server
	queue   []notice
	pending map[notice]bool // what is in queue
	closed  bool
}

// notice is an inode whose pages and attributes are to be dropped, or, with a
// name, an entry of a directory.
type notice struct {
	node uint64
	name string
}

// maxNotices bounds the queue. Beyond it notices are lost, and said to be.
const maxNotices = 1 << 16

func newNotifier(log *slog.Logger) *notifier {
	n := &notifier{log: log, pending: map[notice]bool{}}
	n.wake = sync.NewCond(&n.mu)
	return n
}

// start begins to deliver to s; close ends it.
func (n *notifier) start(s *fuse.Server) {
	n.mu.Lock()
	n.server = s
	n.mu.Unlock()
	go n.run(s)
}

func (n *notifier) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	n.wake.Broadcast()
}

func (n *notifier) run(s *fuse.Server) {
	for {
		n.mu.Lock()
		for len(n.queue) == 0 && !n.closed {
			n.wake.Wait()
		}
		if n.closed {
			n.mu.Unlock()
			return
		}
		next := n.queue[0]
		n.queue = n.queue[1:]
		delete(n.pending, next)
		n.mu.Unlock()
		var st fuse.Status
		if next.name != "" {
			st = s.EntryNotify(next.node, next.name)
		} else {
			st = s.InodeNotify(next.node, 0, 0)
		}
		if !st.Ok() && st != fuse.ENOENT && st != fuse.Status(syscall.ENOTDIR) && st != fuse.Status(syscall.ENOTEMPTY) {
			n.log.Warn("the kernel refused a notification", "node", next.node, "name", next.name, "err", st.String())
		}
	}
}

func (n *notifier) add(x notice) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.pending[x] {
		return
	}
	if len(n.queue) >= maxNotices {
		n.log.Error("too many notifications for the kernel, one is lost", "node", x.node, "name", x.name)
		return
	}
	n.pending[x] = true
	n.queue = append(n.queue, x)
	n.wake.Signal()
}

// inode has the kernel drop what it caches of an inode.
func (n *notifier) inode(node uint64) { n.add(notice{node: node}) }

// entry has the kernel forget a name in a directory, and all below it.
func (n *notifier) entry(dir uint64, name string) { n.add(notice{dir, name}) }

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
