package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/sys/mountinfo"
)

func TestUsersMayAllowOther(t *testing.T) {
	for text, want := range map[string]bool{
		"":                                    false,
		"#user_allow_other\n":                 false,
		"mount_max = 10\nuser_allow_other \n": true,
		"user_allow_others":                   false,
	} {
		file := filepath.Join(t.TempDir(), "fuse.conf")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := usersMayAllowOther(file); got != want {
			t.Errorf("usersMayAllowOther(%q) = %v, want %v", text, got, want)
		}
	}
	if usersMayAllowOther(filepath.Join(t.TempDir(), "none")) {
		t.Error("usersMayAllowOther(no file) = true")
	}
}

func TestTopmost(t *testing.T) {
	mounts := []*mountinfo.Info{{ID: 1, Mountpoint: "/a"}, {ID: 2, Mountpoint: "/b"}, {ID: 3, Mountpoint: "/a"}}
	if got := topmost(mounts, "/a"); got == nil || got.ID != 3 {
		t.Errorf("topmost(/a) = %+v, want mount 3", got)
	}
	if got := topmost(mounts, "/a/b"); got != nil {
		t.Errorf("topmost(/a/b) = %+v, want none", got)
	}
}

func TestOpenLogPutsALargeOneAside(t *testing.T) {
	file := filepath.Join(t.TempDir(), "dir", "imgfs.log")
	f, err := openLog(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(maxLog + 1); err != nil {
		t.Fatal(err)
	}
	f.Close()
	for range 2 { // the second time there is nothing to put aside
		f, err := openLog(file)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	if info, err := os.Stat(file); err != nil || info.Size() != 0 {
		t.Errorf("the log: %v, %v, want an empty one", info, err)
	}
	if info, err := os.Stat(file + ".old"); err != nil || info.Size() != maxLog+1 {
		t.Errorf("the old log: %v, %v", info, err)
	}
}

func TestIsBelow(t *testing.T) {
	top := t.TempDir()
	m := filepath.Join(top, "m")
	for _, d := range []string{"m/in", "m2"} {
		if err := os.MkdirAll(filepath.Join(top, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("m/in", filepath.Join(top, "link")); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{
		"m": true, "m/in": true, "m/new/x": true, "link": true, "link/new": true,
		"m2": false, "new": false, "m2/new": false, ".": false, "m/../new": false,
	} {
		if got := isBelow(filepath.Join(top, path), m); got != want {
			t.Errorf("isBelow(%q, m) = %v, want %v", path, got, want)
		}
	}
}
