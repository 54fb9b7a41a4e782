package fs

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// call is a system call that makes or removes a name.
type call int

const (
	callNone call = iota // a step of a walk, as far as can be told
	callMkdir
	callSymlink
	callRename
	callRmdir
	callUnlink
)

// changer is such a system call, and the positions of the paths of directories or
// links that it makes, or moves, among its arguments.
type changer struct {
	call  call
	paths []int
}

// changers are the system calls whose lookup of a name must not pull, so that the
// call itself reaches us, and that what is not here is not brought to be removed.
// Numbers are those of the kernel's system call tables: mkdir, mkdirat, symlink,
// symlinkat, rename, renameat, renameat2, rmdir, unlink, unlinkat (which is rmdir
// too).
var changers = map[string]map[int]changer{
	"amd64": {
		83: {callMkdir, []int{0}}, 258: {callMkdir, []int{1}},
		88: {callSymlink, []int{1}}, 266: {callSymlink, []int{2}},
		82: {callRename, []int{0, 1}}, 264: {callRename, []int{1, 3}}, 316: {callRename, []int{1, 3}},
		84: {callRmdir, nil}, 87: {callUnlink, nil}, 263: {callUnlink, nil},
	},
	"arm64": {
		34: {callMkdir, []int{1}}, 36: {callSymlink, []int{2}},
		38: {callRename, []int{1, 3}}, 276: {callRename, []int{1, 3}}, 35: {callUnlink, nil},
	},
}

// unlinkat's number by architecture, and the flag by which it is rmdir.
var unlinkat = map[string]int{"amd64": 263, "arm64": 35}

const atRemovedir = 0x200

// change is what a thread that waits for a lookup is about to do to a name. The
// zero value is nothing: the lookup is a step of a walk.
type change struct {
	call  call
	paths []string // of what it makes or moves, as the caller wrote them; "" for one that cannot be read
}

// changeOf tells what the thread is about to change. It is nothing where that
// cannot be told: another PID namespace, no right to trace the thread, an unknown
// architecture.
func changeOf(tid uint32) change {
	table := changers[runtime.GOARCH]
	if table == nil || tid == 0 {
		return change{}
	}
	fields := callOf(tid)
	if len(fields) == 0 {
		return change{}
	}
	nr, err := strconv.Atoi(fields[0])
	how, ok := table[nr]
	if err != nil || !ok {
		return change{}
	}
	arg := func(i int) (uint64, bool) {
		if len(fields) <= i+1 {
			return 0, false
		}
		v, err := strconv.ParseUint(fields[i+1], 0, 64)
		return v, err == nil
	}
	c := change{call: how.call}
	if flags, ok := arg(2); nr == unlinkat[runtime.GOARCH] && ok && flags&atRemovedir != 0 {
		c.call = callRmdir
	}
	for _, i := range how.paths {
		path := ""
		if addr, ok := arg(i); ok && addr < 1<<63 {
			path = callerString(tid, int64(addr))
		}
		c.paths = append(c.paths, path)
	}
	return c
}

// settle bounds how long a thread is given to go to sleep: it has sent its request
// and waits for us next, but on a busy machine it may not have a processor for that.
const settle = time.Second

// callOf is what the kernel says of a thread's system call, "258 0xffffff9c
// 0x7ffd…" (proc(5)); nil when it does not.
func callOf(tid uint32) []string {
	for start, pause := time.Now(), 20*time.Microsecond; ; pause = min(2*pause, 5*time.Millisecond) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", tid))
		if err != nil {
			return nil
		}
		fields := strings.Fields(string(data))
		if len(fields) != 1 || fields[0] != "running" || time.Since(start) > settle {
			return fields
		}
		time.Sleep(pause)
	}
}

// peeks bounds the threads that read callers' memory: a caller can have it where
// the kernel waits for somebody, itself perhaps, to bring it.
var peeks = make(chan struct{}, 64)

// callerString reads a path from the memory of a thread; "" when it cannot.
func callerString(tid uint32, addr int64) string {
	select {
	case peeks <- struct{}{}:
		defer func() { <-peeks }()
	default:
		return ""
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", tid))
	if err != nil {
		return ""
	}
	defer f.Close()
	const page, pathMax = 4096, 4096
	var buf []byte
	for len(buf) < pathMax { // to the end of a page at a time: what follows may not be mapped
		part := make([]byte, page-(addr+int64(len(buf)))%page)
		n, err := f.ReadAt(part, addr+int64(len(buf)))
		if i := bytes.IndexByte(part[:n], 0); i >= 0 {
			return string(append(buf, part[:i]...))
		}
		if err != nil {
			return ""
		}
		buf = append(buf, part[:n]...)
	}
	return ""
}

// passes reports whether path, below the mount, is a step on the way to what the
// caller makes or moves, not one of these itself. The caller's paths are relative
// to a directory that is not known here, so the ends are what can be compared.
func (c change) passes(path string) bool {
	have := strings.Split(path, "/")
	for _, p := range c.paths {
		if p[strings.LastIndexByte(p, '/')+1:] == ".." || !differs(have, p) {
			return false
		}
	}
	return len(c.paths) > 0
}

// differs reports whether the last components of have are not those of path, as
// far as these can be told without walking: from its last ".." on.
func differs(have []string, path string) bool {
	var want []string
	for _, part := range strings.Split(path, "/") {
		switch part {
		case "", ".":
		case "..":
			want = want[:0]
		default:
			want = append(want, part)
		}
	}
	for i := 1; i <= min(len(want), len(have)); i++ {
		if want[len(want)-i] != have[len(have)-i] {
			return true
		}
	}
	return false
}
