package integration

import (
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestBadOperations does what cannot be done: each has its errno, and its line in
// .imgfs/errors, and nothing has changed after all of them.
func TestBadOperations(t *testing.T) {
	s := startStock(t, 400)
	m := startMount(t, append(s.hub(t), "--pull", "never")...) // O_CREAT walks, and the stock has every tag
	for _, path := range []string{"app/v1", "app/v2", "team/app/v1", "lib/v1"} {
		if err := os.Mkdir(m.path(path), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	rename := func(from, to string) error { return rename2(m.path(from), m.path(to), 0) }
	link := func(target, path string) error { return os.Symlink(target, m.path(path)) }
	names := m.names()
	for _, row := range []struct {
		what  string
		err   func() error
		errno unix.Errno
		words []string // of the line in errors; nil: the kernel answers by itself, or nothing is to be said
	}{
		{"into an image", func() error { return rename("app/v1", "app/v2/v1") }, unix.EROFS, nil},
		{"out of an image", func() error { return rename("app/v1/me", "app/me") }, unix.EROFS, nil},
		{"onto a registry", func() error { return rename("app/v1", "team") }, unix.ENOTEMPTY, []string{"team"}},
		{"of a namespace", func() error { return rename("team", "crew") }, unix.EPERM, []string{"team"}},
		{"of a repository", func() error { return rename("app", "ape") }, unix.EPERM, []string{"app"}},
		{"to a bad tag", func() error { return rename("app/v1", "app/-v1") }, unix.EINVAL, []string{"-v1"}},
		{"to a tag too long", func() error { return rename("app/v1", "app/"+strings.Repeat("t", 129)) }, unix.EINVAL, []string{"ttt"}},
		{"to a bad repository", func() error { return rename("app/v1", "lib/UPPER/v1") }, unix.EINVAL, []string{"UPPER"}},
		{"to the root", func() error { return rename("app/v1", "v1") }, unix.EINVAL, []string{"v1"}},
		{"of a control file", func() error { return rename(".imgfs/df", "app/df") }, unix.EPERM, nil},
		{"link to nothing", func() error { return link("app/nope", "app/x") }, unix.ENOENT, []string{"app/nope"}},
		{"link to nothing absolute", func() error { return link(m.path("app/nope"), "app/x") }, unix.ENOENT, []string{"nope"}},
		{"link outside", func() error { return link("/etc", "app/x") }, unix.EINVAL, []string{"/etc"}},
		{"link to a repository", func() error { return link("app", "app/x") }, unix.EINVAL, []string{"app"}},
		{"link to a file", func() error { return link("app/v1/me", "app/x") }, unix.EINVAL, []string{"app/v1/me"}},
		{"link to a control file", func() error { return link(".imgfs/df", "app/x") }, unix.EINVAL, []string{".imgfs/df"}},
		{"link as a bad tag", func() error { return link("app/v1", "app/.x") }, unix.EINVAL, []string{".x"}},
		{"link at the root", func() error { return link("app/v1", "x") }, unix.EINVAL, []string{"x"}},
		{"ambiguous ID", func() error { return lstat(m.path(".imgfs/ids", m.ambiguous(s))) }, unix.ENOENT, []string{"ambiguous"}},
		{"unknown ID", func() error { return unix.Rmdir(m.path(".imgfs/ids/" + strings.Repeat("0", 64))) }, unix.ENOENT, nil},
		{"repository in use", func() error { return unix.Rmdir(m.path("app")) }, unix.ENOTEMPTY, nil},
		{"unknown tag", func() error { return unix.Rmdir(m.path("app/nope")) }, unix.ENOENT, nil},
		{"tag that is a file", func() error { return os.WriteFile(m.path("app/x"), nil, 0o600) }, unix.EPERM, nil},
	} {
		before := m.errors()
		if err := row.err(); errnoOf(err) != row.errno {
			t.Errorf("%s: %v, want %v", row.what, err, row.errno)
		}
		if row.words != nil {
			m.wantErrorLine(row.words...)
			if m.errors() == before {
				t.Errorf("%s: no new line in .imgfs/errors", row.what)
			}
		}
	}
	var more []string // the images brought here to make an ID ambiguous
	for _, name := range m.names() {
		if !strings.HasPrefix(name, "many:") {
			more = append(more, name)
		}
	}
	if strings.Join(more, " ") != strings.Join(names, " ") {
		t.Errorf("after all of them there is %v, want %v", more, names)
	}
	m.recount()
}

// ambiguous brings images here until two IDs begin alike, and returns how.
func (m *mount) ambiguous(s *stock) string {
	m.t.Helper()
	seen := map[string]string{} // first digits: tag
	for k, i := range s.kinds {
		head := i.id.Hex[:2]
		s.mu.Lock()
		s.set["many:t"+i.id.Hex[:8]] = k
		s.mu.Unlock()
		if other, ok := seen[head]; ok {
			for _, tag := range []string{other, i.id.Hex[:8]} {
				if err := os.Mkdir(m.path("many/t"+tag), 0o755); err != nil {
					m.t.Fatal(err)
				}
			}
			return head
		}
		seen[head] = i.id.Hex[:8]
	}
	m.t.Fatal("no two IDs begin alike")
	return ""
}

// TestOneTagMovedByMany has many goroutines move the same two tags onto each other
// and away: each move is whole, and afterwards one image has one name.
func TestOneTagMovedByMany(t *testing.T) {
	s := startStock(t, 4)
	s.set["app:t1"], s.set["app:t2"] = 1, 2
	m := startMount(t, append(s.hub(t), "--pull", "never")...) // a walk would bring more here
	for _, tag := range []string{"t1", "t2"} {
		if err := os.Mkdir(m.path("app", tag), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tags := []string{"t1", "t2", "t3", "t4"}
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := range 100 {
				from, to := tags[(w+i)%4], tags[(w*3+i*7+1)%4]
				flags := []uint{unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[i%2]
				err := rename2(m.path("app", from), m.path("app", to), flags)
				if e := errnoOf(err); e != 0 && e != unix.ENOENT && e != unix.EEXIST {
					t.Errorf("rename %s %s: %v", from, to, err)
				}
				if _, err := readKind(m.path("app", to)); err != nil && errnoOf(err) != unix.ENOENT && errnoOf(err) != unix.ESTALE {
					t.Errorf("reading %s: %v", to, err)
				}
			}
		})
	}
	wg.Wait()
	rows := m.images()
	if len(rows) != 2 || rows[0].ID == rows[1].ID || rows[0].Dangling || rows[1].Dangling {
		t.Errorf("two images with a name each have become %+v", rows)
	}
	s.check(m)
	m.recount()
}
