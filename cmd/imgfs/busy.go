package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// user is a process that keeps a mount busy.
type user struct {
	pid  int
	name string
	how  []string // "working directory", "open files", …, each once
}

func (u user) String() string {
	return fmt.Sprintf("%s (pid %d: %s)", u.name, u.pid, strings.Join(u.how, ", "))
}

// place is a mount as /proc knows it.
type place struct {
	id  uint64 // mount ID; 0 when only the device is known
	dev uint64
}

func placeOf(m *mountinfo.Info) place {
	return place{id: uint64(m.ID), dev: unix.Mkdev(uint32(m.Major), uint32(m.Minor))}
}

// has reports whether a link of /proc leads into the mount. The kernel answers
// from what it has: the server, which may hang, is not asked.
func (p place) has(link string) bool {
	var st unix.Statx_t
	const how = unix.AT_STATX_DONT_SYNC | unix.AT_NO_AUTOMOUNT
	if err := unix.Statx(unix.AT_FDCWD, link, how, unix.STATX_MNT_ID, &st); err != nil {
		return false
	}
	if st.Mask&unix.STATX_MNT_ID != 0 && p.id != 0 {
		return st.Mnt_id == p.id
	}
	return unix.Mkdev(st.Dev_major, st.Dev_minor) == p.dev
}

// maps reports whether a process has a file of the mount's device mapped. The
// lines of maps are: address perms offset major:minor inode path.
func (p place) maps(file string) bool {
	f, err := os.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	want := fmt.Sprintf("%02x:%02x", unix.Major(p.dev), unix.Minor(p.dev))
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) >= 5 && fields[3] == want && fields[4] != "0" {
			return true
		}
	}
	return false
}

// usersOf finds the processes that use the mount, as far as this user may look
// into them, in the order of their numbers. proc is where procfs is.
func usersOf(proc string, p place) []user {
	var users []user
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join(proc, e.Name())
		var how []string
		for _, link := range []struct{ name, says string }{
			{"cwd", "working directory"}, {"root", "root directory"}, {"exe", "program"},
		} {
			if p.has(filepath.Join(dir, link.name)) {
				how = append(how, link.says)
			}
		}
		if n := p.openFiles(filepath.Join(dir, "fd")); n == 1 {
			how = append(how, "1 open file")
		} else if n > 1 {
			how = append(how, fmt.Sprintf("%d open files", n))
		}
		if p.maps(filepath.Join(dir, "maps")) {
			how = append(how, "mapped file")
		}
		if len(how) > 0 {
			users = append(users, user{pid, processName(dir), how})
		}
	}
	slices.SortFunc(users, func(a, b user) int { return a.pid - b.pid })
	return users
}

func (p place) openFiles(dir string) int {
	n := 0
	fds, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	for _, fd := range fds {
		if p.has(filepath.Join(dir, fd.Name())) {
			n++
		}
	}
	return n
}

// processName is the name of the process in dir, with anything that could upset
// a terminal escaped: a process chooses its name.
func processName(dir string) string {
	text, err := os.ReadFile(filepath.Join(dir, "comm"))
	if err != nil {
		return "?"
	}
	quoted := strconv.Quote(strings.TrimSuffix(string(text), "\n"))
	return quoted[1 : len(quoted)-1]
}

// maxUsers is how many processes a message names.
const maxUsers = 10

// busyText says who uses the imgfs mount on dir.
func busyText(dir string) string {
	var reasons []string
	at, err := mountAt(dir)
	if err != nil || at == nil {
		return "in use"
	}
	users := usersOf("/proc", placeOf(at))
	for i, u := range users {
		if i == maxUsers {
			reasons = append(reasons, fmt.Sprintf("and %d more", len(users)-i))
			break
		}
		reasons = append(reasons, u.String())
	}
	inside, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err == nil {
		for _, m := range inside {
			if m.Mountpoint != dir {
				reasons = append(reasons, fmt.Sprintf("a mount on %q", m.Mountpoint))
			}
		}
	}
	if len(reasons) == 0 {
		return "in use by a process that cannot be seen from here (try as root)"
	}
	return "used by " + strings.Join(reasons, ", ")
}
