package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSharing mounts two images that share two layers: a file of those is one
// inode in both, its bytes are in the kernel once, and du counts it once.
func TestSharing(t *testing.T) {
	r := startRegistry(t)
	m := startMount(t)
	a, b := m.path(r.push(t, "plain", "estargz")), m.path(r.push(t, "nginx", "estargz"))
	for _, name := range []string{"usr/bin/bash", "usr/share/zoneinfo/tzdata.zi", "etc/debian_version"} {
		var sa, sb unix.Stat_t
		if err := unix.Lstat(filepath.Join(a, name), &sa); err != nil {
			t.Fatal(err)
		}
		if err := unix.Lstat(filepath.Join(b, name), &sb); err != nil {
			t.Fatal(err)
		}
		if sa.Ino != sb.Ino || sa.Dev != sb.Dev {
			t.Errorf("%s: inodes %d and %d, want one", name, sa.Ino, sb.Ino)
		}
		if sa.Nlink < 2 || sb.Nlink < 2 {
			t.Errorf("%s: %d and %d links, want more than one, for du", name, sa.Nlink, sb.Nlink)
		}
		if _, err := os.ReadFile(filepath.Join(a, name)); err != nil {
			t.Fatal(err)
		}
		m.quiet() // the kernel reads ahead, and a slow server may still be asked
		n := m.messages(func() {
			if _, err := os.ReadFile(filepath.Join(b, name)); err != nil {
				t.Fatal(err)
			}
		})
		if n["READ"] != 0 {
			t.Errorf("%s: reading it through the second image makes %d READ messages, want 0", name, n["READ"])
		}
	}
	checkUsage(t, a, b)
}

// checkUsage compares du with the blocks of the distinct inodes of two trees.
func checkUsage(t *testing.T, a, b string) {
	t.Helper()
	blocks := func(roots ...string) (n int64) {
		seen := map[uint64]bool{}
		for _, root := range roots {
			s, err := takeSnapshot(root, nil)
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range s {
				if !seen[i.stat.Ino] {
					seen[i.stat.Ino] = true
					n += i.stat.Blocks
				}
			}
		}
		return n
	}
	du := func(roots ...string) int64 {
		out := strings.Split(strings.TrimSpace(program(t, "du", append([]string{"-sc", "-B512"}, roots...)...)), "\n")
		n, err := strconv.ParseInt(strings.Fields(out[len(out)-1])[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	both, first, second := du(a, b), du(a), du(b)
	t.Logf("du: %d and %d KiB alone, %d KiB together", first/2, second/2, both/2)
	if want := blocks(a, b); both != want {
		t.Errorf("du -sc a b = %d blocks, want %d, each inode once", both, want)
	}
	if saved := first + second - both; saved < (100<<20)/512 {
		t.Errorf("du counts %d KiB less for both than for each, want the shared layers (over 100 MiB)", saved/2)
	}
}
