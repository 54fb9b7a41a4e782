package fs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func rename2(from, to string, flags uint) error {
	return unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, flags)
}

// renameCase is a rename among debian:1, debian:2 and team/app:v1.
type renameCase struct {
	from, to string // below the registry's directory; from the mount's root when they begin with "/"
	flags    uint
	errno    syscall.Errno
	want     map[string]string // all images of debian and team/app afterwards; nil: as before
}

func (c renameCase) run(t *testing.T) {
	w := newWorld(t, Options{})
	var was = map[string]string{"debian/1": "debian:1", "debian/2": "debian:2", "team/app/v1": "team/app:v1"}
	for _, rt := range []string{"debian:1", "debian:2", "team/app:v1"} {
		w.push(rt, layer(t, file("a", rt), dir("d/")))
		w.read(w.path(strings.Replace(rt, ":", "/", 1), "a"))
	}
	w.requests.Store(0)
	path := func(p string) string {
		if strings.HasPrefix(p, "/") {
			return filepath.Join(w.dir, p)
		}
		return w.path(p)
	}
	err := rename2(path(c.from), path(c.to), c.flags)
	if c.errno == syscall.EPERM && errors.Is(err, syscall.ENOENT) && strings.HasPrefix(c.to, "/.imgfs/") {
		err = syscall.EPERM // there is no such directory in .imgfs
	}
	if c.errno != 0 {
		w.wantErr("rename", err, c.errno)
	} else if err != nil {
		t.Error(err)
	}
	want := was
	if c.want != nil {
		want = c.want
	}
	// At once, as this process sees it and as another one does.
	seen, other := map[string]string{}, map[string]string{}
	for _, repo := range []string{"debian", "team/app"} {
		entries, _ := os.ReadDir(w.path(repo))
		for _, e := range entries {
			p := repo + "/" + e.Name()
			seen[p] = w.read(w.path(p, "a"))
			if other[p], err = w.sh("cat $H/" + p + "/a"); err != nil {
				t.Error(err)
			}
		}
	}
	for _, got := range []map[string]string{seen, other} {
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("images = %v, want %v", got, want)
		}
	}
	for p := range was {
		if want[p] == "" {
			_, err := os.Stat(w.path(p))
			w.wantErr("stat of what was moved", err, syscall.ENOENT)
		}
	}
	if got := w.requests.Load(); got != 0 {
		t.Errorf("%d requests", got)
	}
	if strings.Contains("EPERM EROFS ENOTEMPTY", unix.ErrnoName(c.errno)) && c.errno != 0 && c.to != "" && !strings.HasPrefix(c.to, "/.imgfs/") {
		w.wantReason(unix.ErrnoName(c.errno), "rename")
	}
}

