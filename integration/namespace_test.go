package integration

import (
	"encoding/base64"
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

// names lists a directory as ls does, without hidden names.
func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			list = append(list, e.Name())
		}
	}
	slices.Sort(list)
	return list
}

func wantNames(t testing.TB, dir string, want ...string) {
	t.Helper()
	if got := names(t, dir); !slices.Equal(got, want) {
		t.Errorf("ls %s = %v, want %v", dir, got, want)
	}
}

// TestDirectoryOperations pulls, lists and untags by mkdir, ls and rmdir, across restarts.
func TestDirectoryOperations(t *testing.T) {
	r := startSmall(t)
	for _, tag := range []string{"v1", "v2", "v3"} {
		r.pushTar(t, "team/app/"+tag, []entry{file("tag", tag)})
	}
	r.reset()
	m := startMount(t, "--pull", "never")
	app := m.path(r.host, "team/app")
	wantNames(t, m.dir)
	if _, err := os.Stat(filepath.Join(app, "v1")); !errors.Is(err, unix.ENOENT) {
		t.Errorf("stat of a tag that is not here, with --pull never: %v, want ENOENT", err)
	}
	if n, _, _ := r.traffic(); n != 0 {
		t.Errorf("%d requests with --pull never, want 0\n%s", n, r.describe())
	}
	for _, tag := range []string{"v1", "v2"} {
		if err := os.MkdirAll(filepath.Join(app, tag), 0o755); err != nil {
			t.Fatalf("mkdir -p: %v", err)
		}
	}
	if err := os.Mkdir(filepath.Join(app, "v1"), 0o755); !errors.Is(err, unix.EEXIST) {
		t.Errorf("mkdir of a tag that is here: %v, want EEXIST", err)
	}
	if err := os.Mkdir(filepath.Join(app, "v9"), 0o755); !errors.Is(err, unix.ENOENT) {
		t.Errorf("mkdir of a tag that the registry has not: %v, want ENOENT", err)
	}
	wantNames(t, app, "v1", "v2")
	wantNames(t, m.dir, r.host)
	wantNames(t, m.path(r.host), "team")
	if err := os.Remove(filepath.Join(app, "v2")); err != nil {
		t.Fatalf("rmdir: %v", err)
	}
	for range 2 {
		wantNames(t, app, "v1")
		if data, err := os.ReadFile(filepath.Join(app, "v1/tag")); err != nil || string(data) != "v1" {
			t.Errorf("v1/tag = %q, %v, want v1", data, err)
		}
		if _, err := os.Stat(filepath.Join(app, "v2")); !errors.Is(err, unix.ENOENT) {
			t.Errorf("stat of a removed tag: %v, want ENOENT", err)
		}
		m.restart()
	}
	for what, err := range map[string]error{
		"create in an image": os.WriteFile(filepath.Join(app, "v1/new"), nil, 0o644),
		"mkdir in an image":  os.Mkdir(filepath.Join(app, "v1/new"), 0o755),
		"remove in an image": os.Remove(filepath.Join(app, "v1/tag")),
		"chmod in an image":  os.Chmod(filepath.Join(app, "v1/tag"), 0o600),
		"rename in an image": os.Rename(filepath.Join(app, "v1/tag"), filepath.Join(app, "v1/gone")),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v, want EROFS", what, err)
		}
	}
	if err := os.Remove(app); !errors.Is(err, unix.ENOTEMPTY) {
		t.Errorf("rmdir of a repository with tags: %v, want ENOTEMPTY", err)
	}
}

// TestRemovedStaysRemoved removes a tag on a mount that pulls by itself: a walk to
// it does not bring it back, a mkdir does.
func TestRemovedStaysRemoved(t *testing.T) {
	r := startSmall(t)
	r.pushTar(t, "app/v1", []entry{file("f", "x")})
	m := startMount(t)
	path := m.path(r.host, "app/v1")
	if _, err := os.ReadFile(filepath.Join(path, "f")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatalf("rmdir: %v", err)
	}
	for range 2 {
		if _, err := os.Stat(path); !errors.Is(err, unix.ENOENT) {
			t.Errorf("stat of a removed tag: %v, want ENOENT", err)
		}
		m.restart()
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatalf("mkdir -p: %v", err)
	}
	if data, err := os.ReadFile(filepath.Join(path, "f")); err != nil || string(data) != "x" {
		t.Errorf("after mkdir, f = %q, %v, want x", data, err)
	}
}

