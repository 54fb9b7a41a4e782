package fs

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strconv"
)

// makers are the system calls that make a name: their lookup of it must not
// pull, so that the call itself reaches us. Numbers are those of the kernel's
// system call tables: mkdir, mkdirat, symlink, symlinkat, rename, renameat,
// renameat2.
var makers = map[string]map[int]bool{
	"amd64": {83: true, 258: true, 88: true, 266: true, 82: true, 264: true, 316: true},
	"arm64": {34: true, 36: true, 38: true, 276: true},
}

// makesName reports whether the thread that waits for a lookup is in a system
// call that makes a name. It is false where that cannot be told: another PID
// namespace, no right to trace the thread, an unknown architecture.
func makesName(tid uint32) bool {
	table := makers[runtime.GOARCH]
	if table == nil || tid == 0 {
		return false
	}
	// "258 0xffffff9c 0x7ffd…", or "running" (proc(5)).
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", tid))
	if err != nil {
		return false
	}
	first, _, _ := bytes.Cut(data, []byte(" "))
	nr, err := strconv.Atoi(string(first))
	return err == nil && table[nr]
}
