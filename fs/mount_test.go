package fs

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/images"
)

// fault answers requests instead of the registry, which it may ask.
type fault func(rw http.ResponseWriter, r *http.Request, reg http.Handler)

// world is a registry, a cache directory and a mount of it.
type world struct {
	t        *testing.T
	host     string
	requests atomic.Int64
	down     atomic.Bool
	cache    string
	dir      string
	o        Options
	io       images.Options
	stop     func()
	store    *images.Store
	fault    atomic.Pointer[fault] // answers instead of the registry, if set
}

// newWorld starts a registry and mounts; it skips where FUSE is missing, but not
// in CI.
func newWorld(t *testing.T, o Options) *world {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	w := &world{t: t, cache: t.TempDir(), dir: t.TempDir(), o: o, io: images.Options{CacheSize: 1 << 30, Timeout: 10 * time.Second}}
	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if w.down.Load() {
			panic(http.ErrAbortHandler)
		}
		w.requests.Add(1)
		if answer := w.fault.Load(); answer != nil {
			(*answer)(rw, r, reg)
			return
		}
		reg.ServeHTTP(rw, r)
	}))
	t.Cleanup(srv.Close)
	w.host = strings.TrimPrefix(srv.URL, "http://")
	w.mount()
	t.Cleanup(func() { w.stop() })
	return w
}

func (w *world) mount() {
	w.t.Helper()
	log := slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	w.io.Dir, w.io.Log, w.o.Log = w.cache, log, log
	store, err := images.Open(w.io)
	if err != nil {
		w.t.Fatal(err)
	}
	w.store = store
	s, err := Mount(w.dir, store, w.o)
	if err != nil {
		store.Close()
		w.t.Fatal(err)
	}
	w.stop = func() {
		if err := s.Unmount(); err != nil {
			w.t.Errorf("unmount: %v", err)
			syscall.Unmount(w.dir, syscall.MNT_DETACH)
			return // what is busy would keep the server for ever
		}
		s.Serve()
		if err := store.Close(); err != nil {
			w.t.Errorf("closing the store: %v", err)
		}
		w.stop = func() {}
	}
}

func (w *world) restart() {
	w.t.Helper()
	w.stop()
	w.mount()
}

// path is a path below the registry's directory in the mount.
func (w *world) path(elem ...string) string {
	return filepath.Join(append([]string{w.dir, w.host}, elem...)...)
}

type entry struct {
	tar.Header
	body string
}

func dir(name string) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, ""}
}
func file(name, body string) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(body))}, body}
}
func link(name, target string) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}, ""}
}
func xattr(e entry, name, value string) entry {
	e.PAXRecords = map[string]string{"SCHILY.xattr." + name: value}
	return e
}

// layer is a gzip layer of entries.
func layer(t *testing.T, entries ...entry) v1.Layer {
	t.Helper()
	return layerAt(t, gzip.DefaultCompression, entries...)
}

func layerAt(t *testing.T, level int, entries ...entry) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	for _, e := range entries {
		e.ModTime = time.Unix(1600000000, 0)
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, e.body)
	}
	w.Close()
	z.Close()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// push makes an image of layers and pushes it as repo:tag.
func (w *world) push(repoTag string, layers ...v1.Layer) v1.Image {
	w.t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		w.t.Fatal(err)
	}
	ref, err := name.ParseReference(w.host + "/" + repoTag)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		w.t.Fatal(err)
	}
	w.requests.Store(0)
	return img
}

func (w *world) read(path string) string {
	w.t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(data)
}