// Every kind of source and of target, and what a rename of one onto the other is.
func TestRename(t *testing.T) {
	const excl, swap = unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE
	for _, c := range []renameCase{
		{"debian/1", "debian/x", 0, 0, map[string]string{"debian/x": "debian:1", "debian/2": "debian:2", "team/app/v1": "team/app:v1"}},
		{"debian/1", "debian/x", excl, 0, map[string]string{"debian/x": "debian:1", "debian/2": "debian:2", "team/app/v1": "team/app:v1"}},
		{"debian/1", "team/app/x", 0, 0, map[string]string{"team/app/x": "debian:1", "debian/2": "debian:2", "team/app/v1": "team/app:v1"}},
		{"team/app/v1", "debian/v1", 0, 0, map[string]string{"debian/1": "debian:1", "debian/2": "debian:2", "debian/v1": "team/app:v1"}},
		{"debian/1", "debian/2", 0, 0, map[string]string{"debian/2": "debian:1", "team/app/v1": "team/app:v1"}},
		{"debian/1", "team/app/v1", 0, 0, map[string]string{"team/app/v1": "debian:1", "debian/2": "debian:2"}},
		{"debian/1", "debian/2", excl, syscall.EEXIST, nil},
		{"debian/1", "debian/1", 0, 0, nil},
		{"debian/1", "debian/2", swap, 0, map[string]string{"debian/1": "debian:2", "debian/2": "debian:1", "team/app/v1": "team/app:v1"}},
		{"debian/1", "team/app/v1", swap, 0, map[string]string{"debian/1": "team/app:v1", "debian/2": "debian:2", "team/app/v1": "debian:1"}},
		{"debian/1", "debian/x", swap, syscall.ENOENT, nil},
		{"debian/1", "debian/x", unix.RENAME_WHITEOUT, syscall.EINVAL, nil},
		// Docker's spellings, of what is renamed and of what it becomes.
		{"debian:1", "debian/x", 0, 0, map[string]string{"debian/x": "debian:1", "debian/2": "debian:2", "team/app/v1": "team/app:v1"}},
		{"debian/1", "debian:x", 0, 0, map[string]string{"debian/x": "debian:1", "debian/2": "debian:2", "team/app/v1": "team/app:v1"}},
		{"debian:1", "team/app:x", 0, 0, map[string]string{"team/app/x": "debian:1", "debian/2": "debian:2", "team/app/v1": "team/app:v1"}},
		{"debian:1", "debian:2", 0, 0, map[string]string{"debian/2": "debian:1", "team/app/v1": "team/app:v1"}},
		{"debian:1", "debian:2", swap, 0, map[string]string{"debian/1": "debian:2", "debian/2": "debian:1", "team/app/v1": "team/app:v1"}},
		{"debian:1", "debian/1", 0, syscall.EISDIR, nil},
		{"debian:x", "debian/y", 0, syscall.ENOENT, nil},
		// What is no image.
		{"debian/x", "debian/y", 0, syscall.ENOENT, nil},
		{"debian", "other", 0, syscall.EPERM, nil},
		{"debian", "debian2/v1", 0, syscall.EPERM, nil},
		{"team", "other/x", 0, syscall.EPERM, nil},
		{"team/app", "team/x", 0, syscall.EPERM, nil},
		{"", "/other", 0, syscall.EPERM, nil},
		{"/docker.io", "debian/x", 0, syscall.EPERM, nil},
		{"/.imgfs", "debian/x", 0, syscall.EPERM, nil},
		{"debian/1", "team/app", swap, syscall.EPERM, nil},
		// Where no image can be.
		{"debian/1", "debian/2/x", 0, syscall.EROFS, nil},
		{"debian/1", "debian/2/d", 0, syscall.EROFS, nil},
		{"debian/1/d", "debian/2/e", 0, syscall.EROFS, nil},
		{"debian/1/d", "debian/x", 0, syscall.EROFS, nil},
		{"debian/1/d", "debian/1/e", 0, syscall.EROFS, nil},
		{"debian/1/d", "debian/1/e", excl, syscall.EROFS, nil},
		{"debian/1", "debian/1/x", 0, syscall.EINVAL, nil},
		{"debian/1", "team", 0, syscall.ENOTEMPTY, nil},
		{"debian/1", "team/app", 0, syscall.ENOTEMPTY, nil},
		{"debian/1", "", 0, syscall.ENOTEMPTY, nil},
		{"debian/1", "debian/a b", 0, syscall.EINVAL, nil},
		{"debian/1", "debian/-x", 0, syscall.EINVAL, nil},
		{"debian/1", "debian/" + strings.Repeat("x", 129), 0, syscall.EINVAL, nil},
		{"debian/1", "debian/@" + someDigest, 0, syscall.EINVAL, nil},
		{"debian/1", "debian@" + someDigest, 0, syscall.EINVAL, nil},
		{"debian/1", "/unused", 0, syscall.EINVAL, nil},
		{"debian/1", "/.imgfs/x", 0, syscall.EPERM, nil},
		{"debian/1", "/.imgfs/dangling/x", 0, syscall.EPERM, nil},
	} {
		t.Run(fmt.Sprintf("%s %s %d", c.from, strings.TrimSuffix(c.to, strings.Repeat("x", 128)), c.flags), c.run)
	}
}

