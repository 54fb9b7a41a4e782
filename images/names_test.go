package images

import (
	"testing"

	"github.com/imgfs/imgfs/unionfs"
)

func TestValidHost(t *testing.T) {
	for s, want := range map[string]bool{
		"ghcr.io": true, "localhost": true, "localhost:5000": true, "127.0.0.1:5000": true, "[::1]:5000": true,
		"myhost:5000": true, "docker.io": true, "a.b:80": true,
		"ubuntu": false, "redis:7": false, "debian:12": false, "ubuntu:18.04": false, "archlinux:20240101": false,
		"": false, ".git": false, "localhost:": false, "localhost:0": false, "localhost:99999": false, "a_b.c": false, "-a.io": false,
	} {
		if got := ValidHost(s); got != want {
			t.Errorf("ValidHost(%q) = %v, want %v", s, got, want)
		}
	}
}

func TestNameValid(t *testing.T) {
	digest := "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for n, want := range map[Name]bool{
		{"ubuntu", "18.04"}:               true,
		{"bitnami/redis", "7.2"}:          true,
		{"localhost:5000/team/app", "v1"}: true,
		{"ghcr.io/a/b/c/d", "v1"}:         true,
		{"ubuntu", digest}:                true,
		{"ubuntu", "@sha256:0123"}:        false,
		{"ubuntu", "@md5:0123"}:           false,
		{"a/b/c", "v1"}:                   false, // Docker Hub has two levels
		{"localhost:5000", "v1"}:          false, // a registry is no repository
		{"Ubuntu", "18.04"}:               false,
		{"ubuntu", ".git"}:                false,
		{"ubuntu", ""}:                    false,
		{"", "18.04"}:                     false,
		{"ubuntu", "-x"}:                  false,
		{"a//b", "x"}:                     false,
		{"ghcr.io/a/../b", "x"}:           false,
	} {
		if got := n.Valid(); got != want {
			t.Errorf("%v.Valid() = %v, want %v", n, got, want)
		}
	}
}

func TestNameReference(t *testing.T) {
	for n, want := range map[Name]string{
		{"ubuntu", "18.04"}:               "index.docker.io/library/ubuntu:18.04",
		{"bitnami/redis", "7.2"}:          "index.docker.io/bitnami/redis:7.2",
		{"localhost:5000/team/app", "v1"}: "localhost:5000/team/app:v1",
	} {
		ref, err := n.reference()
		if err != nil {
			t.Errorf("%v.reference(): %v", n, err)
			continue
		}
		if ref.Name() != want {
			t.Errorf("%v.reference() = %s, want %s", n, ref.Name(), want)
		}
		if got := parseKey(n.key()); got != n {
			t.Errorf("parseKey(%v.key()) = %v", n, got)
		}
	}
}

func TestInoRoundTrip(t *testing.T) {
	for _, n := range []int{1, 2, 3, 4, 5, 64, 127, 128, maxLayers} {
		for _, layer := range []int{0, n / 2, n - 1} {
			for _, dir := range []uint32{0, 1, maxDirs(n) - 1} {
				ref := unionfs.Ref{Layer: layer, ID: unionfs.DirID(dir)}
				ino := dirIno(maxSeq, n, ref)
				if ino >= 1<<48 || ino.Kind() != KindDir || ino.seq() != maxSeq {
					t.Fatalf("dirIno(%d, %d, %v) = %#x: kind %d, sequence %d", maxSeq, n, ref, ino, ino.Kind(), ino.seq())
				}
				if got := dirRef(ino, n); got != ref {
					t.Errorf("dirRef(dirIno(%d layers, %v)) = %v", n, ref, got)
				}
			}
		}
	}
	ino := fileIno(7, unionfs.MaxIndex)
	if ino.Kind() != KindFile || ino.seq() != 7 || ino.index() != unionfs.MaxIndex {
		t.Errorf("fileIno(7, max) = %#x: kind %d, sequence %d, index %d", ino, ino.Kind(), ino.seq(), ino.index())
	}
}
