package fs

import (
	"time"

	"golang.org/x/sys/unix"
)

// writeBackEvery bounds how long a change that root made to a file's pages
// through a shared mapping can be seen by others. Nothing tells the server of
// such a mapping, and left alone the kernel writes it back after 30 s; when it
// does, the WRITE is refused and the pages are dropped (fileSystem.Write).
const writeBackEvery = time.Second

// writeBack has the kernel write back what is dirty on the mount at dir, whose
// st_dev is dev, until done is closed, and calls tick each time. It sends no message
// while nothing is dirty. The mount is open only for the moment, so that it can be
// unmounted.
func writeBack(dir string, dev uint64, done <-chan struct{}, tick func()) {
	t := time.NewTicker(writeBackEvery)
	defer t.Stop()
	for {
		select {
		case <-done:
			return
		case <-t.C:
		}
		tick()
		fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && st.Dev == dev { // not what was mounted over it, or is below it
			unix.Syncfs(fd) // its error is that of the refused write
		}
		unix.Close(fd)
	}
}
