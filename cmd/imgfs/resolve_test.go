package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestResolve(t *testing.T) {
	records := append(seedRecords(), record{Repository: "a4f", Tag: "latest", ID: id("123"), Manifest: id("e5")},
		record{Repository: ".imgfs/platforms/linux-arm64/ubuntu", Tag: "18.04", ID: id("777"), Manifest: id("e6")})
	m := newFakeMount(t, records...)
	for _, tt := range []struct {
		arg, path string
		byID      bool
	}{
		{"ubuntu:18.04", "ubuntu/18.04", false},
		{"ubuntu", "ubuntu/latest", false},
		{"docker.io/library/redis", "redis/latest", false},
		{m.dir + "/ubuntu/18.04", "ubuntu/18.04", false},
		{"329ed837d508", "ubuntu/18.04", true},
		{"329", "ubuntu/18.04", true},
		{id("329ed837d508"), "ubuntu/18.04", true},
		{"0a4", ".imgfs/dangling/" + hexOf(id("0a4fe1111111")), true},
		{m.dir + "/.imgfs/dangling/" + hexOf(id("0a4fe1111111")), ".imgfs/dangling/" + hexOf(id("0a4fe1111111")), true},
		{".imgfs/ids/329", "ubuntu/18.04", true},
		{".imgfs/platforms/linux-arm64/ubuntu/18.04", ".imgfs/platforms/linux-arm64/ubuntu/18.04", false},
		{"a4f", "a4f/latest", false}, // a name wins over redis's ID
		{"a4fe14ff1981", "redis/latest", true},
		{"ubuntu@" + id("d3"), "ubuntu/@" + id("d3"), false},
		{"mongo@" + id("d1"), "mongo/3.2", false},
		{"mongo@" + id("e1"), "mongo/3.2", false},
	} {
		got, err := resolve(m.dir, tt.arg)
		if err != nil || got.name.path != tt.path || got.byID != tt.byID || got.ID == "" {
			t.Errorf("resolve(%q) = %q, by ID %v, %v, want %q, %v", tt.arg, got.name.path, got.byID, err, tt.path, tt.byID)
		}
	}
	for arg, want := range map[string]string{
		"debian":              "No such image: debian:latest",
		"ubuntu:20.04":        "No such image: ubuntu:20.04",
		"beef":                "No such image: beef:latest",
		id("beef"):            "No such image: " + id("beef"),
		"redis@" + id("d1"):   "No such image: redis@" + id("d1"),
		m.dir + "/redis/none": "No such image: redis:none",
	} {
		_, err := resolve(m.dir, arg)
		if err == nil || err.Error() != want || !errors.As(err, new(notHere)) {
			t.Errorf("resolve(%q) = %v, want %q", arg, err, want)
		}
	}
	for _, arg := range []string{"", "Not:A:Name", "/etc/passwd", m.dir + "/.imgfs/images", m.dir + "/.imgfs/ids/xyz", ".imgfs/meta/ubuntu/18.04"} {
		if _, err := resolve(m.dir, arg); err == nil || errors.As(err, new(notHere)) {
			t.Errorf("resolve(%q) = %v, want another error", arg, err)
		}
	}
}

func TestResolveAmbiguous(t *testing.T) {
	m := newFakeMount(t, seedRecords()...)
	line := `{"time":"` + time.Now().UTC().Format(time.RFC3339Nano) + `","name":".imgfs/ids/0","reason":"images: the ID \"0\": ambiguous, it can be ` + hexOf(id("0a4fe1111111")) + `, ` + hexOf(id("0b1111111111")) + `: file does not exist"}`
	if err := os.WriteFile(filepath.Join(m.dir, ".imgfs/errors.json"), []byte(line+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := resolve(m.dir, "0")
	want := `"0": ambiguous, it can be 0a4fe1111111, 0b1111111111`
	if err == nil || err.Error() != want || errors.As(err, new(notHere)) {
		t.Errorf("resolve(0) = %v, want %s", err, want)
	}
}

func TestPlatformImage(t *testing.T) {
	for ref, path := range map[string]string{
		".imgfs/platforms/linux-arm64/ubuntu:18.04":     ".imgfs/platforms/linux-arm64/ubuntu/18.04",
		".imgfs/platforms/linux-arm64/h:5/a/b:v":        ".imgfs/platforms/linux-arm64/h:5/a/b/v",
		".imgfs/platforms/linux-arm64/ubuntu@sha256:12": ".imgfs/platforms/linux-arm64/ubuntu/@sha256:12",
	} {
		if got := platformImage(ref); got.path != path {
			t.Errorf("platformImage(%q) = %q, want %q", ref, got.path, path)
		}
	}
}

func TestCompletions(t *testing.T) {
	words := func(args []string, typed string) string {
		var out []string
		for _, c := range completions(seedRecords(), args, typed) {
			word, _, _ := strings.Cut(c, "\t")
			out = append(out, word)
		}
		return strings.Join(out, " ")
	}
	for _, tt := range []struct {
		args  []string
		typed string
		want  string
	}{
		{nil, "", "mongo:3.2 redis:latest ubuntu:18.04 ubuntu:latest ubuntu@" + id("d3") + " 0a4fe1111111"},
		{nil, "ubuntu:", "ubuntu:18.04 ubuntu:latest"},
		{[]string{"ubuntu:18.04"}, "ubuntu:", "ubuntu:latest"},
		{nil, "a", "a4fe14ff1981"},
		{nil, "32", "329ed837d508"},
		{nil, "sha256:a", id("a4fe14ff1981")},
		{nil, "x", ""},
	} {
		if got := words(tt.args, tt.typed); got != tt.want {
			t.Errorf("completions(%v, %q) = %q, want %q", tt.args, tt.typed, got, tt.want)
		}
	}
}
