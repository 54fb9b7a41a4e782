package fs

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
)

// changers are the system calls that make or remove a name: their lookup of it
// must not pull, so that the call itself reaches us, and that what is not here is
// not brought to be removed. Numbers are those of the kernel's system call
// tables: mkdir, mkdirat, symlink, symlinkat, rename, renameat, renameat2, rmdir,
// unlink, unlinkat. The value is the position of mkdir's path among the
// arguments; -1 for calls whose path does not matter.
var changers = map[string]map[int]int{
	"amd64": {83: 0, 258: 1, 88: -1, 266: -1, 82: -1, 264: -1, 316: -1, 84: -1, 87: -1, 263: -1},
	"arm64": {34: 1, 36: -1, 38: -1, 276: -1, 35: -1},
}

// change is what a thread that waits for a lookup is about to do to a name. The
// zero value is nothing: the lookup is a step of a walk.
type change struct {
	any  bool
	path string // mkdir's, as the caller wrote it; "" when it is another call or cannot be read
}

// changeOf tells what the thread is about to change. It is nothing where that
// cannot be told: another PID namespace, no right to trace the thread, an unknown
// architecture.
func changeOf(tid uint32) change {
	table := changers[runtime.GOARCH]
	if table == nil || tid == 0 {
		return change{}
	}
	// "258 0xffffff9c 0x7ffd…", or "running" (proc(5)).
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", tid))
	if err != nil {
		return change{}
	}
	fields := strings.Fields(string(data))
	if len(fields) == 0 {
		return change{}
	}
	nr, err := strconv.Atoi(fields[0])
	arg, ok := table[nr]
	if err != nil || !ok {
		return change{}
	}
	c := change{any: true}
	if arg >= 0 && len(fields) > arg+1 {
		if addr, err := strconv.ParseUint(fields[arg+1], 0, 63); err == nil {
			c.path = callerString(tid, int64(addr))
		}
	}
	return c
}

// callerString reads a path from the memory of a thread; "" when it cannot.
func callerString(tid uint32, addr int64) string {
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

// passes reports whether path, below the mount, is a step on the way to the
// directory that the caller makes, not that directory itself.
func (c change) passes(path string) bool {
	var want []string
	for _, part := range strings.Split(c.path, "/") {
		switch part {
		case "", ".":
		case "..":
			return false // cannot be told without walking it
		default:
			want = append(want, part)
		}
	}
	have := strings.Split(path, "/")
	for i := 1; i <= min(len(want), len(have)); i++ {
		if want[len(want)-i] != have[len(have)-i] {
			return true
		}
	}
	return false
}