func (w *world) list(path string) []string {
	w.t.Helper()
	entries, err := os.ReadDir(path)
	if err != nil {
		w.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func (w *world) wantErr(op string, err error, want syscall.Errno) {
	w.t.Helper()
	if !errors.Is(err, want) {
		w.t.Errorf("%s = %v, want %v", op, err, want)
	}
}

func (w *world) stats() (s Stats) {
	w.t.Helper()
	if err := json.Unmarshal([]byte(w.read(filepath.Join(w.dir, ".imgfs/stats.json"))), &s); err != nil {
		w.t.Fatal(err)
	}
	return s
}

func TestWalkPulls(t *testing.T) {
	w := newWorld(t, Options{})
	w.push("debian:12", layer(t, dir("etc/"), file("etc/os-release", "ID=debian\n"), link("etc/link", "os-release")),
		layer(t, dir("etc/"), file("etc/motd", "hello\n")))
	if diff := cmp.Diff([]string{"link", "motd", "os-release"}, w.list(w.path("debian", "12", "etc"))); diff != "" {
		t.Error(diff)
	}
	if got := w.read(w.path("debian", "12", "etc", "link")); got != "ID=debian\n" {
		t.Errorf("read through the link = %q", got)
	}
	if diff := cmp.Diff([]string{"12"}, w.list(w.path("debian"))); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{".imgfs", w.host}, w.list(w.dir)); diff != "" {
		t.Error(diff)
	}
	// docker's spelling is a link to the same directory.
	if got, err := os.Readlink(w.path("debian:12")); err != nil || got != "debian/12" {
		t.Errorf("readlink debian:12 = %q, %v", got, err)
	}
	// After a restart everything is here, with the registry gone.
	before, _ := os.Stat(w.path("debian", "12", "etc", "motd"))
	w.down.Store(true)
	w.restart()
	if got := w.read(w.path("debian", "12", "etc", "os-release")); got != "ID=debian\n" {
		t.Errorf("read after a restart = %q", got)
	}
	after, err := os.Stat(w.path("debian", "12", "etc", "motd"))
	if err != nil || !os.SameFile(before, after) && before.Sys().(*syscall.Stat_t).Ino != after.Sys().(*syscall.Stat_t).Ino {
		t.Errorf("inode number after a restart: %v, %v, %v", before.Sys(), after.Sys(), err)
	}
}

func TestNotThere(t *testing.T) {
	w := newWorld(t, Options{})
	w.push("debian:12", layer(t, file("a", "a")))
	_, err := os.Stat(w.path("debian", "13", "etc"))
	w.wantErr("stat of an unknown tag", err, syscall.ENOENT)
	_, err = os.Stat(w.path("nothing", "1", "etc"))
	w.wantErr("stat in an unknown repository", err, syscall.ENOENT)
	n := w.requests.Load()
	os.Stat(w.path("debian", "13", "etc"))
	if got := w.requests.Load(); got != n {
		t.Errorf("the second lookup of an unknown tag made %d requests", got-n)
	}
	for _, name := range []string{".git", ".Trash", "Autorun.inf", strings.Repeat("x", 255)} {
		n := w.requests.Load()
		_, err := os.Stat(filepath.Join(w.dir, name))
		w.wantErr("stat "+name, err, syscall.ENOENT)
		if got := w.requests.Load(); got != n {
			t.Errorf("stat %s made %d requests", name, got-n)
		}
	}
	w.read(w.path("debian", "12", "a"))
	_, err = os.Stat(w.path() + "\x01debian")
	w.wantErr("stat of a path with another separator", err, syscall.ENOENT)
	_, err = os.Stat(filepath.Join(w.dir, strings.Repeat("x", 256)))
	w.wantErr("stat of a name of 256 bytes", err, syscall.ENAMETOOLONG)
	if got := w.read(filepath.Join(w.dir, ".imgfs/errors")); !strings.Contains(got, "debian:13") {
		t.Errorf("errors do not tell of debian:13:\n%s", got)
	}
}

// TestPushedSince makes an image's directory after a walk to it was in vain, and
// the image was pushed since.
func TestPushedSince(t *testing.T) {
	w := newWorld(t, Options{})
	w.push("other:v1", layer(t, file("a", "a")))
	_, err := os.Stat(w.path("team", "app", "v1"))
	w.wantErr("stat before the push", err, syscall.ENOENT)
	w.push("team/app:v1", layer(t, file("a", "new")))
	if err := os.MkdirAll(w.path("team", "app", "v1"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got := w.read(w.path("team", "app", "v1", "a")); got != "new" {
		t.Errorf("read = %q", got)
	}
}

// mkdir without -p pulls too; what is removed is not brought first.
func TestMkdirAlone(t *testing.T) {
	w := newWorld(t, Options{})
	w.push("debian:12", layer(t, file("a", "a")))
	w.wantErr("rmdir of what is not here", syscall.Rmdir(w.path("debian", "12")), syscall.ENOENT)
	w.wantErr("unlink of what is not here", syscall.Unlink(w.path("debian", "12")), syscall.ENOENT)
	if got := w.requests.Load(); got != 0 {
		t.Errorf("removing what is not here made %d requests", got)
	}
	if err := os.Mkdir(w.path("debian", "12"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got := w.read(w.path("debian", "12", "a")); got != "a" {
		t.Errorf("read = %q", got)
	}
	// Nothing on the way is asked for: the whole path is known.
	w.push("team/group/sub/app:v1", layer(t, file("a", "deep")))
	if err := os.Mkdir(w.path("team", "group", "sub", "app", "v1"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got := w.requests.Load(); got > 4 { // manifest, config, layer, and a ping
		t.Errorf("mkdir of an image four directories down made %d requests", got)
	}
	if got := w.read(w.path("team", "group", "sub", "app", "v1", "a")); got != "deep" {
		t.Errorf("read = %q", got)
	}
}

func TestNestedRepository(t *testing.T) {
	w := newWorld(t, Options{})
	w.push("team/group/app:v1", layer(t, file("a", "deep")))
	if got := w.read(w.path("team", "group", "app", "v1", "a")); got != "deep" {
		t.Errorf("read = %q", got)
	}
	if got := w.list(w.path("team")); !slices.Equal(got, []string{"group"}) {
		t.Errorf("list = %q", got)
	}
}

func TestMkdirRmdir(t *testing.T) {
	for _, pull := range []string{PullMissing, PullNever} {
		t.Run(pull, func(t *testing.T) {
			w := newWorld(t, Options{Pull: pull})
			w.push("debian:12", layer(t, file("a", "a")))
			if err := os.MkdirAll(w.path("debian"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(w.path("debian", "12"), 0o755); err != nil {
				t.Fatal(err)
			}
			w.wantErr("mkdir again", os.Mkdir(w.path("debian", "12"), 0o755), syscall.EEXIST)
			w.wantErr("mkdir of an unknown tag", os.Mkdir(w.path("debian", "13"), 0o755), syscall.ENOENT)
			if got := w.read(w.path("debian", "12", "a")); got != "a" {
				t.Errorf("read = %q", got)
			}
			held, err := os.Open(w.path("debian", "12", "a"))
			if err != nil {
				t.Fatal(err)
			}
			w.wantErr("rmdir of a repository", os.Remove(w.path("debian")), syscall.ENOTEMPTY)
			w.wantErr("rm -rf", os.RemoveAll(w.path("debian", "12", "a")), syscall.EROFS)
			if err := syscall.Rmdir(w.path("debian", "12")); err != nil {
				t.Fatal(err)
			}
			_, err = os.Stat(w.path("debian", "12"))
			w.wantErr("stat after rmdir", err, syscall.ENOENT)
			if got, err := io.ReadAll(held); string(got) != "a" || err != nil {
				t.Errorf("reading a file of a removed image = %q, %v", got, err)
			}
			held.Close()
			eventually(t, "the root lists only .imgfs", func() bool { return slices.Equal(w.list(w.dir), []string{".imgfs"}) })
			w.restart()
			_, err = os.Stat(w.path("debian", "12"))
			w.wantErr("stat after rmdir and restart", err, syscall.ENOENT)
			w.down.Store(true)
			_, err = os.Stat(w.path("debian", "12"))
			w.wantErr("stat after rmdir, of a registry that is down", err, syscall.ENOENT)
			w.down.Store(false)
			if err := os.MkdirAll(w.path("debian", "12"), 0o755); err != nil {
				t.Fatal(err)
			}
			if got := w.read(w.path("debian", "12", "a")); got != "a" {
				t.Errorf("read after mkdir brought it back = %q", got)
			}
		})
	}
}

// eventually waits for what the kernel is told beside a request.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 200 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("not within 2 s: %s", what)
}

func TestReadOnly(t *testing.T) {
	w := newWorld(t, Options{})
	w.push("debian:12", layer(t, dir("d/"), file("d/a", strings.Repeat("x", 5000))))
	a := w.path("debian", "12", "d", "a")
	w.read(a)
	w.wantErr("create", os.WriteFile(w.path("debian", "12", "new"), nil, 0o644), syscall.EROFS)
	w.wantErr("mkdir", os.Mkdir(w.path("debian", "12", "new"), 0o755), syscall.EROFS)
	w.wantErr("rmdir", syscall.Rmdir(w.path("debian", "12", "d")), syscall.EROFS)
	w.wantErr("unlink", syscall.Unlink(a), syscall.EROFS)
	w.wantErr("rename", os.Rename(a, a+"2"), syscall.EROFS)
	w.wantErr("link", os.Link(a, a+"2"), syscall.EROFS)
	w.wantErr("symlink", os.Symlink("x", a+"2"), syscall.EROFS)
	w.wantErr("truncate", os.Truncate(a, 0), syscall.EROFS)
	w.wantErr("chmod", os.Chmod(a, 0o600), syscall.EROFS)
	w.wantErr("setxattr", unix.Setxattr(a, "user.x", []byte("y"), 0), syscall.EROFS)
	f, err := os.OpenFile(a, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err) // root may open; the write is what is refused
	}
	defer f.Close()
	_, err = f.WriteAt([]byte("y"), 0)
	w.wantErr("write", err, syscall.EROFS)
	// A shared mapping is tried by another process, in the integration tests: a
	// page fault on our own mount would stop this one for good.
	if w.read(a)[0] != 'x' {
		t.Error("a refused write is seen")
	}
}

// A kernel that insists on OPEN and OPENDIR gets handles that mean nothing.
func TestHandles(t *testing.T) {
	w := newWorld(t, Options{handles: true})
	w.push("debian:12", layer(t, dir("d/"), file("d/a", "alpha"), file("d/b", "beta")))
	for range 2 {
		if got := w.list(w.path("debian", "12", "d")); !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("list = %q", got)
		}
		if got := w.read(w.path("debian", "12", "d", "a")); got != "alpha" {
			t.Errorf("read = %q", got)
		}
	}
	f, err := os.OpenFile(w.path("debian", "12", "d", "a"), os.O_RDWR, 0)
	if err == nil {
		f.Close()
	}
	w.wantErr("open for writing", err, syscall.EROFS)
	if s := w.stats(); s.Fuse["OPEN"] < 3 || s.Fuse["OPENDIR"] < 2 {
		t.Errorf("the kernel sent %d OPEN and %d OPENDIR, want one for each open", s.Fuse["OPEN"], s.Fuse["OPENDIR"])
	}
}

func TestXattrs(t *testing.T) {
	w := newWorld(t, Options{})
	w.push("debian:12", layer(t, xattr(file("a", "a"), "user.colour", "blue"), file("b", "b")))
	get := func(file, name string) (string, error) {
		buf := make([]byte, 100)
		n, err := unix.Lgetxattr(w.path("debian", "12", file), name, buf)
		return string(buf[:max(n, 0)]), err
	}
	w.list(w.path("debian", "12")) // all layers have passed
	if v, err := get("a", "user.colour"); v != "blue" || err != nil {
		t.Errorf("user.colour of a = %q, %v", v, err)
	}
	_, err := get("b", "user.colour")
	w.wantErr("a name that another file has", err, syscall.ENODATA)
	_, err = get("a", "user.shape")
	w.wantErr("a name that nothing has", err, syscall.EOPNOTSUPP)
	_, err = get("a", "trusted.overlay.opaque")
	w.wantErr("overlayfs' own name", err, syscall.ENODATA)
	buf := make([]byte, 100)
	if n, err := unix.Llistxattr(w.path("debian", "12", "a"), buf); string(buf[:max(n, 0)]) != "user.colour\x00" || err != nil {
		t.Errorf("listxattr = %q, %v", buf[:max(n, 0)], err)
	}
}

func TestShared(t *testing.T) {
	w := newWorld(t, Options{})
	base := layer(t, dir("usr/"), file("usr/lib", strings.Repeat("base", 10000)))
	w.push("a:1", base, layer(t, file("a", "a")))
	w.push("b:1", base, layer(t, file("b", "b")))
	first := w.read(w.path("a", "1", "usr/lib"))
	w.list(w.path("a", "1"))
	w.list(w.path("b", "1"))
	reads := w.stats().Fuse["READ"]
	if second := w.read(w.path("b", "1", "usr/lib")); second != first {
		t.Error("the two images differ")
	}
	if got := w.stats().Fuse["READ"] - reads; got != 1 { // the stats file itself
		t.Errorf("reading through the second image made %d READ messages, want none (and 1 for stats.json)", got)
	}
	var sa, sb unix.Stat_t
	unix.Lstat(w.path("a", "1", "usr/lib"), &sa)
	unix.Lstat(w.path("b", "1", "usr/lib"), &sb)
	if sa.Ino != sb.Ino || sa.Nlink < 2 {
		t.Errorf("inode numbers %d and %d, links %d: want one number, and links above 1", sa.Ino, sb.Ino, sa.Nlink)
	}
}

func TestControlFiles(t *testing.T) {
	w := newWorld(t, Options{})
	w.push("debian:12", layer(t, file("a", "a")))
	w.read(w.path("debian", "12", "a"))
	w.list(w.path("debian", "12"))
	var list []imageJSON
	if err := json.Unmarshal([]byte(w.read(filepath.Join(w.dir, ".imgfs/images.json"))), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Repository != w.host+"/debian" || list[0].Tag != "12" || list[0].Size != 1 {
		t.Errorf("images.json = %+v", list)
	}
	a, b := w.stats(), w.stats()
	if b.Fuse["LOOKUP"] <= a.Fuse["LOOKUP"] {
		t.Errorf("stats.json does not change between two opens: %v, %v", a.Fuse, b.Fuse)
	}
	w.wantErr("rmdir .imgfs", os.Remove(filepath.Join(w.dir, ".imgfs")), syscall.EPERM)
	var st unix.Statfs_t
	if err := unix.Statfs(w.dir, &st); err != nil || int64(st.Blocks)*st.Bsize != 1<<30 || st.Bavail > st.Blocks {
		t.Errorf("statfs = %+v, %v, want a limit of 1 GiB", st, err)
	}
}

// Directories with many names are listed whole and once.
func TestBigDirectory(t *testing.T) {
	w := newWorld(t, Options{})
	var entries []entry
	want := map[string]bool{}
	for i := range 5000 {
		n := fmt.Sprintf("file-with-a-long-name-%05d", i)
		entries = append(entries, file("d/"+n, ""))
		want[n] = true
	}
	w.push("big:1", layer(t, entries...))
	got := map[string]bool{}
	for _, n := range w.list(w.path("big", "1", "d")) {
		got[n] = true
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
