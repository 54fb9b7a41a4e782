package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// controlDir makes a directory that looks like a mount with these control files.
func controlDir(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, control), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, control, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFindImage(t *testing.T) {
	dir := controlDir(t, map[string]string{"images.json": `[
{"repository":"debian","tag":"12","id":"sha256:1","digest":"sha256:2","created":"2026-01-01T00:00:00Z","size":5},
{"repository":"debian","tag":"<none>","digest":"sha256:3","manifest":"sha256:0000000000000000000000000000000000000000000000000000000000000000"}]`})
	for _, tt := range []struct{ name, digest string }{
		{"docker.io/library/debian:12", "sha256:2"},
		{dir + "/debian/12", "sha256:2"},
		{"debian@sha256:0000000000000000000000000000000000000000000000000000000000000000", "sha256:3"},
		{"debian:13", ""},
		{"old:1", ""},
	} {
		want, err := parseImage(dir, tt.name)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := findImage(dir, want); got.Digest != tt.digest || ok != (tt.digest != "") {
			t.Errorf("findImage(%s) = %+v, %v, want %q", tt.name, got, ok, tt.digest)
		}
	}
	if _, err := readImages(controlDir(t, map[string]string{"images.json": "["})); err == nil {
		t.Error("readImages of broken JSON: no error")
	}
	if _, err := readImages(t.TempDir()); err == nil {
		t.Error("readImages of no mount: no error")
	}
}

func TestReason(t *testing.T) {
	dir := controlDir(t, map[string]string{"errors.json": `{"time":"2026-01-01T00:00:00Z","name":"debian:12","reason":"too old"}
{"time":"2026-01-02T00:00:01Z","name":"debian:12","op":"lookup","errno":"ENOENT","reason":"first"}
{"time":"2026-01-02T00:00:02Z","name":"debian:12","reason":"last"}
not JSON
{"time":"2026-01-02T00:00:03Z","name":"debian:13","reason":"another image"}
{"time":"2026-01-02T00:00:01Z","name":"debian","reason":"on the way"}
{"time":"2026-01-02T00:00:03Z","name":"nginx:10","reason":"another name"}
`})
	since := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	for name, want := range map[string]string{"debian:12": "on the way", "debian:13": "on the way", "nginx:1": "", "nginx": ""} {
		img, err := parseImage(dir, name)
		if err != nil {
			t.Fatal(err)
		}
		if got := reason(dir, img, since); got != want {
			t.Errorf("reason(%s) = %q, want %q", name, got, want)
		}
	}
}

func TestMakeAll(t *testing.T) {
	dir := t.TempDir()
	for range 2 {
		if err := makeAll(dir, "a/b/c"); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "a/file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"a/file", "a/file/x"} {
		if err := makeAll(dir, path); err != unix.ENOTDIR {
			t.Errorf("makeAll(%s) = %v, want ENOTDIR", path, err)
		}
	}
}

func TestContentsReadsEachFileOnce(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"a": "12345", "b": "678", "empty": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "c")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	files, total, err := contents(dir)
	if err != nil || len(files) != 3 || total != 8 {
		t.Errorf("contents = %v, %d, %v, want 3 files, 8 bytes", files, total, err)
	}
	for _, f := range files {
		if err := readFile(f.path, nil); err != nil {
			t.Error(err)
		}
	}
}
