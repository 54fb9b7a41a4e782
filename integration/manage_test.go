package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hubConfig writes a certs.d below work in which host is docker.io.
func hubConfig(t testing.TB, work, host string) string {
	t.Helper()
	certs := filepath.Join(work, "certs.d")
	if err := writeHubConfig(certs, host); err != nil {
		t.Fatal(err)
	}
	return certs
}

func writeHubConfig(certs, host string) error {
	if err := os.MkdirAll(filepath.Join(certs, "docker.io"), 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(certs, "docker.io/hosts.toml"), fmt.Appendf(nil, "server = \"http://%s\"\n", host), 0o644)
}

// An imageRow is an object of .imgfs/images.json.
type imageRow struct {
	Repository, Tag                                 string
	Dangling                                        bool
	ID, Digest, Manifest, Platform                  string
	Created, Pulled                                 time.Time
	Size, Compressed, Usage, Shared, Unique, Cached int64
	Layers                                          int
}

// path is where the image stands below the mount.
func (i imageRow) path() string {
	switch {
	case i.Dangling:
		return ".imgfs/dangling/" + strings.TrimPrefix(i.ID, "sha256:")
	case i.Tag == "<none>":
		return i.Repository + "/@" + i.Digest
	}
	return i.Repository + "/" + i.Tag
}

// name is how docker writes it.
func (i imageRow) name() string { return i.Repository + ":" + i.Tag }

// A layerRow is an object of .imgfs/layers.json.
type layerRow struct {
	Key, Digest, DiffID, MediaType      string
	Images                              int
	Compressed, Expanded, Usage, Cached int64
	Method, Why, State, Command         string
	Lazy                                bool
}

// totals is .imgfs/df.json.
type totals struct {
	Images, Tagged, Dangling, Names, Layers, Idle, Arriving       int
	Compressed, Expanded, Usage, Shared, SharedUsage, Unique      int64
	Cached, Reclaimable, ReclaimableCached, CacheLimit, CacheFree int64
}

// control reads a JSON file below .imgfs.
func (m *mount) control(name string, v any) {
	m.t.Helper()
	data, err := os.ReadFile(m.path(".imgfs", name))
	if err != nil {
		m.t.Fatal(err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		m.t.Fatalf(".imgfs/%s: %v\n%s", name, err, data)
	}
}

func (m *mount) images() (rows []imageRow) {
	m.t.Helper()
	m.control("images.json", &rows)
	return rows
}

func (m *mount) layers() (rows []layerRow) {
	m.t.Helper()
	m.control("layers.json", &rows)
	return rows
}

func (m *mount) df() (d totals) {
	m.t.Helper()
	m.control("df.json", &d)
	return d
}

// names are the images as docker writes them, sorted; dangling ones by ID.
func (m *mount) names() (list []string) {
	m.t.Helper()
	for _, i := range m.images() {
		if i.Dangling {
			list = append(list, i.ID)
		} else {
			list = append(list, i.name())
		}
	}
	slices.Sort(list)
	return list
}

// row is the image with that name, as docker writes it.
func (m *mount) row(name string) imageRow {
	m.t.Helper()
	rows := m.images()
	for _, i := range rows {
		if i.name() == name {
			return i
		}
	}
	m.t.Fatalf("%s is not among %v", name, m.names())
	return imageRow{}
}

// imgfs runs the binary on the mount; it must succeed.
func (m *mount) imgfs(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatalf("imgfs %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (m *mount) try(args ...string) (string, error) {
	cmd := m.command(args...)
	cmd.Env = append(cmd.Env, "IMGFS_MOUNT="+m.dir)
	return runFor(cmd, 2*time.Minute)
}

// settled waits until no layer arrives any more, so that all sizes are known.
func (m *mount) settled() totals {
	m.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		d := m.df()
		if d.Arriving == 0 {
			return d
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("after %v layers still arrive: %+v", patience, d)
		}
	}
}

// errnoOf is the errno in err, 0 for nil.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	if err != nil && !errors.As(err, &errno) {
		return unix.EIO
	}
	return errno
}

// wantErrno fails the test unless the operation ended as it must.
func wantErrno(t testing.TB, what string, err error, want unix.Errno) {
	t.Helper()
	if got := errnoOf(err); got != want {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// wantErrorLine fails the test unless .imgfs/errors has a line with all the words.
func (m *mount) wantErrorLine(words ...string) {
	m.t.Helper()
	text := m.errors()
	for line := range strings.Lines(text) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			return
		}
	}
	m.t.Errorf(".imgfs/errors has no line with %q:\n%s", words, text)
}

// touch is touch(1) of what is there.
func touch(path string) error {
	now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, now, 0)
}

func rename2(from, to string, flags uint) error {
	return unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, flags)
}
