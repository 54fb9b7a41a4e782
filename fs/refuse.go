package fs

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Layout of the protocol's headers, in the machine's byte order (fuse.h):
//
//	in:  len 4 | opcode 4 | unique 8 | nodeid 8 | …
//	out: len 4 | error 4  | unique 8
const (
	inHeaderSize  = 40
	outHeaderSize = 16
)

// Operations that are not answered.
const (
	codeForget      = 2
	codeInit        = 26
	codeInterrupt   = 36
	codeNotifyReply = 41
	codeBatchForget = 42
)

func outHeader(code int32, unique uint64) []byte {
	h := make([]byte, 0, outHeaderSize)
	h = binary.NativeEndian.AppendUint32(h, outHeaderSize)
	h = binary.NativeEndian.AppendUint32(h, uint32(code))
	return binary.NativeEndian.AppendUint64(h, unique)
}

// refusePoll is how often Refuse looks whether it is to stop, in milliseconds.
const refusePoll = 50

// Refuse answers every request with EIO, also those that a dead server took with
// it, until stop is closed: an error is better than to wait for a server that
// does not come. When it returns it has answered all that it has read. The error
// is unix.ENODEV when the mount is gone.
func (d *Device) Refuse(stop <-chan struct{}) error {
	// The next server reads from the same open file, and must wait in it; until it
	// is there nobody else does.
	fd := d.fd()
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	defer func() { _ = unix.SetNonblock(fd, false) }()
	d.resend()
	// The kernel refuses reads without room for the largest WRITE. Only the pages
	// that are written to become memory.
	buf := make([]byte, maxRequest+initSize)
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, refusePoll); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if p[0].Revents&unix.POLLERR != 0 {
			return unix.ENODEV
		}
		if p[0].Revents&unix.POLLIN == 0 {
			continue
		}
		n, err := readFD(fd, buf)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOENT): // who asked has gone
			continue
		case err != nil:
			return err
		case n < inHeaderSize:
			return fmt.Errorf("fs: a request of %d bytes", n)
		}
		switch binary.NativeEndian.Uint32(buf[4:]) {
		case codeForget, codeBatchForget, codeInterrupt, codeNotifyReply, codeInit:
			continue
		}
		// ENOENT: who asked has gone meanwhile.
		_, err = unix.Write(fd, outHeader(-int32(unix.EIO), binary.NativeEndian.Uint64(buf[8:])))
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
}
