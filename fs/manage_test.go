package fs

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/images"
)

// sh runs a script in another process, in the registry's directory of the mount
// or in the mount's root while that is not there.
func (w *world) sh(script string) (stdout string, err error) {
	w.t.Helper()
	// The shell enters the mount: a forked child of ours that did would wait for
	// a server that waits for the fork.
	cmd := exec.Command("timeout", "-k", "1", "60", "sh", "-c", "cd \"$M\" || exit\n"+script)
	cmd.Env = append(os.Environ(), "H="+w.host, "M="+w.dir, "LC_ALL=C")
	var out, msg bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &msg
	if err = cmd.Run(); err != nil {
		err = fmt.Errorf("%s: %w: %s", script, err, &msg)
	}
	return out.String(), err
}

// wantSh runs a script that must succeed, and print want.
func (w *world) wantSh(script, want string) {
	w.t.Helper()
	if got, err := w.sh(script); err != nil || got != want {
		w.t.Errorf("%s = %q, %v, want %q", script, got, err, want)
	}
}

// wantNoSh runs a script that must fail, and say why.
func (w *world) wantNoSh(script, why string) {
	w.t.Helper()
	if got, err := w.sh(script); err == nil || !strings.Contains(err.Error(), why) {
		w.t.Errorf("%s = %q, %v, want %q", script, got, err, why)
	}
}

// wantReason is that .imgfs/errors tells of a refusal.
func (w *world) wantReason(what ...string) {
	w.t.Helper()
	got := w.read(filepath.Join(w.dir, ".imgfs/errors"))
	for _, line := range strings.Split(got, "\n") {
		if !slices.ContainsFunc(what, func(s string) bool { return !strings.Contains(line, s) }) {
			return
		}
	}
	w.t.Errorf("no line of .imgfs/errors has %q:\n%s", what, got)
}

// images pushes images whose file "a" says their name, and makes their
// directories.
func (w *world) images(repoTags ...string) (list []v1.Image) {
	w.t.Helper()
	for _, rt := range repoTags {
		list = append(list, w.push(rt, layer(w.t, file("a", rt))))
		repo, tag, _ := strings.Cut(rt, ":")
		if err := os.MkdirAll(w.path(repo, tag), 0o755); err != nil {
			w.t.Fatal(err)
		}
		w.read(w.path(repo, tag, "a")) // its layer has been asked for
	}
	w.requests.Store(0)
	return list
}

// wantImages is that a repository has exactly these tags, and each the image that
// was pushed under the name behind it: as this process sees it and as another one
// does, which walks there for the first time.
func (w *world) wantImages(repo string, tags map[string]string) {
	w.t.Helper()
	got, other := map[string]string{}, map[string]string{}
	entries, err := os.ReadDir(w.path(repo))
	if err != nil && len(tags) > 0 {
		w.t.Error(err)
	}
	for _, e := range entries {
		got[e.Name()] = w.read(w.path(repo, e.Name(), "a"))
		if other[e.Name()], err = w.sh("cat $H/" + repo + "/" + e.Name() + "/a"); err != nil {
			w.t.Error(err)
		}
	}
	if diff := cmp.Diff(tags, got); diff != "" {
		w.t.Errorf("%s: %s", repo, diff)
	}
	if diff := cmp.Diff(tags, other); diff != "" {
		w.t.Errorf("%s in another process: %s", repo, diff)
	}
}

func configHex(t *testing.T, img v1.Image) string {
	t.Helper()
	h, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return h.Hex
}

