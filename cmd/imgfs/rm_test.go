package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

// remove runs rm on a fake mount, whose rmdir takes a directory away and nothing
// else.
func remove(m *fakeMount, force bool, args ...string) (stdout, stderr string, err error) {
	var out, errs strings.Builder
	cmd := &cobra.Command{Use: "rm"}
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	err = removeAll(cmd, m.dir, args, force)
	return out.String(), errs.String(), err
}

func TestRemoveName(t *testing.T) {
	m := newFakeMount(t, seedRecords()...)
	// The server would drop the name from the list, too.
	m.write(".imgfs/meta/ubuntu/18.04/names.json", []string{"ubuntu:18.04", "ubuntu@" + id("d3")})
	before := []image{{"ubuntu:18.04", "ubuntu/18.04"}, {"ubuntu:latest", "ubuntu/latest"}, {"ubuntu@" + id("d3"), "ubuntu/@" + id("d3")}}
	f := found{record: m.records[3], name: before[1]}
	got := strings.Join(whatWent(m.dir, f, before), "\n")
	if got != "Untagged: ubuntu:latest" {
		t.Errorf("one of several names: %s", got)
	}
	if err := os.RemoveAll(filepath.Join(m.dir, ".imgfs/ids")); err != nil {
		t.Fatal(err)
	}
	got = strings.Join(whatWent(m.dir, f, before), "\n")
	want := "Untagged: ubuntu:latest\nUntagged: ubuntu:18.04\nUntagged: ubuntu@" + id("d3") + "\nDeleted: " + id("329ed837d508")
	if got != want {
		t.Errorf("the last name:\n%s\nwant\n%s", got, want)
	}
	// Of a tag the registry's digest goes, too, though it is no name of its own.
	hex := hexOf(id("a4fe14ff1981"))
	if err := os.RemoveAll(filepath.Join(m.dir, ".imgfs/ids", hex)); err != nil {
		t.Fatal(err)
	}
	out, _, err := remove(m, false, "redis")
	if err != nil || out != "Untagged: redis:latest\nUntagged: redis@"+id("d2")+"\nDeleted: "+id("a4fe14ff1981")+"\n" {
		t.Errorf("rm redis = %q, %v", out, err)
	}
	if _, _, err := remove(m, false, "mongo:3.2"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(m.dir, "mongo/3.2")); !os.IsNotExist(err) {
		t.Errorf("mongo/3.2: %v, want it gone", err)
	}
}

func TestRemoveErrors(t *testing.T) {
	m := newFakeMount(t, seedRecords()...)
	m.write(".imgfs/chains.json", []chain{{ID: id("c0ffee"), Layers: 1}})
	for _, tt := range []struct{ arg, want string }{
		{"debian", "No such image: debian:latest"},
		{"c0ff", "conflict: unable to delete c0ffee000000 (cannot be forced) - image has dependent child images"},
		{"mongo@" + id("d1"), `"mongo@` + id("d1") + `" is not a name here; it is the digest of mongo:3.2: remove that`},
	} {
		out, _, err := remove(m, false, tt.arg)
		if err == nil || err.Error() != tt.want || out != "" {
			t.Errorf("rm %s = %q, %v, want %s", tt.arg, out, err, tt.want)
		}
	}
	// Each is tried; with force what is not here is only mentioned.
	out, _, err := remove(m, false, "debian", "redis", "alpine")
	if err == nil || err.Error() != "No such image: debian:latest\nNo such image: alpine:latest" {
		t.Errorf("rm debian redis alpine = %q, %v", out, err)
	}
	if _, err := os.Stat(filepath.Join(m.dir, "redis/latest")); !os.IsNotExist(err) {
		t.Errorf("redis/latest: %v, want it gone", err)
	}
	_, stderr, err := remove(m, true, "debian")
	if err != nil || stderr != "rm: No such image: debian:latest\n" {
		t.Errorf("rm -f debian = %q, %v", stderr, err)
	}
}

