// Package fs shows the images of a store to the kernel, as a FUSE file system.
//
// Its nouns: a nodeid is an images.Ino and needs no table; namespace nodes are
// the registries, namespaces, repositories and tags above the images; control
// files (.imgfs/…) are rendered when they are looked up. There are no open
// files: OPEN and OPENDIR are answered ENOSYS where the kernel allows it, and
// carry no handle where it does not, so that the kernel keeps its caches across
// opens and another server can take over.
//
// Everything below an image is cached by the kernel for a day; what changes in
// the namespace is announced. Errors become errnos in errno.go and nowhere else.
package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/images"
)

// The values of Options.Pull.
const (
	PullMissing = "missing" // walking to an image that is not here pulls it
	PullNever   = "never"   // only mkdir pulls
)

// The values of Options.Du.
const (
	DuExpanded = "expanded" // a file's size
	DuCached   = "cached"   // what of it is on this disk
)

// Options configure a mount. The zero value pulls what is missing, for the
// mounting user alone, without devices and set-user-ID programs.
type Options struct {
	Pull         string // PullMissing (also "") or PullNever
	AllowOther   bool   // other users too, under the kernel's permission checks
	PullByOthers bool   // with AllowOther: walks of other users ask registries too, with the mounting user's credentials
	ExactModes   bool   // with AllowOther: regular files keep their write bits
	Dev, Suid    bool   // honour devices, set-user-ID and set-group-ID bits
	Du           string // what st_blocks counts: DuExpanded (also "") or DuCached
	FsName       string // first column of df; "": "imgfs"
	Log          *slog.Logger

	Socket  string                // what .imgfs/socket leads to; "": there is none
	Metrics func(io.Writer) error // writes .imgfs/metrics, in Prometheus' text format; nil: there is none

	Device     *Device // of a mount that is there; nil: Mount makes one
	Restarts   int     // servers of this mount before this one
	LastEnd    string  // how the last of them ended
	Supervisor int     // the process that starts another server when this one ends; 0: none

	handles bool // as if the kernel insisted on OPEN and OPENDIR: for tests
}

// Server is a mounted file system.
type Server struct {
	fuse *fuse.Server
	fs   *fileSystem
	dir  string
	dev  uint64         // st_dev of the mount
	done chan struct{}  // closed when the kernel asks nothing any more
	back sync.WaitGroup // writeBack
}

// maxRequest is the most bytes that one READ carries. Read-ahead of the mount is
// the same.
const maxRequest = 1 << 20

