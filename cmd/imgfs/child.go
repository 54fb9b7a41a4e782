package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// child is a server process.
type child struct {
	cmd     *exec.Cmd
	verdict chan said // closed when it will never answer
	ended   chan error
	locks   []int // of the cache, which it has
}

// said is a server's verdict, and the descriptors that came with it.
type said struct {
	verdict
	locks []int
}

// free takes the cache's locks off a server that has ended, even if it has not
// quite.
func (p *child) free() {
	for _, fd := range p.locks {
		_ = unix.Flock(fd, unix.LOCK_UN)
		unix.Close(fd)
	}
	p.locks = nil
}

// dying reports whether the server was killed, or is a zombie of which threads are
// left. One of these may wait in the kernel, beyond the reach of a kill, for a lock
// that somebody holds who waits for an answer: another server must give it.
func (p *child) dying() bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "State":
			if strings.HasPrefix(value, "Z") {
				return true
			}
		case "SigPnd":
			pending, err := strconv.ParseUint(value, 16, 64)
			return err == nil && pending&(1<<(unix.SIGKILL-1)) != 0
		}
	}
	return false
}

// writing are the system calls that change the cache. The next server must not read
// it before they have ended.
var writing = []int{unix.SYS_PWRITE64, unix.SYS_PWRITEV, unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_FALLOCATE, unix.SYS_FTRUNCATE,
	unix.SYS_COPY_FILE_RANGE, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_UNLINKAT, unix.SYS_LINKAT}

// stuck reports whether what is left of a dying server does nothing to the cache any
// more: it waits for something else.
func (p *child) stuck() bool {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", p.cmd.Process.Pid))
	if err != nil {
		return false
	}
	left := 0
	for _, task := range tasks {
		stat, err := os.ReadFile(filepath.Join(task, "stat"))
		// pid (name) state …
		at := bytes.LastIndex(stat, []byte(") "))
		if err != nil || at < 0 || len(stat) < at+3 || stat[at+2] == 'Z' || stat[at+2] == 'X' {
			continue // it has ended
		}
		// number arguments …; "running"; -1 outside of a system call
		call, err := os.ReadFile(filepath.Join(task, "syscall"))
		if err != nil {
			return false
		}
		word, _, _ := strings.Cut(strings.TrimSpace(string(call)), " ")
		n, err := strconv.Atoi(word)
		if err != nil || slices.Contains(writing, n) {
			return false
		}
		left++
	}
	return left > 0
}

// errDying is how a server ended that has not quite.
var errDying = errors.New("killed, and a thread of it waits in the kernel")