func TestTagErrors(t *testing.T) {
	m := newFakeMount(t, seedRecords()...)
	for _, tt := range []struct {
		src, dst string
		usage    bool
	}{
		{"ubuntu", "Bad:Name:x", true},
		{"ubuntu", "mine@" + id("1"), true},
		{"debian", "mine:1", false},
	} {
		err := tag(m.dir, tt.src, tt.dst)
		if err == nil || errors.As(err, new(*usageError)) != tt.usage {
			t.Errorf("tag %s %s = %v, want an error, of usage %v", tt.src, tt.dst, err, tt.usage)
		}
	}
	if err := tag(m.dir, "redis", "ubuntu:mine"); err != nil {
		t.Fatal(err)
	}
	if target, err := os.Readlink(filepath.Join(m.dir, "ubuntu/mine")); err != nil || target != "../redis/latest" {
		t.Errorf("ubuntu/mine -> %q, %v, want ../redis/latest", target, err)
	}
	// Onto a name that is here: a link into it, called as its target, which is as
	// seen from the directory that has the name.
	if err := tag(m.dir, "0a4", "ubuntu:18.04"); err != nil {
		t.Fatal(err)
	}
	hex := hexOf(id("0a4fe1111111"))
	if target, err := os.Readlink(filepath.Join(m.dir, "ubuntu/18.04", hex)); err != nil || target != "../.imgfs/dangling/"+hex {
		t.Errorf("ubuntu/18.04/%s -> %q, %v", hex, target, err)
	}
	if err := tag(m.dir, "redis", "redis:latest"); err != nil {
		t.Error(err)
	}
}

func TestParseUntil(t *testing.T) {
	now := fakeTime
	for text, want := range map[string]time.Time{
		"until=24h":                  now.Add(-24 * time.Hour),
		"until=2020-01-02T03:04:05Z": time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC),
		"until=2020-01-02":           time.Date(2020, 1, 2, 0, 0, 0, 0, time.Local),
	} {
		if got, err := parseUntil([]string{text}, now); err != nil || !got.Equal(want) {
			t.Errorf("parseUntil(%s) = %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"until=", "until=tomorrow", "label=x", "x"} {
		if _, err := parseUntil([]string{text}, now); err == nil {
			t.Errorf("parseUntil(%s): no error", text)
		}
	}
}

func TestPrune(t *testing.T) {
	m := newFakeMount(t, seedRecords()...)
	m.write(".imgfs/layers.json", []layer{{Key: id("11"), Images: 1, Cached: 5e6}, {Key: id("22"), Cached: 2e6}, {Key: id("33"), Cached: 3e6}})
	for _, key := range []string{id("11"), id("22")} {
		if err := os.MkdirAll(filepath.Join(m.dir, ".imgfs/layers", hexOf(key)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var out strings.Builder
	cmd := &cobra.Command{Use: "prune"}
	cmd.SetOut(&out)
	if err := prune(cmd, m.dir, false, time.Time{}); err != nil {
		t.Fatal(err)
	}
	// The third layer has gone meanwhile.
	if got := out.String(); !strings.HasSuffix(got, "Total reclaimed space: 2MB\n") {
		t.Errorf("prune: %q", got)
	}
	for path, here := range map[string]bool{
		".imgfs/dangling/" + hexOf(id("0a4fe1111111")): false,
		".imgfs/layers/" + hexOf(id("22")):             false,
		".imgfs/layers/" + hexOf(id("11")):             true,
		"ubuntu/18.04":                                 true,
	} {
		if _, err := os.Stat(filepath.Join(m.dir, path)); (err == nil) != here {
			t.Errorf("%s: %v, want it here: %v", path, err, here)
		}
	}
}

func TestRepositoryOf(t *testing.T) {
	for ref, want := range map[string]string{
		"ubuntu:18.04": "ubuntu", "localhost:5000/a/b:v": "localhost:5000/a/b", "localhost:5000/a": "localhost:5000/a",
		"ubuntu@sha256:1": "ubuntu", "localhost:5000/a@sha256:1": "localhost:5000/a",
	} {
		if got := repositoryOf(ref); got != want {
			t.Errorf("repositoryOf(%q) = %q, want %q", ref, got, want)
		}
	}
}