// TestUnknownNames asks for what is not there: the errno, and how often the
// registry is asked.
func TestUnknownNames(t *testing.T) {
	r := startSmall(t)
	r.pushTar(t, "app/v1", []entry{file("f", "x")})
	m := startMount(t)
	for _, row := range []struct {
		path     string
		errno    error
		requests bool
	}{
		{"app/nope", unix.ENOENT, true},
		{"nothing/v1", unix.ENOENT, true},
		{".git", unix.ENOENT, false},
		{".Trash", unix.ENOENT, false},
		{"app/.git", unix.ENOENT, false},
		{"UPPER/case", unix.ENOENT, false},
		{"app/" + strings.Repeat("t", 129), unix.ENOENT, false},
		{"app@sha256:zz", unix.ENOENT, false},
		{"app@sha256:" + strings.Repeat("0", 64), unix.ENOENT, true},
		{"app:", unix.ENOENT, false},
		{"app/\xff", unix.ENOENT, false},
		{strings.Repeat("x", 4096), unix.ENAMETOOLONG, false},
	} {
		path := m.path(r.host, row.path)
		r.reset()
		if _, err := os.Stat(path); !errors.Is(err, row.errno) {
			t.Errorf("stat %.40q: %v, want %v", row.path, err, row.errno)
		}
		if n, _, _ := r.traffic(); (n > 0) != row.requests {
			t.Errorf("stat %.40q: %d requests, want some: %v\n%s", row.path, n, row.requests, r.describe())
		}
		r.reset()
		start := time.Now()
		os.Stat(path)
		if n, _, _ := r.traffic(); n != 0 && time.Since(start) < 10*time.Second {
			t.Errorf("stat %.40q again: %d requests, want the answer remembered\n%s", row.path, n, r.describe())
		}
	}
	if _, err := os.ReadFile(m.path(r.host, "app/v1/f")); err != nil {
		t.Errorf("the image beside them: %v", err)
	}
}

// TestRegistryDown walks to an image of a registry that does not answer.
func TestRegistryDown(t *testing.T) {
	r := startSmall(t)
	r.stop()
	m := startMount(t, "--timeout", "3s")
	within(t, 30*time.Second, "stat", func() error {
		_, err := os.Stat(m.path(r.host, "app/v1"))
		if !errors.Is(err, unix.EHOSTUNREACH) {
			t.Errorf("stat: %v, want EHOSTUNREACH", err)
		}
		return nil
	})
	if text := m.errors(); !strings.Contains(text, "app") {
		t.Errorf(".imgfs/errors does not say why:\n%s", text)
	}
}

// TestCredentials reads from a registry that asks for a password: docker's
// config.json of the user who mounts has it, or it has not.
func TestCredentials(t *testing.T) {
	r := startSmall(t)
	r.pushTar(t, "app/v1", []entry{file("f", "x")})
	r.mu.Lock()
	r.login = "someone:a secret"
	r.mu.Unlock()
	without := startMount(t)
	if _, err := os.ReadFile(without.path(r.host, "app/v1/f")); !errors.Is(err, unix.EACCES) {
		t.Errorf("without credentials: %v, want EACCES", err)
	}
	with := startMount(t)
	with.stop()
	config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, r.host, base64.StdEncoding.EncodeToString([]byte(r.login)))
	if err := os.WriteFile(filepath.Join(filepath.Dir(with.dir), "home/config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	with.start()
	if data, err := os.ReadFile(with.path(r.host, "app/v1/f")); err != nil || string(data) != "x" {
		t.Errorf("with credentials: %q, %v, want x", data, err)
	}
	for _, m := range []*mount{without, with} {
		data, err := os.ReadFile(m.logs)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if text := string(data) + m.errors(); strings.Contains(text, "a secret") || strings.Contains(text, base64.StdEncoding.EncodeToString([]byte(r.login))) {
			t.Error("the log or .imgfs/errors shows a password")
		}
	}
}
