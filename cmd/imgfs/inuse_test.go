package main

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// testUsage is the use of a mount of device 0:40 with three images.
func testUsage() *usage {
	return &usage{at: place{dev: unix.Mkdev(0, 40)}, dir: "/mnt/images", ids: map[string]string{}, paths: map[string]string{
		"ubuntu/18.04": "one", "localhost:5055/demo/latest": "two", "ubuntu/18.04/nested/tag": "three",
	}}
}

func TestImageAt(t *testing.T) {
	u := testUsage()
	for rel, want := range map[string]string{
		"ubuntu/18.04":                          "one",
		"ubuntu/18.04/etc/passwd":               "one",
		"ubuntu/18.04/nested/tag/x":             "three",
		"ubuntu/18.041":                         "",
		"ubuntu":                                "",
		"":                                      "",
		"localhost:5055/demo/latest/usr":        "two",
		"localhost:5055/demo/latest:/other,rw":  "two",
		"localhost:5055/demo/latest,upperdir=x": "two",
	} {
		if got := u.imageAt(rel); got != want {
			t.Errorf("imageAt(%q) = %q, want %q", rel, got, want)
		}
	}
}

// The lines are those of a kernel 6.18.
func TestMountsInUse(t *testing.T) {
	for name, tt := range map[string]struct {
		line string
		want []string
	}{
		"the mount itself":   {`43 27 0:40 / /mnt/images rw - fuse.imgfs imgfs rw,user_id=0`, nil},
		"a bind mount":       {`48 27 0:40 /ubuntu/18.04/etc /mnt/etc rw - fuse.imgfs imgfs rw`, []string{"one"}},
		"of another imgfs":   {`48 27 0:41 /ubuntu/18.04/etc /mnt/etc rw - fuse.imgfs imgfs rw`, nil},
		"an overlay":         {`47 27 0:42 / /mnt/ov rw - overlay overlay ro,lowerdir=/mnt/images/localhost\134:5055/demo/latest:/mnt/images/ubuntu/18.04,redirect_dir=on`, []string{"one", "two"}},
		"an overlay of else": {`47 27 0:42 / /mnt/ov rw - overlay overlay ro,lowerdir=/mnt/ubuntu/18.04:/var/lib/mnt/images`, nil},
		"something else":     {`47 27 0:42 / /mnt/images/ubuntu/18.04 rw - tmpfs none rw`, nil},
	} {
		u := testUsage()
		file := filepath.Join(t.TempDir(), "mountinfo")
		if err := os.WriteFile(file, []byte(tt.line+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		u.mounts(file, "init (pid 1)")
		if len(u.ids) != len(tt.want) {
			t.Errorf("%s: in use %v, want %v", name, u.ids, tt.want)
		}
		for _, id := range tt.want {
			if u.ids[id] == "" {
				t.Errorf("%s: %s is not in use", name, id)
			}
		}
	}
}

func TestPathsInUse(t *testing.T) {
	for path, want := range map[string]struct {
		id      string
		unknown int
	}{
		"/mnt/images/ubuntu/18.04/etc/passwd": {"one", 0},
		"/mnt/images":                         {"", 0},
		"/mnt/images/ubuntu":                  {"", 0},
		"/mnt/images/ubuntu/18.04 (deleted)":  {"", 0},
		"/elsewhere/ubuntu/18.04/etc/passwd":  {"", 1},
	} {
		u := testUsage()
		u.path(path, "x (pid 1)")
		if (want.id == "") != (len(u.ids) == 0) || want.id != "" && u.ids[want.id] == "" || len(u.unknown) != want.unknown {
			t.Errorf("%s: in use %v, unknown %v, want %q, %d", path, u.ids, u.unknown, want.id, want.unknown)
		}
	}
}