// What coreutils make of renames.
func TestRenameMv(t *testing.T) {
	w := newWorld(t, Options{})
	img := w.images("debian:1", "debian:2", "debian:3")
	w.push("debian:old", layer(t, file("a", "the registry's")))
	w.requests.Store(0)
	w.wantSh("cd $H && mv debian/1 debian/old && cat debian/old/a && ls debian", "debian:1"+"2\n3\nold\n")
	w.wantSh("cd $H/debian && mv old ../team/1 && cat ../team/1/a", "debian:1")
	w.wantSh("cd $H/team && mv 1 ../debian/1 && cat ../debian/1/a && ls $M/$H", "debian:1debian\n")
	w.wantNoSh("cd $H/debian && mv 1 2", "Read-only") // into the directory 2
	w.wantSh("cd $H/debian && mv -n 1 2; mv --no-clobber -T 1 2; cat 1/a 2/a", "debian:1debian:2")
	w.wantSh("cd $H/debian && mv -T 1 2 && cat 2/a", "debian:1")
	if !w.dangling(img[1]) {
		t.Error("the image whose last name stands for another is not dangling")
	}
	w.wantSh("cd $H/debian && touch 2>/dev/null; mv -T 2 3 && ls && cat 3/a", "3\ndebian:1")
	w.wantNoSh("cd $H && mv debian other", "not permitted")
	w.wantNoSh("cd $H && mv debian/3 'debian/a b'", "")
	if got := w.requests.Load(); got > 4 { // mv itself walks to what it cannot rename
		t.Errorf("%d requests", got)
	}
	if exec.Command("sh", "-c", "mv --help | grep -q exchange").Run() == nil {
		w.wantSh("cd $H/debian && ln -s ../3 4 && mv --exchange 3 4", "")
	}
	w.restart()
	w.wantImages("debian", map[string]string{"3": "debian:1"})
}

// Many processes move two tags at once, onto each other and in exchange. None is
// lost, none doubled, and no name shows another's files.
func TestRenameMany(t *testing.T) {
	if os.Getenv("IMGFS_RENAMES") != "" {
		renames(t, strings.Split(os.Getenv("IMGFS_RENAMES"), ":"))
		return
	}
	w := newWorld(t, Options{})
	w.images("debian:a", "team:b", "debian:c")
	var procs []*exec.Cmd
	for i := range 16 {
		// Each of them begins elsewhere.
		places := []string{"debian/a", "team/b", "debian/x", "debian/c"}
		places = append(places[i%4:], places[:i%4]...)
		cmd := exec.Command("timeout", "-k", "1", "60", "sh", "-c", `cd "$1" && exec "$2" '-test.run=^TestRenameMany$'`,
			"sh", w.path(), os.Args[0])
		cmd.Env = append(os.Environ(), "IMGFS_RENAMES="+strings.Join(places, ":"))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		procs = append(procs, cmd)
	}
	for _, cmd := range procs {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	var got []string
	for _, repo := range []string{"debian", "team"} {
		entries, _ := os.ReadDir(w.path(repo))
		for _, e := range entries {
			got = append(got, w.read(w.path(repo, e.Name(), "a")))
		}
	}
	slices.Sort(got)
	if want := []string{"debian:a", "debian:c", "team:b"}; !slices.Equal(got, want) {
		t.Errorf("images = %q, want %q", got, want)
	}
}

// renames is a process of TestRenameMany: it moves and swaps what is at some
// places, all of which are tags.
func renames(t *testing.T, places []string) {
	for i := range 60 {
		from, to := places[i%4], places[(i/4+1)%4]
		flags := uint(unix.RENAME_NOREPLACE)
		if i%3 == 0 {
			flags = unix.RENAME_EXCHANGE
		}
		switch err := rename2(from, to, flags); {
		case err == nil, errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.EEXIST):
		default:
			t.Errorf("rename %s %s: %v", from, to, err)
		}
		data, err := os.ReadFile(to + "/a")
		if err != nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ESTALE) {
			t.Errorf("read: %v", err)
		}
		if got := string(data); err == nil && got != "debian:a" && got != "team:b" && got != "debian:c" {
			t.Errorf("read = %q", got)
		}
	}
}
