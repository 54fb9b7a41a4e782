package integration

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestRecord records a start of python, and starts from nothing with that on another
// cache: when what was recorded has come, the start asks for nothing more.
func TestRecord(t *testing.T) {
	r := startRegistry(t)
	path := r.push(t, "plain", "estargz")
	argv := []string{"python3", "-c", "import json, ssl; print('started')"}
	profiles := filepath.Join(t.TempDir(), "profiles")
	if err := os.Mkdir(profiles, 0o755); err != nil {
		t.Fatal(err)
	}
	m := startMount(t)
	record := append([]string{"record", "--mount", m.dir, "-o", profiles, tagSpelling(path), "--"}, argv...)
	for range 2 { // the second one finds everything here, and in the kernel's cache
		program(t, "ls", m.path(path))
		if out, err := runFor(m.command(record...), time.Minute); err != nil {
			t.Fatalf("imgfs record: %v\n%s", err, out)
		}
	}
	m.stop()

	counts := map[string]int{}
	for name, flags := range map[string][]string{"with": {"--prefetch", profiles}, "without": {"--prefetch", "off"}} {
		m := startMount(t, flags...)
		r.reset()
		program(t, "ls", m.path(path))
		r.settle(t)
		before, _, _ := r.traffic()
		program(t, "chroot", append([]string{m.path(path)}, argv...)...)
		after, bytes, _ := r.traffic()
		counts[name] = after - before
		t.Logf("%s a profile: %d requests before the start, %d in it, %d bytes in all", name, before, after-before, bytes)
		m.stop()
	}
	if counts["with"] != 0 || counts["without"] == 0 {
		t.Errorf("requests while python starts: %v, want none with a profile, some without", counts)
	}
}

// settle waits until no request has come for a while.
func (r *registry) settle(t testing.TB) {
	t.Helper()
	for last, quiet := -1, 0; quiet < 10; {
		n, bytes, _ := r.traffic()
		if n += int(bytes); n != last {
			last, quiet = n, 0
		} else {
			quiet++
		}
		time.Sleep(100 * time.Millisecond)
	}
}
