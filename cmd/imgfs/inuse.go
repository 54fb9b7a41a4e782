package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// usage is what processes use of a mount.
type usage struct {
	at      place
	dir     string            // the mount point
	paths   map[string]string // image IDs by path below the mount
	ids     map[string]string // who uses an image, by its ID: "sleep (pid 12)"
	unknown []string          // who uses something of which the image cannot be told
}

// imagesInUse finds the images that processes use: as working or root directory,
// by open or mapped files, by mounts of their own (a container's overlay). It
// sees as far as this user may look into processes.
func imagesInUse(mount string, records []record) (*usage, error) {
	at, err := mountAt(mount)
	if err != nil || at == nil {
		return nil, err
	}
	u := &usage{at: placeOf(at), dir: mount, paths: map[string]string{}, ids: map[string]string{}}
	u.at.id = 0 // a bind mount of a part of it counts
	for _, r := range records {
		u.paths[r.path()] = r.ID
	}
	u.scan("/proc")
	return u, nil
}

// scan looks at every process in proc, which is where procfs is.
func (u *usage) scan(proc string) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return
	}
	spaces := map[string]bool{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		dir := filepath.Join(proc, e.Name())
		who := processName(dir) + " (pid " + e.Name() + ")"
		for _, name := range []string{"cwd", "root", "exe"} {
			u.link(filepath.Join(dir, name), who)
		}
		fds, err := os.ReadDir(filepath.Join(dir, "fd"))
		if err == nil {
			for _, fd := range fds {
				u.link(filepath.Join(dir, "fd", fd.Name()), who)
			}
		}
		u.mapped(filepath.Join(dir, "maps"), who)
		// Processes that share a mount namespace share its mounts.
		space, err := os.Readlink(filepath.Join(dir, "ns", "mnt"))
		if err == nil && !spaces[space] {
			spaces[space] = true
			u.mounts(filepath.Join(dir, "mountinfo"), who)
		}
	}
}

// link notes what a link of /proc leads to, if that is in the mount. A directory
// says itself which image it is of, wherever it is seen from.
func (u *usage) link(link, who string) {
	if !u.at.has(link) {
		return
	}
	buf := make([]byte, 256)
	if n, err := unix.Getxattr(link, "user.imgfs.id", buf); err == nil && n > 0 {
		u.use(string(buf[:n]), who)
		return
	}
	target, err := os.Readlink(link)
	if err != nil {
		return
	}
	u.path(target, who)
}

// path notes the use of a path as /proc shows it.
func (u *usage) path(path, who string) {
	// What is deleted is nobody's image any more; who has it open reads on.
	if strings.HasSuffix(path, " (deleted)") {
		return
	}
	rel, ok := strings.CutPrefix(path, u.dir+"/")
	if !ok {
		if path != u.dir {
			u.unknown = append(u.unknown, who)
		}
		return
	}
	if id := u.imageAt(rel); id != "" {
		u.use(id, who)
	}
}

// imageAt is the ID of the image that a path below the mount leads into, "" if it
// leads to none. What follows the path in a list of paths does no harm.
func (u *usage) imageAt(rel string) string {
	id := ""
	for i := 0; i <= len(rel); i++ {
		if i < len(rel) && !strings.ContainsRune("/:,", rune(rel[i])) {
			continue
		}
		if found := u.paths[rel[:i]]; found != "" {
			id = found
		}
	}
	return id
}

func (u *usage) use(id, who string) {
	if u.ids[id] == "" {
		u.ids[id] = who
	}
}

// mapped notes the files of the mount that a process has mapped. The lines of
// maps are: address perms offset major:minor inode path.
func (u *usage) mapped(file, who string) {
	if !u.at.maps(file) {
		return
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return
	}
	for line := range strings.Lines(string(text)) {
		if _, path, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " "+u.dir+"/"); ok {
			u.path(u.dir+"/"+path, who)
		}
	}
}

// mounts notes the mounts of a namespace that show a part of the mount, or are
// overlays over it.
func (u *usage) mounts(file, who string) {
	f, err := os.Open(file)
	if err != nil {
		return
	}
	defer f.Close()
	infos, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return
	}
	for _, m := range infos {
		if m.FSType == fsType && placeOf(m).dev == u.at.dev && m.Root != "/" {
			if id := u.imageAt(strings.TrimPrefix(m.Root, "/")); id != "" {
				u.use(id, "the mount on "+strconv.Quote(m.Mountpoint)+" of "+who)
			}
		}
		if m.FSType != "overlay" {
			continue
		}
		// Colons in paths of the option are escaped; the table escapes that again.
		options := strings.NewReplacer(`\134`, "", `\040`, " ", `\`, "").Replace(m.VFSOptions)
		for rest, ok := options, true; ok; {
			if _, rest, ok = strings.Cut(rest, u.dir+"/"); ok {
				if id := u.imageAt(rest); id != "" {
					u.use(id, "the overlay on "+strconv.Quote(m.Mountpoint)+" of "+who)
				}
			}
		}
	}
}