// Mount mounts store at dir, which must be a directory. When it returns the
// mount answers. The store stays the caller's, to close after Serve has
// returned.
func Mount(dir string, store *images.Store, o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.FsName == "" {
		o.FsName = "imgfs"
	}
	switch o.Pull {
	case "":
		o.Pull = PullMissing
	case PullMissing, PullNever:
	default:
		return nil, fmt.Errorf("fs: pull policy %q: want %q or %q", o.Pull, PullMissing, PullNever)
	}
	switch o.Du {
	case "":
		o.Du = DuExpanded
	case DuExpanded, DuCached:
	default:
		return nil, fmt.Errorf("fs: du %q: want %q or %q", o.Du, DuExpanded, DuCached)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	d := o.Device
	if d == nil {
		if d, err = OpenDevice(dir, o); err != nil {
			return nil, err
		}
	}
	f := newFileSystem(store, o)
	f.dirs = []string{dir}
	if d.Dir != dir {
		f.dirs = append(f.dirs, d.Dir)
	}
	if o.Restarts > 0 {
		f.events.restarted(o.LastEnd)
	}
	srv, err := d.attach(f, &fuse.MountOptions{
		MaxWrite:             maxRequest,
		MaxReadAhead:         maxRequest,
		MaxBackground:        128,
		EnableSymlinkCaching: true,
		DisableSplice:        true, // gains nothing, and a READ of the largest size does not fit into a pipe
		Logger:               slog.NewLogLogger(o.Log.Handler(), slog.LevelWarn),
	})
	if err != nil {
		err = fmt.Errorf("fs: mounting %q: %w", dir, err)
		if o.Device == nil {
			err = errors.Join(err, Unmount(dir, unix.MNT_DETACH), d.Close())
		}
		return nil, err
	}
	s := &Server{fuse: srv, fs: f, dir: dir, dev: d.Dev, done: make(chan struct{})}
	store.Watch(f.event)
	go func() {
		defer close(s.done)
		srv.Serve()
		f.notify.close()
	}()
	if !d.Again {
		noPoll(dir)
		readAhead(dir, o.Log)
	}
	r := &rest{free: giveBack}
	s.back.Go(func() { writeBack(dir, d.Dev, s.done, func() { r.tick(f.work()) }) })
	return s, nil
}

// Serve blocks until the file system is unmounted.
func (s *Server) Serve() error {
	<-s.done
	s.back.Wait()
	return nil
}

// errNotThere reports that the mount is not at its path any more: it was detached.
var errNotThere = errors.New("it is not mounted there any more")

// Unmount unmounts the file system. It fails while a process uses it.
func (s *Server) Unmount() error {
	if dev, err := deviceOf(s.dir); err != nil || dev != s.dev {
		return errors.Join(errNotThere, err)
	}
	if err := Unmount(s.dir, 0); err != nil {
		return err
	}
	s.fuse.Wait()
	return nil
}

// noPoll has the kernel learn that there is no POLL here. Else it asks when a Go
// program opens a file, in a way in which this one might not be able to answer.
func noPoll(dir string) {
	// A name that go-fuse itself answers for.
	fd, err := unix.Open(filepath.Join(dir, ".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLPRI | unix.POLLOUT}}, 0)
	unix.Close(fd)
}

// readAhead raises the mount's read-ahead from the kernel's 128 KiB to what one
// READ carries. Only root may; without it everything works, slower.
func readAhead(dir string, log *slog.Logger) {
	var st unix.Stat_t
	err := unix.Stat(dir, &st)
	path := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	if err == nil {
		err = os.WriteFile(path, fmt.Appendf(nil, "%d", maxRequest>>10), 0o644)
	}
	if err != nil {
		log.Debug("read-ahead stays the kernel's", "err", err)
	}
}

// day is how long the kernel may keep what does not change.
const day = 24 * time.Hour

// fileSystem answers the kernel.
type fileSystem struct {
	fuse.RawFileSystem // ENOSYS for everything that is not here
	store              *images.Store
	o                  Options
	log                *slog.Logger
	uid, gid           uint32
	started            time.Time
	dirs               []string // the mount point, as it may be written in an absolute path

	handles bool // the kernel insists on OPEN or OPENDIR
	notify  *notifier
	counts  counts
	errors  *errorLog
	events  *eventLog
	snaps   snapshots
	control *control
	space   *namespace
}

func newFileSystem(store *images.Store, o Options) *fileSystem {
	f := &fileSystem{RawFileSystem: fuse.NewDefaultRawFileSystem(), store: store, o: o, log: o.Log,
		uid: uint32(os.Geteuid()), gid: uint32(os.Getegid()), started: time.Now()}
	f.errors, f.events = &errorLog{}, &eventLog{}
	f.notify = newNotifier(o.Log)
	f.control = newControl(f)
	f.space = &namespace{f: f, made: map[string]bool{}, changed: map[string]time.Time{}}
	return f
}

// background is the context of all requests. The kernel's interrupts end
// nothing: the Go runtime's own signals raise them. What can wait is bounded by
// the store's timeout.
func background() context.Context { return context.Background() }

// String names the file system.
func (f *fileSystem) String() string { return "imgfs" }

// SetDebug does nothing: logging is the logger's.
func (f *fileSystem) SetDebug(bool) {}

// Init is called with the kernel's INIT.
func (f *fileSystem) Init(s *fuse.Server) {
	k := s.KernelSettings()
	const need = fuse.CAP_NO_OPEN_SUPPORT | fuse.CAP_NO_OPENDIR_SUPPORT
	f.handles = f.o.handles || k.Flags64()&need != need
	f.notify.start(s)
}

// event passes on what the store tells.
func (f *fileSystem) event(e images.Event) {
	if e.Err != nil {
		what, op := e.Name.String(), "read"
		if e.Name == (images.Name{}) {
			what, op = "catalogue", "open"
		}
		f.errors.add(what, op, errnoOf(e.Err), e.Err)
		f.events.fail(what, e.Err)
		f.log.Error(op+" failed", "object", what, "err", e.Err)
	}
	if e.Drop && !f.control.drop(e.Name) {
		f.space.dropImage(e.Name)
	}
	if e.Files.Last != 0 {
		f.notify.files(e.Files, e.Told)
	}
}
