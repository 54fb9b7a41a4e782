package fs

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strconv"
)

// changers are the system calls that make or remove a name: their lookup of it
// must not pull, so that the call itself reaches us, and that what is not here is
// not brought to be removed. Numbers are those of the kernel's system call
// tables: mkdir, mkdirat, symlink, symlinkat, rename, renameat, renameat2, rmdir,
// unlink, unlinkat.
var changers = map[string]map[int]bool{
	"amd64": {83: true, 258: true, 88: true, 266: true, 82: true, 264: true, 316: true, 84: true, 87: true, 263: true},
	"arm64": {34: true, 36: true, 38: true, 276: true, 35: true},
}

// changesName reports whether the thread that waits for a lookup is in a system
// call that makes or removes a name. It is false where that cannot be told:
// another PID namespace, no right to trace the thread, an unknown architecture.
func changesName(tid uint32) bool {
	table := changers[runtime.GOARCH]
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
