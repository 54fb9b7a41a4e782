package fs

import (
	"runtime"
	"runtime/debug"
)

// rest gives memory back when there has been no work from one tick to the next. What
// passes through (chunks, tables of contents, the answers to reads) may be many times
// what is kept, and the Go runtime keeps twice of what it needed last.
type rest struct {
	work   int64 // at the last tick
	worked bool  // since memory was given back
	free   func()
}

// giveBack collects twice, because what is in a sync.Pool, a buffer for each READ that
// there was at once, survives the first time.
func giveBack() {
	runtime.GC()
	debug.FreeOSMemory()
}

// tick is told how much work there was in all.
func (r *rest) tick(work int64) {
	switch {
	case work != r.work:
		r.work, r.worked = work, true
	case r.worked:
		r.worked = false
		r.free()
	}
}

// work counts what was done: messages of the kernel, and what came from registries.
func (f *fileSystem) work() (n int64) {
	for i := range f.counts {
		n += f.counts[i].Load()
	}
	for _, h := range f.store.Traffic().Hosts {
		n += h.Requests + h.Bytes
	}
	return n
}
