package integration

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// hasTOC reports whether a format has a table of contents, whose times are to the second.
func hasTOC(format string) bool { return format == "estargz" || format == "zstdchunked" }

// TestImage uses a whole Debian on a fresh mount, in every format, as people do,
// and compares it entry by entry with what umoci unpacks.
func TestImage(t *testing.T) {
	for _, format := range formats {
		t.Run(format, func(t *testing.T) {
			want := oracle(t, "python")
			r := startRegistry(t)
			path := r.push(t, "python", format)
			m := startMount(t)
			root := m.path(path)

			within(t, time.Minute, "ls etc", func() error {
				entries, err := os.ReadDir(filepath.Join(root, "etc"))
				if len(entries) < 50 && err == nil {
					t.Errorf("ls etc: %d entries, want a whole /etc", len(entries))
				}
				return err
			})
			got, err := os.ReadFile(filepath.Join(root, "etc/os-release"))
			if err != nil {
				t.Fatal(err)
			}
			if want, _ := os.ReadFile(filepath.Join(want.root, "etc/os-release")); !bytes.Equal(got, want) {
				t.Errorf("etc/os-release = %q, want %q", got, want)
			}
			if got := program(t, "chroot", root, "python3", "-c", "import json,ssl; print(1)"); got != "1\n" {
				t.Errorf("python3 in the image prints %q, want 1", got)
			}
			if n := strings.Count(program(t, "find", root, "-print0"), "\x00"); n != len(want.snap) {
				t.Errorf("find: %d names, want %d", n, len(want.snap))
			}
			diffs, err := want.compare(root, comparison{wholeSeconds: hasTOC(format), mtimeFree: implicitDirs(t, "python")})
			if err != nil {
				t.Fatal(err)
			}
			reportDiffs(t, diffs)
			if got, want := swallow(t, "tar", "-C", root, "-c", "."), swallow(t, "tar", "-C", want.root, "-c", "."); got != want {
				t.Errorf("tar c: %d bytes, want %d", got, want)
			}
			du := strings.Fields(program(t, "du", "-s", "-B1M", root))[0]
			if n, err := strconv.Atoi(du); err != nil || n < 100 || n > 400 {
				t.Errorf("du -s: %s MiB, want about 250", du)
			}
			t.Logf("du -sh: %s", strings.Fields(program(t, "du", "-sh", root))[0])
			checkMountOptions(t, m)
		})
	}
}

func checkMountOptions(t *testing.T, m *mount) {
	t.Helper()
	options := m.options()
	for _, o := range []string{"nodev", "nosuid"} {
		if !slices.Contains(options, o) {
			t.Errorf("mount options %v lack %s", options, o)
		}
	}
}

// TestMediaTypes mounts the same layers as Docker's media types have them, behind
// an image index with other platforms, and by digest.
func TestMediaTypes(t *testing.T) {
	want := oracle(t, "nginx")
	r := startRegistry(t)
	digest := pushDockerIndex(t, "debian", "nginx-docker")
	m := startMount(t)
	for _, path := range []string{
		r.host + "/debian/nginx-docker",
		r.host + "/debian:nginx-docker",
		r.host + "/debian@" + digest,
	} {
		got, err := os.ReadFile(m.path(path, "etc/os-release"))
		if err != nil {
			t.Fatal(err)
		}
		if want, _ := os.ReadFile(filepath.Join(want.root, "etc/os-release")); !bytes.Equal(got, want) {
			t.Errorf("%s/etc/os-release = %q, want %q", path, got, want)
		}
	}
	if target, err := os.Readlink(m.path(r.host + "/debian:nginx-docker")); err != nil || target != "debian/nginx-docker" {
		t.Errorf("debian:nginx-docker is a link to %q (%v), want debian/nginx-docker", target, err)
	}
	diffs, err := want.compare(m.path(r.host, "debian/nginx-docker"), comparison{mtimeFree: implicitDirs(t, "nginx")})
	if err != nil {
		t.Fatal(err)
	}
	reportDiffs(t, diffs)
}

// TestReadersTogether has several readers read all of an image at once on a fresh
// mount: they wait for the same layers, chunks and bytes, and each sees all of it.
// Where what one reader misses lies around what another has brought, a request
// brings both: some of the bytes come twice that way.
func TestReadersTogether(t *testing.T) {
	const readers = 6
	for _, format := range []string{"gzip", "estargz", "zstdchunked"} {
		t.Run(format, func(t *testing.T) {
			want := oracle(t, "nginx")
			r := startRegistry(t)
			m := startMount(t)
			root := m.path(r.push(t, "nginx", format))
			results := make(chan error, readers)
			for range readers {
				go func() {
					sums, err := checksums(root, want.snap)
					if err == nil && !maps.Equal(sums, want.sums) {
						err = errors.New("wrong contents")
					}
					results <- err
				}()
			}
			for range readers {
				if err := <-results; err != nil {
					t.Error(err)
				}
			}
			var total int64
			for _, l := range images["nginx"] {
				total += openCorpus(t).layer(t, l, format).Length
			}
			if n, sum, _ := r.traffic(); sum > total+total/10 {
				t.Errorf("%d requests, %d bytes for layers of %d bytes, want each byte once, but for gaps", n, sum, total)
			}
		})
	}
}