func manifestOf(t *testing.T, img v1.Image) v1.Hash {
	t.Helper()
	h, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// dangling reports whether img is here without a name.
func (w *world) dangling(img v1.Image) bool {
	w.t.Helper()
	_, ok, err := w.store.Manifest(images.Name{Repo: images.DanglingDir, Tag: configHex(w.t, img)})
	if err != nil {
		w.t.Error(err)
	}
	return ok
}

func TestTouch(t *testing.T) {
	w := newWorld(t, Options{})
	first := w.images("debian:12")[0]
	a := w.path("debian", "12", "a")
	held, err := os.Open(a)
	if err != nil {
		t.Fatal(err)
	}
	w.wantSh("touch $H/debian/12", "")
	if got := w.requests.Load(); got == 0 || got > 2 { // the manifest, and perhaps a ping
		t.Errorf("touch of a tag that has not moved made %d requests", got)
	}
	if got := w.read(a); got != "debian:12" {
		t.Errorf("read after a touch that changed nothing = %q", got)
	}
	w.push("debian:12", layer(t, file("a", "moved"), file("b", "b")))
	if got := w.read(a); got != "debian:12" {
		t.Errorf("read before the touch = %q", got)
	}
	w.wantSh("touch $H/debian/12 && cat $H/debian/12/a", "moved")
	if got := w.read(a); got != "moved" {
		t.Errorf("read after the touch = %q", got)
	}
	if got := w.list(w.path("debian", "12")); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("list after the touch = %q", got)
	}
	if !w.dangling(first) {
		t.Error("the image that the tag stood for is not dangling")
	}
	if got, err := io.ReadAll(held); string(got) != "debian:12" || err != nil {
		t.Errorf("reading a file of the image that was = %q, %v", got, err)
	}
	held.Close()
	// What else is like it.
	for _, op := range []string{"touch -a", "touch -m", "touch -c"} {
		w.wantSh(op+" $H/debian/12", "")
	}
	w.wantNoSh("touch -d 2020-01-01 $H/debian/12", "Read-only")
	w.wantNoSh("touch $H/debian/12/a", "Read-only")
	w.wantNoSh("touch $H/debian", "not permitted")
	w.wantErr("chmod", os.Chmod(w.path("debian", "12"), 0o700), syscall.EROFS)
	w.restart()
	if got := w.read(a); got != "moved" {
		t.Errorf("read after a restart = %q", got)
	}
	// The registry does not have it any more.
	answer := fault(func(rw http.ResponseWriter, r *http.Request, h http.Handler) {
		if strings.Contains(r.URL.Path, "/manifests/") {
			http.Error(rw, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`, http.StatusNotFound)
			return
		}
		h.ServeHTTP(rw, r)
	})
	w.fault.Store(&answer)
	w.wantNoSh("touch $H/debian/12", "No such file")
	w.wantReason("ENOENT", "touch", "debian:12")
	if got := w.read(a); got != "moved" {
		t.Errorf("read after a touch in vain = %q", got)
	}
}

// Many processes ask for two tags again, while these move.
func TestTouchMany(t *testing.T) {
	w := newWorld(t, Options{})
	w.images("debian:a", "debian:b")
	for round := range 3 {
		for _, tag := range []string{"a", "b"} {
			w.push("debian:"+tag, layer(t, file("a", fmt.Sprint(tag, round))))
		}
		w.wantSh("for i in $(seq 16); do touch $H/debian/a $H/debian/b || echo failed & done; wait", "")
		w.wantImages("debian", map[string]string{"a": fmt.Sprint("a", round), "b": fmt.Sprint("b", round)})
	}
}

func TestUntag(t *testing.T) {
	w := newWorld(t, Options{})
	img := w.images("debian:12", "team/app:v1")[0]
	w.wantSh("ln -s ../12 $H/debian/bookworm", "")
	w.wantErr("rmdir of a repository", syscall.Rmdir(w.path("debian")), syscall.ENOTEMPTY)
	w.wantErr("rmdir of a registry", syscall.Rmdir(w.path()), syscall.ENOTEMPTY)
	w.wantErr("rmdir of a name in an image", syscall.Rmdir(w.path("debian", "12", "d")), syscall.ENOENT)
	w.wantNoSh("rm -rf $H/debian/12", "Read-only")
	w.wantImages("debian", map[string]string{"12": "debian:12", "bookworm": "debian:12"})
	w.wantSh("rmdir $H/debian/12; ls $H/debian; stat $H/debian/12 2>&1 | grep -o 'No such file.*'", "bookworm\nNo such file or directory\n")
	if _, ok, err := w.store.Manifest(images.Name{Repo: w.host + "/debian", Tag: "bookworm"}); !ok || err != nil {
		t.Errorf("the image went with one of its two names: %v", err)
	}
	w.wantNoSh("rmdir $H/debian/12", "No such file")
	w.wantSh("rmdir $H/debian/bookworm && ls $H", "team\n") // the repository goes at once, as others see it
	if id, err := w.store.FindID(configHex(t, img)); err == nil {
		t.Errorf("the image did not go with its last name: %+v", id)
	}
	w.wantSh("rmdir $H/team/app/v1; ls -A", ".imgfs\n")
	w.restart()
	w.wantNoSh("stat $H/debian/12", "No such file")
	w.wantSh("mkdir -p $H/debian/12 && cat $H/debian/12/a", "debian:12")
}

// A removed name comes back by each operation that makes one.
func TestBack(t *testing.T) {
	w := newWorld(t, Options{})
	w.images("debian:1", "debian:2")
	for _, op := range []string{"ln -s ../1 $H/debian/x", "mv $H/debian/2 $H/debian/x", "mv -T $H/debian/1 $H/debian/x", "mkdir $H/debian/x"} {
		if strings.HasPrefix(op, "mkdir") {
			w.push("debian:x", layer(t, file("a", "x")))
		}
		w.wantSh(op+" && cat $H/debian/x/a >/dev/null && rmdir $H/debian/x", "")
		w.wantNoSh("stat $H/debian/x", "No such file")
	}
}

// No operation but mkdir, touch and a walk asks a registry.
func TestNoRequests(t *testing.T) {
	w := newWorld(t, Options{})
	w.images("debian:12")
	w.push("debian:13", layer(t, file("a", "13")))
	w.push("other/repo:v1", layer(t, file("a", "v1")))
	w.down.Store(true)
	w.wantErr("link to what is not here", os.Symlink("13", w.path("debian", "x")), syscall.ENOENT)
	w.wantErr("rename of what is not here", os.Rename(w.path("debian", "13"), w.path("debian", "x")), syscall.ENOENT)
	w.wantErr("rename of a repository that is not here", os.Rename(w.path("other", "repo", "v1"), w.path("debian", "x")), syscall.ENOENT)
	w.wantErr("rmdir of what is not here", syscall.Rmdir(w.path("debian", "13")), syscall.ENOENT)
	// The registry has these names too. The directories on the way are not here.
	if err := os.Symlink("../../../debian/12", w.path("other", "repo", "v1")); err != nil {
		t.Error(err)
	}
	if err := os.Rename(w.path("debian", "12"), w.path("debian", "13")); err != nil {
		t.Error(err)
	}
	if err := os.Rename(w.path("debian", "13"), w.path("new", "repo", "v2")); err != nil {
		t.Error(err)
	}
	for _, p := range []string{w.path("other", "repo", "v1", "a"), w.path("new", "repo", "v2", "a")} {
		if got := w.read(p); got != "debian:12" {
			t.Errorf("read %s = %q", p, got)
		}
	}
	w.wantSh("cd $H && ln -s ../new/repo/v2 debian/13 && cat debian/13/a", "debian:12")
	if got := w.requests.Load(); got != 0 {
		t.Errorf("%d requests", got)
	}
}

// What a process has open, or is in, survives what others do to names.
func TestProcessInside(t *testing.T) {
	w := newWorld(t, Options{})
	w.images("debian:1", "debian:2")
	cmd := exec.Command("sh", "-c", `cd "$1" && exec sh`, "sh", w.path("debian", "1"))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close()
		cmd.Wait()
	}()
	lines := bufio.NewReader(out)
	ask := func(script, want string) {
		t.Helper()
		fmt.Fprintf(in, "echo \"$(%s 2>&1)\"\n", script)
		if got, err := lines.ReadString('\n'); strings.TrimSpace(got) != want {
			t.Errorf("%s = %q, %v, want %q", script, got, err, want)
		}
	}
	ask("cat a", "debian:1")
	if err := os.Rename(w.path("debian", "1"), w.path("team", "x")); err != nil {
		t.Fatal(err)
	}
	ask("cat a", "debian:1")
	ask("readlink /proc/self/cwd", w.path("team", "x"))
	if err := unix.Renameat2(unix.AT_FDCWD, w.path("team", "x"), unix.AT_FDCWD, w.path("debian", "2"), unix.RENAME_EXCHANGE); err != nil {
		t.Fatal(err)
	}
	ask("readlink /proc/self/cwd", w.path("debian", "2"))
	ask("cat a", "debian:1")
	if err := syscall.Rmdir(w.path("debian", "2")); err != nil {
		t.Fatal(err)
	}
	ask("cat a 2>/dev/null | grep -v debian:1", "") // its bytes, or an error, never another image's
	w.wantImages("team", map[string]string{"x": "debian:2"})
}

// Names below platforms are names like others.
func TestPlatformPaths(t *testing.T) {
	for _, c := range []struct{ path, root, rel string }{
		{"", "", ""},
		{"ubuntu", "", "ubuntu"},
		{".imgfs", "", ".imgfs"},
		{".imgfs/platforms", "", ".imgfs/platforms"},
		{".imgfs/platforms/linux-arm64", ".imgfs/platforms/linux-arm64", ""},
		{".imgfs/platforms/linux-arm64/h:5000/a/b", ".imgfs/platforms/linux-arm64", "h:5000/a/b"},
	} {
		if root, rel := base(c.path); root != c.root || rel != c.rel {
			t.Errorf("base(%q) = %q, %q, want %q, %q", c.path, root, rel, c.root, c.rel)
		}
		if got, want := isControl(c.path), strings.HasPrefix(c.rel, ".imgfs"); got != want {
			t.Errorf("isControl(%q) = %v", c.path, got)
		}
	}
	const arm = ".imgfs/platforms/linux-arm64"
	if target, ok := spelling(arm, "ubuntu:18.04"); !ok || target != "ubuntu/18.04" {
		t.Errorf("spelling = %q, %v", target, ok)
	}
	if n, ok := meant(arm, "ubuntu:18.04"); !ok || n != (images.Name{Repo: arm + "/ubuntu", Tag: "18.04"}) {
		t.Errorf("meant = %q, %v", n, ok)
	}
	if n, ok := meant(arm, "ubuntu"); ok {
		t.Errorf("meant = %q", n)
	}
}

// A name that others wait for does not hold up those of other directories, and
// nobody waits for ever.
func TestNotifyBound(t *testing.T) {
	w := newWorld(t, Options{})
	w.images("debian:12", "team/app:v1")
	// A mkdir in debian that waits for its registry holds the directory's lock.
	release, asked := make(chan struct{}), make(chan struct{}, 10)
	answer := fault(func(rw http.ResponseWriter, r *http.Request, h http.Handler) {
		if strings.Contains(r.URL.Path, "/manifests/slow") {
			asked <- struct{}{}
			<-release
		}
		h.ServeHTTP(rw, r)
	})
	w.fault.Store(&answer)
	slow := make(chan error, 1)
	go func() { slow <- os.Mkdir(w.path("debian", "slow"), 0o755) }()
	<-asked
	w.push("debian:12", layer(t, file("a", "moved")))
	w.push("team/app:v1", layer(t, file("a", "moved")))
	w.wantSh("touch $H/debian/12", "") // it waits, and goes on
	w.wantSh("touch $H/team/app/v1 && cat $H/team/app/v1/a", "moved")
	close(release)
	w.wantErr("the slow mkdir", <-slow, syscall.ENOENT)
	eventually(t, "the kernel was told of debian:12", func() bool { return w.read(w.path("debian", "12", "a")) == "moved" })
}
