package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// write makes a file under a new directory and returns its path.
func write(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "imgfs.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestLoadConfig(t *testing.T) {
	system := write(t, `
cache-size = "20GiB"
pull = "never"
timeout = "5s"
registry-deny = ["*.example.com", "10.*"]
allow-other = true
`)
	user := write(t, `
cache-size = 4096
pull = "missing"
`)
	c := &config{}
	keys := c.keys()
	if err := keys.Parse([]string{"--timeout=7s"}); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(t.TempDir(), "none", "imgfs.toml")
	if err := loadConfig(keys, keys.Changed, []string{system, missing, user}); err != nil {
		t.Fatal(err)
	}
	if c.cacheSize.bytes != 4096 || c.pull != "missing" {
		t.Errorf("cache-size, pull = %d, %q, want those of the later file: 4096, missing", c.cacheSize.bytes, c.pull)
	}
	if c.timeout != 7*time.Second {
		t.Errorf("timeout = %v, want the command line's 7s", c.timeout)
	}
	if !c.allowOther {
		t.Error("allow-other = false, want true")
	}
	if want := []string{"*.example.com", "10.*"}; !slices.Equal(c.deny, want) {
		t.Errorf("registry-deny = %q, want %q", c.deny, want)
	}
	if err := c.check(); err != nil {
		t.Errorf("check() = %v", err)
	}
}

func TestLoadConfigRefuses(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{`cashe-size = "1G"`, `unknown key "cashe-size"`},
		{`foreground = true`, `unknown key "foreground"`},
		{`source = "x"`, `unknown key "source"`},
		{`cache-size = "lots"`, `key "cache-size": size "lots"`},
		{`cache-size = true`, `key "cache-size"`},
		{`pull = 3`, `key "pull": must be a string`},
		{`dev = "yes"`, `key "dev": must be true or false`},
		{`dev = 1`, `key "dev"`},
		{`cache-dir = "cache"`, `must be an absolute path`},
		{`timeout = "soon"`, `key "timeout"`},
		{`registry-allow = "a"`, `must be a list of strings`},
		{`registry-allow = ["a", 1]`, `must be a list of strings`},
		{"[mount]\ndev = true", `unknown key "mount"`},
		{"pull = 'never'\npull = 'missing'", `imgfs.toml`},
		{"pull = never", `imgfs.toml:1:`},
		{strings.Repeat("#", maxConfig+1), "larger than"},
	} {
		keys := new(config).keys()
		err := loadConfig(keys, keys.Changed, []string{write(t, tt.text)})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("loadConfig(%.40q) = %v, want an error with %q", tt.text, err, tt.want)
		}
	}
}

func TestConfigCheck(t *testing.T) {
	for _, tt := range []struct {
		args []string
		ok   bool
	}{
		{nil, true},
		{[]string{"--pull=always"}, false},
		{[]string{"--verify=off"}, false},
		{[]string{"--verify=strict", "--modes=exact", "--log-level=debug"}, true},
		{[]string{"--log-level=loud"}, false},
		{[]string{"--timeout=0s"}, false},
		{[]string{"--platform=linux/arm64/v8"}, true},
		{[]string{"--platform=linux"}, false},
		{[]string{"--platform=linux//v8"}, false},
		{[]string{"--registry-allow=[a"}, false},
		{[]string{"--registry-allow=*.io,ghcr.io"}, true},
	} {
		c := &config{}
		if err := c.keys().Parse(tt.args); err != nil {
			t.Fatal(err)
		}
		if err := c.check(); (err == nil) != tt.ok {
			t.Errorf("check() with %q = %v, want ok %v", tt.args, err, tt.ok)
		}
	}
}

func TestHelperArgs(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want []string
	}{
		{"imgfs /mnt -o rw,allow_other,cache-size=20GiB,_netdev,x-systemd.automount",
			[]string{"mount", "--source=imgfs", "--allow-other", "--cache-size=20GiB", "--", "/mnt"}},
		{"src -mnt", nil},
		{"src /mnt", []string{"mount", "--source=src", "--", "/mnt"}},
		{"-n src /mnt -v -t fuse.imgfs -oexec,pull=never", []string{"mount", "--source=src", "--pull=never", "--", "/mnt"}},
		{"src /mnt -o registry-deny=a,registry_deny=b", []string{"mount", "--source=src", "--registry-deny=a", "--registry-deny=b", "--", "/mnt"}},
		{"src /mnt -o ro", nil},
		{"src /mnt -o foreground", nil},
		{"src /mnt -o cache-size", nil},
		{"src", nil},
		{"src /mnt /more", nil},
		{"src /mnt --pull=never", nil},
	} {
		got, err := helperArgs(strings.Fields(tt.in))
		if (err == nil) != (tt.want != nil) {
			t.Errorf("helperArgs(%q) = %q, %v", tt.in, got, err)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("helperArgs(%q) (-want +got):\n%s", tt.in, diff)
		}
	}
}
