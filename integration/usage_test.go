package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// du is what du -s says of trees together, in bytes.
func du(t testing.TB, roots ...string) int64 {
	t.Helper()
	out := strings.Split(strings.TrimSpace(program(t, "du", append([]string{"-sc", "-B1"}, roots...)...)), "\n")
	n, err := strconv.ParseInt(strings.Fields(out[len(out)-1])[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestDiskUsage has two images share a base: what du counts less for both than for
// each is what df calls shared, to the byte.
func TestDiskUsage(t *testing.T) {
	for _, row := range []struct {
		name  string
		whole bool // sizes are multiples of 512
		sizes []int
	}{
		{"blocks", true, []int{512, 4096, 65536, 512 * 77}},
		{"bytes", false, []int{1, 511, 513, 70_001}},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := startSmall(t)
			files := func(prefix string) (list []entry) {
				for _, n := range row.sizes {
					list = append(list, file(prefix+strconv.Itoa(n), filler(prefix, n)))
				}
				return append(list, hardlink(prefix+"link", prefix+strconv.Itoa(row.sizes[0])), symlink(prefix+"symlink", "x"), dir(prefix+"dir"))
			}
			base, common := files("base-"), files("common-")
			r.pushTar(t, "a/v1", base, common, files("a-"))
			r.pushTar(t, "b/v1", base, common, files("b-"), files("b2-"))
			r.pushTar(t, "alone/v1", files("alone-"))
			m := startMount(t)
			pa, pb, pc := m.path(r.host, "a/v1"), m.path(r.host, "b/v1"), m.path(r.host, "alone/v1")
			a, b, both := du(t, pa), du(t, pb), du(t, pa, pb)
			df := m.settled()
			if got := a + b - both; got != df.SharedUsage {
				t.Errorf("du: %d and %d, together %d: %d shared; df says %d", a, b, both, got, df.SharedUsage)
			}
			if row.whole && df.Shared != df.SharedUsage {
				t.Errorf("df: shared %d, in blocks %d, want the same", df.Shared, df.SharedUsage)
			}
			if !row.whole && df.Shared >= df.SharedUsage {
				t.Errorf("df: shared %d, in blocks %d, want fewer", df.Shared, df.SharedUsage)
			}
			if all := du(t, pa, pb, pc); all != df.Usage {
				t.Logf("du of all: %d, df: %d", all, df.Usage)
			}
			if all, want := du(t, pa, pb, pc), m.df().Usage; all != want {
				t.Errorf("du of all images: %d, df says %d", all, want)
			}
			for path, want := range map[string]int64{pa: a, pb: b} {
				if i := m.row(tagSpelling(strings.TrimPrefix(path, m.dir+"/"))); i.Usage != want {
					t.Errorf("%s: usage %d, du says %d", path, i.Usage, want)
				}
			}
			m.recount()
			if err := os.Remove(pa); err != nil {
				t.Fatal(err)
			}
			if df := m.df(); df.Shared != 0 || df.SharedUsage != 0 || df.Usage != b+du(t, pc) {
				t.Errorf("without a, df says %+v, want nothing shared and %d used", df, b+du(t, pc))
			}
			m.recount()
			m.restart()
			m.recount()
		})
	}
}

// TestDiskUsageOfDebian does the same with real images, whose upper layers replace
// files of lower ones: du counts what is seen, df what the layers hold. So each
// layer alone is compared with df, and the images with a walk.
func TestDiskUsageOfDebian(t *testing.T) {
	r := startRegistry(t)
	m := startMount(t)
	a, b := m.path(r.push(t, "plain", "gzip")), m.path(r.push(t, "nginx", "gzip"))
	checkUsage(t, a, b)
	m.settled()
	for _, l := range m.layers() {
		root := m.path(".imgfs/layers", strings.TrimPrefix(l.Key, "sha256:"))
		var size, blocks int64
		seen := map[uint64]bool{}
		s, err := takeSnapshot(root, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range s {
			if n.isFile() && !seen[n.stat.Ino] {
				seen[n.stat.Ino] = true
				size += n.stat.Size
				blocks += n.stat.Blocks * 512
			}
		}
		if l.Expanded != size || l.Usage != blocks {
			t.Errorf("%s: expanded %d, usage %d, a walk finds %d and %d", filepath.Base(root), l.Expanded, l.Usage, size, blocks)
		}
		if got := du(t, root); got != blocks {
			t.Errorf("%s: du says %d, want %d", filepath.Base(root), got, blocks)
		}
	}
	m.recount()
}
