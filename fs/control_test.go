package fs

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/images"
)

// pushBuilt pushes an image with a history and a configuration, whose layers are
// those of the commands that have one.
func (w *world) pushBuilt(repoTag string, env []string, add ...mutate.Addendum) v1.Image {
	w.t.Helper()
	img, err := mutate.Append(empty.Image, add...)
	if err == nil {
		var cfg *v1.ConfigFile
		if cfg, err = img.ConfigFile(); err == nil {
			cfg = cfg.DeepCopy()
			cfg.Config.Env = env
			cfg.Created = v1.Time{Time: time.Unix(1700000000, 0).UTC()}
			img, err = mutate.ConfigFile(img, cfg)
		}
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.write(repoTag, img)
	return img
}

func (w *world) write(repoTag string, img v1.Image) {
	w.t.Helper()
	ref, err := name.ParseReference(w.host + "/" + repoTag)
	if err == nil {
		err = remote.Write(ref, img)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func ran(command string, l v1.Layer) mutate.Addendum {
	return mutate.Addendum{Layer: l, History: v1.History{CreatedBy: command}}
}

func said(command string) mutate.Addendum {
	return mutate.Addendum{History: v1.History{CreatedBy: command, EmptyLayer: true}}
}

// ctl is a path below .imgfs.
func (w *world) ctl(elem ...string) string {
	return filepath.Join(append([]string{w.dir, ".imgfs"}, elem...)...)
}

// decode reads a JSON file of .imgfs.
func (w *world) decode(v any, elem ...string) {
	w.t.Helper()
	if err := json.Unmarshal([]byte(w.read(w.ctl(elem...))), v); err != nil {
		w.t.Errorf("%s: %v", filepath.Join(elem...), err)
	}
}

func hexOf(t *testing.T, of func() (v1.Hash, error)) string {
	t.Helper()
	h, err := of()
	if err != nil {
		t.Fatal(err)
	}
	return h.Hex
}

// builtWorld has app:1 and app:2, which share a base, and an image that lost its
// name when app:2 moved.
func builtWorld(t *testing.T, o Options) (w *world, app, two, old v1.Image) {
	w = newWorld(t, o)
	base := layer(t, dir("etc/"), file("etc/base", strings.Repeat("b", 3000)))
	app = w.pushBuilt("app:1", []string{"A=b", "EVIL=x\ny"}, ran("ADD rootfs.tar / # buildkit", base), said(`CMD ["sh"]`),
		ran("RUN /bin/sh -c make\n # buildkit", layer(t, file("made", strings.Repeat("m", 1000)))))
	old = w.pushBuilt("app:2", nil, ran("ADD rootfs.tar / # buildkit", base), ran("old", layer(t, file("old", "old"))))
	w.list(w.path("app", "1"))
	w.list(w.path("app", "2"))
	two = w.pushBuilt("app:2", nil, ran("ADD rootfs.tar / # buildkit", base), ran("new", layer(t, file("new", "new!"))))
	now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, w.path("app", "2"), now, 0); err != nil {
		t.Fatal(err)
	}
	w.list(w.path("app", "2"))
	return w, app, two, old
}

func TestControlFilesOfAll(t *testing.T) {
	metrics := func(b io.Writer) error { _, err := fmt.Fprintln(b, "imgfs_up 1"); return err }
	w, app, two, old := builtWorld(t, Options{Socket: "/run/imgfs.sock", Metrics: metrics})
	appID, twoID, oldID := hexOf(t, app.ConfigName), hexOf(t, two.ConfigName), hexOf(t, old.ConfigName)

	want := []string{"chains", "chains.json", "dangling", "df", "df.json", "errors", "errors.json", "events", "events.json", "ids",
		"images", "images.json", "layers", "layers.json", "meta", "metrics", "platforms", "pulls", "pulls.json", "socket", "stats", "stats.json"}
	if diff := cmp.Diff(want, w.list(w.ctl())); diff != "" {
		t.Error(diff)
	}
	if got, err := os.Readlink(w.ctl("socket")); got != "/run/imgfs.sock" || err != nil {
		t.Errorf("socket = %q, %v", got, err)
	}
	if got := w.read(w.ctl("metrics")); got != "imgfs_up 1\n" {
		t.Errorf("metrics = %q", got)
	}

	var list []imageJSON
	w.decode(&list, "images.json")
	type row struct {
		Repository, Tag, ID  string
		Dangling             bool
		Size, Shared, Unique int64
		Usage                int64
		Layers               int
	}
	var rows []row
	for _, i := range list {
		rows = append(rows, row{i.Repository, i.Tag, strings.TrimPrefix(i.ID, "sha256:"), i.Dangling, i.Size, i.Shared, i.Unique, i.Usage, i.Layers})
	}
	if diff := cmp.Diff([]row{{w.host + "/app", "1", appID, false, 4000, 3000, 1000, 3072 + 1024, 2},
		{w.host + "/app", "2", twoID, false, 3004, 3000, 4, 3072 + 512, 2}, {none, none, oldID, true, 3003, 3000, 3, 3072 + 512, 2}}, rows); diff != "" {
		t.Error(diff)
	}
	if lines := strings.Split(strings.TrimSpace(w.read(w.ctl("images"))), "\n"); len(lines) != 4 || !strings.HasPrefix(lines[0], "REPOSITORY ") ||
		!strings.HasPrefix(lines[3], none) || !strings.Contains(lines[3], oldID[:12]) {
		t.Errorf("images = %q", lines)
	}

	var df totalsJSON
	w.decode(&df, "df.json")
	if df.Images != 3 || df.Tagged != 2 || df.Dangling != 1 || df.Names != 2 || df.Layers != 4 || df.Expanded != 4007 ||
		df.Shared != 3000 || df.Unique != 1007 || df.Reclaimable != 3 {
		t.Errorf("df.json = %+v", df)
	}
	if got := w.read(w.ctl("df")); !strings.HasPrefix(got, "TYPE ") || strings.Count(got, "\n") != 9 {
		t.Errorf("df =\n%s", got)
	}
	var layers []layerJSON
	w.decode(&layers, "layers.json")
	if len(layers) != 4 || layers[0].Images == 0 || layers[0].Method != "gzip" || layers[0].State != "indexed" {
		t.Errorf("layers.json = %+v", layers)
	}
	var chains []struct {
		ID     string
		Layers int
		Images []string
		Whole  bool
	}
	w.decode(&chains, "chains.json")
	shared := slices.IndexFunc(chains, func(c struct {
		ID     string
		Layers int
		Images []string
		Whole  bool
	}) bool {
		return c.Layers == 1 && len(c.Images) == 3 && !c.Whole
	})
	if len(chains) != 4 || shared < 0 {
		t.Errorf("chains.json = %+v", chains)
	}
	var pulls []pullJSON
	w.decode(&pulls, "pulls.json")
	if len(pulls) == 0 || pulls[0].Name == "" || !strings.HasPrefix(w.read(w.ctl("pulls")), "NAME ") {
		t.Errorf("pulls.json = %+v", pulls)
	}
	before := w.stats().Catalogue.Reads
	w.list(w.ctl("ids"))
	if after := w.stats().Catalogue.Reads; after <= before {
		t.Errorf("catalogue.reads = %d, then %d", before, after)
	}
	os.Stat(w.path("app", "nowhere"))
	if got := w.read(w.ctl("errors.json")); !strings.Contains(got, "app:nowhere") || !strings.Contains(w.read(w.ctl("errors")), "app:nowhere") {
		t.Errorf("errors.json = %q", got)
	}
}

func TestIDs(t *testing.T) {
	w, app, two, old := builtWorld(t, Options{})
	appID, twoID, oldID := hexOf(t, app.ConfigName), hexOf(t, two.ConfigName), hexOf(t, old.ConfigName)
	want := []string{appID, twoID, oldID}
	slices.Sort(want)
	if got := w.list(w.ctl("ids")); !slices.Equal(got, want) {
		t.Errorf("ids = %q, want %q", got, want)
	}
	for id, target := range map[string]string{appID: "../../" + w.host + "/app/1", appID[:12]: "../../" + w.host + "/app/1",
		"sha256:" + appID: "../../" + w.host + "/app/1", oldID: "../dangling/" + oldID} {
		if got, err := os.Readlink(w.ctl("ids", id)); got != target || err != nil {
			t.Errorf("readlink %s = %q, %v, want %q", id, got, err, target)
		}
	}
	// The kernel keeps what links say; a link that says something else is another.
	for _, do := range []struct {
		change func() error
		first  string
	}{
		{func() error { return os.Symlink("1", w.path("app", "0")) }, "0"},
		{func() error { return syscall.Rmdir(w.path("app", "0")) }, "1"},
	} {
		if err := do.change(); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(w.ctl("ids", appID)); got != "../../"+w.host+"/app/"+do.first || err != nil {
			t.Errorf("readlink of an ID = %q, %v, want the name %s", got, err, do.first)
		}
	}
	if got := w.read(w.ctl("ids", appID[:12], "made")); len(got) != 1000 {
		t.Errorf("read through an ID = %d bytes", len(got))
	}
	if got := w.read(w.ctl("dangling", oldID, "old")); got != "old" {
		t.Errorf("read of a dangling image = %q", got)
	}
	for _, bad := range []string{"0123456789abcdef", "x", strings.ToUpper(appID), appID + "0", ".." + appID} {
		_, err := os.Lstat(w.ctl("ids", bad))
		w.wantErr("lstat ids/"+bad, err, syscall.ENOENT)
	}
	if w.list(w.ctl("dangling"))[0] != oldID {
		t.Errorf("dangling = %q", w.list(w.ctl("dangling")))
	}
	// rm is not rmdir.
	w.wantErr("unlink of an ID", syscall.Unlink(w.ctl("ids", appID)), syscall.EPERM)
	w.wantErr("rmdir of no ID", syscall.Rmdir(w.ctl("ids", "0123456789abcdef")), syscall.ENOENT)
	// Two tags are docker's "must be forced".
	if err := os.Symlink("1", w.path("app", "also")); err != nil {
		t.Fatal(err)
	}
	w.wantErr("rmdir of an ID with two tags", syscall.Rmdir(w.ctl("ids", appID[:8])), syscall.EBUSY)
	if got := w.read(w.ctl("errors")); !strings.Contains(got, "EBUSY") || !strings.Contains(got, "app:also") {
		t.Errorf("errors = %q, want the names", got)
	}
	w.read(w.path("app", "1", "made"))
	if err := syscall.Rmdir(w.path("app", "also")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Rmdir(w.ctl("ids", appID[:8])); err != nil {
		t.Fatal(err)
	}
	_, err := os.Stat(w.path("app", "1"))
	w.wantErr("stat of a name of an image deleted by ID", err, syscall.ENOENT)
	if got := w.list(w.path("app")); !slices.Equal(got, []string{"2"}) {
		t.Errorf("list = %q", got)
	}
	_, err = os.Lstat(w.ctl("ids", appID))
	w.wantErr("lstat of a deleted ID", err, syscall.ENOENT)
	// rmdir dangling/* prunes.
	if err := syscall.Rmdir(w.ctl("dangling", oldID)); err != nil {
		t.Fatal(err)
	}
	w.wantErr("rmdir again", syscall.Rmdir(w.ctl("dangling", oldID)), syscall.ENOENT)
	w.wantErr("rmdir of a named image as dangling", syscall.Rmdir(w.ctl("dangling", twoID)), syscall.ENOENT)
	if got := w.list(w.ctl("dangling")); len(got) != 0 {
		t.Errorf("dangling after the last = %q", got)
	}
	if got := w.list(w.ctl("ids")); !slices.Equal(got, []string{twoID}) {
		t.Errorf("ids = %q", got)
	}
}

// A beginning that several IDs have is none of them, and says so.
func TestAmbiguousID(t *testing.T) {
	w := newWorld(t, Options{})
	l := layer(t, file("a", "a"))
	byDigit := map[byte]string{}
	for i := 0; ; i++ {
		tag := fmt.Sprintf("app:%d", i)
		id := hexOf(t, w.pushBuilt(tag, []string{fmt.Sprintf("I=%d", i)}, ran("x", l)).ConfigName)
		w.list(w.path("app", fmt.Sprint(i)))
		other, again := byDigit[id[0]]
		if !again {
			byDigit[id[0]] = id
			continue
		}
		_, err := os.Readlink(w.ctl("ids", id[:1]))
		w.wantErr("readlink of an ambiguous ID", err, syscall.ENOENT)
		w.wantErr("rmdir of an ambiguous ID", syscall.Rmdir(w.ctl("ids", id[:1])), syscall.ENOENT)
		if got := w.read(w.ctl("errors")); !strings.Contains(got, "ambiguous") || !strings.Contains(got, id) || !strings.Contains(got, other) {
			t.Errorf("errors = %q, want both IDs", got)
		}
		if got := w.list(w.ctl("ids")); len(got) != i+1 {
			t.Errorf("%d IDs are left of %d", len(got), i+1)
		}
		return
	}
}

// Listing what is dangling does not read what is not, and a big directory is
// listed once.
func TestListingCost(t *testing.T) {
	w := newWorld(t, Options{})
	l := layer(t, file("a", "a"))
	const n = 150
	for i := range n {
		w.pushBuilt(fmt.Sprintf("app:%d", i), []string{fmt.Sprintf("I=%d", i)}, ran("x", l))
		w.list(w.path("app", fmt.Sprint(i)))
	}
	reads := func(dir string, want int) int64 {
		t.Helper()
		before := w.stats().Catalogue.Reads
		if got := w.list(w.ctl(dir)); len(got) != want {
			t.Errorf("%s has %d names, want %d", dir, len(got), want)
		}
		return w.stats().Catalogue.Reads - before
	}
	if got := reads("dangling", 0); got > 10 {
		t.Errorf("listing no dangling image made %d reads", got)
	}
	if got := reads("ids", n); got > 2*n {
		t.Errorf("listing %d IDs made %d reads", n, got)
	}
	before := w.stats()
	w.read(w.ctl("df.json"))
	if got := w.stats().Catalogue.Reads - before.Catalogue.Reads; got > 10 {
		t.Errorf("df.json made %d reads", got)
	}
}

func TestLayersAndChains(t *testing.T) {
	w, _, _, old := builtWorld(t, Options{})
	var layers []layerJSON
	w.decode(&layers, "layers.json")
	var keys []string
	for _, l := range layers {
		keys = append(keys, strings.TrimPrefix(l.Key, "sha256:"))
	}
	if got := w.list(w.ctl("layers")); !slices.Equal(got, keys) {
		t.Errorf("layers = %q, want %q", got, keys)
	}
	base := slices.IndexFunc(layers, func(l layerJSON) bool { return l.Images == 3 })
	if base < 0 {
		t.Fatalf("no layer has 3 images: %+v", layers)
	}
	var a, b unix.Stat_t
	unix.Lstat(w.ctl("layers", keys[base], "etc/base"), &a)
	unix.Lstat(w.path("app", "1", "etc/base"), &b)
	if a.Ino != b.Ino || a.Ino == 0 {
		t.Errorf("a file is inode %d in its layer and %d in an image", a.Ino, b.Ino)
	}
	w.wantErr("rmdir of a layer in use", syscall.Rmdir(w.ctl("layers", keys[base])), syscall.EBUSY)
	for _, name := range []string{"x", strings.Repeat("0", 64)} {
		w.wantErr("rmdir layers/"+name, syscall.Rmdir(w.ctl("layers", name)), syscall.ENOENT)
		_, err := os.Stat(w.ctl("layers", name))
		w.wantErr("stat layers/"+name, err, syscall.ENOENT)
		_, err = os.Stat(w.ctl("chains", name))
		w.wantErr("stat chains/"+name, err, syscall.ENOENT)
	}
	// The layer that only a dangling image has can go with it.
	if err := syscall.Rmdir(w.ctl("dangling", hexOf(t, old.ConfigName))); err != nil {
		t.Fatal(err)
	}
	w.decode(&layers, "layers.json")
	idle := slices.IndexFunc(layers, func(l layerJSON) bool { return l.Images == 0 })
	if idle < 0 {
		t.Fatalf("no layer is idle: %+v", layers)
	}
	key := strings.TrimPrefix(layers[idle].Key, "sha256:")
	if got := w.read(w.ctl("layers", key, "old")); got != "old" {
		t.Errorf("read of an idle layer = %q", got)
	}
	if err := syscall.Rmdir(w.ctl("layers", key)); err != nil {
		t.Fatal(err)
	}
	if slices.Contains(w.list(w.ctl("layers")), key) {
		t.Error("a dropped layer is listed")
	}

	wantChains(w)
}

func wantChains(w *world) {
	t := w.t
	chains := w.list(w.ctl("chains"))
	if len(chains) != 3 {
		t.Errorf("chains = %q", chains)
	}
	intermediate := 0
	for _, ch := range chains {
		if got := w.list(w.ctl("chains", ch)); slices.Equal(got, []string{"etc"}) {
			intermediate++
		}
		w.wantErr("rmdir of a chain", syscall.Rmdir(w.ctl("chains", ch)), syscall.EBUSY)
	}
	if intermediate != 1 {
		t.Errorf("%d chains have the base alone, want 1", intermediate)
	}
}

func TestPlatforms(t *testing.T) {
	w, _, _, _ := builtWorld(t, Options{})
	if got := w.list(w.ctl("platforms")); len(got) != 0 {
		t.Errorf("platforms = %q", got)
	}
	for _, name := range []string{"linux-arm64", "linux-arm-v7", "windows-amd64"} {
		if got := w.list(w.ctl("platforms", name)); len(got) != 0 {
			t.Errorf("platforms/%s = %q", name, got)
		}
	}
	for _, name := range []string{"linux", "arm64", "linux-", "linux-x", "linux-arm-7", "a-b-c-d", ".imgfs"} {
		_, err := os.Stat(w.ctl("platforms", name))
		w.wantErr("stat platforms/"+name, err, syscall.ENOENT)
	}
}

// The same image for another platform.
func TestOtherPlatform(t *testing.T) {
	w := newWorld(t, Options{})
	var adds []mutate.IndexAddendum
	for _, arch := range []string{"amd64", "arm64", "s390x"} {
		img := w.pushBuilt("parts:"+arch, []string{"ARCH=" + arch}, ran("x", layer(t, file("arch", arch))))
		adds = append(adds, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	ref, err := name.ParseReference(w.host + "/app:1")
	if err == nil {
		err = remote.WriteIndex(ref, mutate.AppendManifests(empty.Index, adds...))
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, arch := range []string{"arm64", "s390x"} {
		dir := w.ctl("platforms", "linux-"+arch, w.host, "app", "1")
		if got := w.read(filepath.Join(dir, "arch")); got != arch {
			t.Errorf("read below linux-%s = %q", arch, got)
		}
		if got := w.read(w.ctl("meta/.imgfs/platforms/linux-"+arch, w.host, "app/1/env")); got != "ARCH="+arch+"\n" {
			t.Errorf("env below linux-%s = %q", arch, got)
		}
	}
	if got := w.list(w.ctl("platforms")); !slices.Equal(got, []string{"linux-arm64", "linux-s390x"}) {
		t.Errorf("platforms = %q", got)
	}
	if got := w.list(w.ctl("platforms", "linux-arm64", w.host, "app")); !slices.Equal(got, []string{"1"}) {
		t.Errorf("list = %q", got)
	}
	if got := w.list(w.ctl("meta")); len(got) != 0 {
		t.Errorf("meta = %q", got)
	}
	for _, id := range w.list(w.ctl("ids")) {
		if got := w.read(w.ctl("ids", id, "arch")); got != "arm64" && got != "s390x" {
			t.Errorf("read through an ID = %q", got)
		}
	}
	if err := syscall.Rmdir(w.ctl("platforms", "linux-arm64", w.host, "app", "1")); err != nil {
		t.Error(err)
	}
	if got := w.list(w.ctl("platforms")); !slices.Equal(got, []string{"linux-s390x"}) {
		t.Errorf("platforms = %q", got)
	}
	w.restart()
	if got := w.read(w.ctl("platforms", "linux-s390x", w.host, "app", "1", "arch")); got != "s390x" {
		t.Errorf("read after a restart = %q", got)
	}
}

// ls -laR of all of it works, and ends.
func TestControlWalk(t *testing.T) {
	w, _, _, _ := builtWorld(t, Options{Socket: "/run/imgfs.sock"})
	for range 2 {
		out, err := exec.Command("ls", "-laR", w.ctl()).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "Dockerfile") {
			t.Errorf("ls -laR: %v\n%s", err, out)
		}
	}
	for _, op := range []error{os.Mkdir(w.ctl("x"), 0o755), os.Mkdir(w.ctl("ids", "x"), 0o755), os.WriteFile(w.ctl("x"), nil, 0o644),
		os.WriteFile(w.ctl("df"), []byte("x"), 0o644), os.Rename(w.ctl("df"), w.ctl("x")), os.Symlink("x", w.ctl("meta", "x")),
		syscall.Rmdir(w.ctl("meta")), syscall.Rmdir(w.ctl())} {
		if !isAny(op, syscall.EPERM, syscall.EROFS, syscall.EACCES) {
			t.Errorf("changing .imgfs = %v", op)
		}
	}
}

func isAny(err error, of ...syscall.Errno) bool {
	return slices.ContainsFunc(of, func(e syscall.Errno) bool { return strings.HasSuffix(fmt.Sprint(err), e.Error()) })
}

// What the kernel forgets is gone here too.
func TestControlForget(t *testing.T) {
	store, err := images.Open(images.Options{Dir: t.TempDir(), CacheSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	f := newFileSystem(store, Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	lookup := func(dir uint64, name string) uint64 {
		t.Helper()
		var out fuse.EntryOut
		if st := f.Lookup(nil, &fuse.InHeader{NodeId: dir}, name, &out); !st.Ok() {
			t.Fatalf("lookup of %s: %v", name, st)
		}
		return out.NodeId
	}
	top := lookup(1, ".imgfs")
	before := len(f.control.nodes)
	held := map[uint64]uint64{}
	for range 3 {
		for _, name := range []string{"df", "images.json", "events", "ids", "meta"} {
			held[lookup(top, name)]++
		}
	}
	if len(held) != 5 || len(f.control.nodes) != before+5 {
		t.Errorf("%d numbers, %d nodes, want 5", len(held), len(f.control.nodes)-before)
	}
	for ino, n := range held {
		if n != 3 || ino < uint64(firstControl) || ino >= 1<<46 {
			t.Errorf("number %#x was given %d times, want 3", ino, n)
		}
		f.Forget(ino, 2)
	}
	if len(f.control.nodes) != before+5 {
		t.Error("a node that the kernel holds is gone")
	}
	for ino := range held {
		f.Forget(ino, 1)
		if st := f.GetAttr(nil, &fuse.GetAttrIn{InHeader: fuse.InHeader{NodeId: ino}}, &fuse.AttrOut{}); st != fuse.Status(syscall.ESTALE) {
			t.Errorf("getattr of a forgotten node = %v", st)
		}
	}
	f.Forget(top, 100)
	if len(f.control.nodes) != before || len(f.control.names) != 0 {
		t.Errorf("%d nodes and %d names are left, want %d and 0", len(f.control.nodes), len(f.control.names), before)
	}
}
