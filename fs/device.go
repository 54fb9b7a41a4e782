package fs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Device is the kernel's end of a mount. While anybody has it open the mount
// lives, and requests wait; a server that takes it over goes on where the one
// before stopped.
type Device struct {
	File  *os.File // /dev/fuse, blocking
	Init  []byte   // the kernel's INIT: it comes once, and every server must see it
	Dev   uint64   // st_dev of the mount
	Dir   string   // where it is mounted, without symbolic links
	Again bool     // a server has answered on it before
}

// initSize is room for an INIT and for its answer. The kernel hands nothing to
// reads of less than 8192 bytes (FUSE_MIN_READ_BUFFER).
const initSize = 8192

// OpenDevice mounts at dir, as o says, without answering yet: whoever looks into
// the mount waits.
func OpenDevice(dir string, o Options) (*Device, error) {
	if o.FsName == "" {
		o.FsName = "imgfs"
	}
	real, err := filepath.EvalSymlinks(dir) // which nobody can ask for before there is a server
	if err != nil {
		return nil, fmt.Errorf("fs: mounting: %w", err)
	}
	mount := mountDirect
	if os.Geteuid() != 0 {
		mount = mountByHelper
	}
	fd, err := mount(dir, o)
	if err != nil {
		return nil, fmt.Errorf("fs: mounting %q: %w", dir, err)
	}
	d := &Device{File: os.NewFile(uintptr(fd), "/dev/fuse"), Dir: real}
	buf := make([]byte, initSize)
	n, err := readFD(fd, buf)
	if err == nil {
		d.Dev, err = deviceOf(dir)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("fs: mounting %q: %w", dir, err), Unmount(dir, unix.MNT_DETACH), d.Close())
	}
	d.Init = buf[:n]
	return d, nil
}

// Close gives the device up. The last one to close it ends the mount's
// connection: who uses the mount gets ENOTCONN.
func (d *Device) Close() error { return d.File.Close() }

// fd is the descriptor, as long as the device is open.
func (d *Device) fd() int { return int(d.File.Fd()) }

// Gone reports whether the mount is no more, or its connection was ended.
func (d *Device) Gone() bool {
	p := []unix.PollFd{{Fd: int32(d.fd())}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&unix.POLLERR != 0
}

// Mounted reports whether the mount is at dir.
func (d *Device) Mounted(dir string) bool {
	dev, err := deviceOf(dir)
	return err == nil && dev == d.Dev
}

// mountDirect mounts as root does: flags that mount(2) knows, and options for the
// kernel's fuse, which refuses any that it does not know.
func mountDirect(dir string, o Options) (fd int, err error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return -1, err
	}
	if fd, err = unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return -1, err
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if o.Dev {
		flags &^= unix.MS_NODEV
	}
	if o.Suid {
		flags &^= unix.MS_NOSUID
	}
	data := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,max_read=%d",
		fd, st.Mode&unix.S_IFMT, os.Geteuid(), os.Getegid(), maxRequest)
	if o.AllowOther {
		data += ",allow_other,default_permissions"
	}
	if err := unix.Mount(o.FsName, dir, "fuse.imgfs", flags, data); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// mountByHelper mounts as users do, by fusermount3, which passes /dev/fuse back
// through a socket.
func mountByHelper(dir string, o Options) (fd int, err error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(ends[0])
	theirs := os.NewFile(uintptr(ends[1]), "socket")
	escape := strings.NewReplacer(`\`, `\\`, `,`, `\,`)
	options := []string{"subtype=imgfs", "fsname=" + escape.Replace(o.FsName), fmt.Sprintf("max_read=%d", maxRequest)}
	if o.AllowOther {
		options = append(options, "allow_other", "default_permissions")
	}
	if o.Dev {
		options = append(options, "dev")
	}
	if o.Suid {
		options = append(options, "suid")
	}
	helper := exec.Command("fusermount3", "-o", strings.Join(options, ","), "--", dir)
	helper.Env = []string{"_FUSE_COMMFD=3"}
	helper.ExtraFiles = []*os.File{theirs}
	out, err := helper.CombinedOutput()
	theirs.Close()
	if err != nil {
		return -1, helperError(out, err)
	}
	return receiveFD(ends[0])
}

func helperError(out []byte, err error) error {
	if text := strings.TrimSpace(string(out)); text != "" {
		return errors.New(text)
	}
	return fmt.Errorf("fusermount3: %w", err)
}

// receiveFD takes a descriptor out of a socket.
func receiveFD(socket int) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err == nil && len(messages) == 1 {
		var fds []int
		if fds, err = unix.ParseUnixRights(&messages[0]); err == nil && len(fds) == 1 {
			return fds[0], nil
		}
	}
	return -1, errors.Join(errors.New("fusermount3 has passed no /dev/fuse"), err)
}

// readFD reads once, however often a signal comes between.
func readFD(fd int, p []byte) (int, error) {
	for {
		n, err := unix.Read(fd, p)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// deviceOf is the st_dev of what is mounted at dir. It asks no server: there may
// be none, or it may be the caller.
func deviceOf(dir string) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, 0, &st); err != nil {
		return 0, err
	}
	return unix.Mkdev(st.Dev_major, st.Dev_minor), nil
}

// attach makes a server for f that answers on the device, once it serves. go-fuse
// wants to see INIT, which came long ago for all servers but the first: so it
// first talks to a socket that has it, of which its descriptor then becomes the
// device's.
func (d *Device) attach(f *fileSystem, mo *fuse.MountOptions) (*fuse.Server, error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(ends[0])
	if _, err := unix.Write(ends[0], d.Init); err != nil {
		unix.Close(ends[1])
		return nil, err
	}
	srv, err := fuse.NewServer(f, fmt.Sprintf("/dev/fd/%d", ends[1]), mo)
	if err != nil {
		return nil, err
	}
	answer := make([]byte, initSize)
	n, err := readFD(ends[0], answer)
	if err != nil {
		return nil, err
	}
	// The kernel has gone by the first answer since it got it.
	if _, err := unix.Write(d.fd(), answer[:n]); err != nil && !d.Again {
		return nil, err
	}
	if err := unix.Dup3(d.fd(), ends[1], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	if d.Again {
		d.resend()
	}
	return srv, d.Close() // the server has its own descriptor of it
}

// resend has the kernel ask again what a server took that has died since. A kernel
// that cannot (before 6.9) leaves the callers of those requests waiting; all
// others go on.
func (d *Device) resend() {
	const notifyResend = 7 // FUSE_NOTIFY_RESEND, the "error" of a header without a request
	_, _ = unix.Write(d.fd(), outHeader(notifyResend, 0))
}

// Unmount takes the mount at dir away, by the system call with flags or, for a user,
// by fusermount3. The error is unix.EBUSY while a process uses it.
func Unmount(dir string, flags int) error {
	err := unix.Unmount(dir, flags|unix.UMOUNT_NOFOLLOW)
	for range 4 { // the server itself opens the mount for a moment now and then
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(25 * time.Millisecond)
		err = unix.Unmount(dir, flags|unix.UMOUNT_NOFOLLOW)
	}
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	args := []string{"-u", "--", dir}
	if flags&unix.MNT_DETACH != 0 {
		args = slices.Insert(args, 1, "-z")
	}
	out, err := exec.Command("fusermount3", args...).CombinedOutput()
	if err == nil {
		return nil
	}
	if strings.Contains(strings.ToLower(string(out)), "busy") {
		return unix.EBUSY
	}
	return helperError(out, err)
}
