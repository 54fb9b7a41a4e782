package integration

import (
	"bytes"
	endian "encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// fillCatalogue brings some images here, among them a dangling one, and stops the
// mount. It returns what was here.
func fillCatalogue(t *testing.T, s *stock, m *mount) (names []string, state map[string]int) {
	t.Helper()
	w := newWorker(workload{Mount: m.dir, Stock: s.host, Repos: []string{"app", "team/app", s.host + "/other"}, Tags: 3, Kinds: chaosKinds, Seed: 7}, nil)
	for i := 0; i < 150 || len(w.model) < 4 && i < 1000; i++ {
		w.step()
	}
	for _, wrong := range w.report.Wrong {
		t.Error(wrong)
	}
	m.recount()
	names, state = m.names(), w.model
	if len(state) < 3 {
		t.Fatalf("only %v is here", state)
	}
	m.stop()
	return names, state
}

// TestNewerCatalogue starts with the catalogue of a newer version: it is refused
// with a line that says so, and not touched.
func TestNewerCatalogue(t *testing.T) {
	s := startStock(t, chaosKinds)
	m := startMount(t, s.hub(t)...)
	names, _ := fillCatalogue(t, s, m)
	path := filepath.Join(m.cache, "catalog.db")
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	newer := raiseVersion(t, old)
	if err := os.WriteFile(path, newer, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := runFor(m.command(append([]string{"mount", "--cache-dir", m.cache, m.dir}, m.flags...)...), time.Minute)
	if err == nil {
		t.Fatalf("mounting with a newer catalogue succeeds:\n%s", out)
	}
	if !regexp.MustCompile(`version (\d+)`).MatchString(out) || !strings.Contains(out, "newer") || strings.Count(strings.TrimSpace(out), "\n") > 0 {
		t.Errorf("mount says %q, want one line about a newer version", out)
	}
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, newer) {
		t.Errorf("the catalogue was touched (%v)", err)
	}
	if set := damagedCatalogues(t, m); len(set) > 0 {
		t.Errorf("%v was set aside", set)
	}
	if err := os.WriteFile(path, old, 0o600); err != nil {
		t.Fatal(err)
	}
	m.start()
	if got := m.names(); !slices.Equal(got, names) {
		t.Errorf("with the old one back there is %v, want %v", got, names)
	}
}

// raiseVersion raises the version that the catalogue's file says it has: the value
// beside the key "version", in every page that has it.
func raiseVersion(t *testing.T, db []byte) []byte {
	t.Helper()
	db = bytes.Clone(db)
	n := 0
	for i := 0; ; n++ {
		at := bytes.Index(db[i:], []byte("version"))
		if at < 0 {
			break
		}
		i += at + len("version")
		switch v := db[i:]; {
		case '0' <= v[0] && v[0] <= '9':
			v[0] = '9'
		default:
			if len(v) >= 8 && endian.BigEndian.Uint64(v) < 100 {
				endian.BigEndian.PutUint64(v, 99)
			} else {
				v[0] = 99
			}
		}
	}
	if n == 0 {
		t.Fatal("the catalogue has no version in it")
	}
	return db
}

func damagedCatalogues(t *testing.T, m *mount) []string {
	t.Helper()
	set, err := filepath.Glob(filepath.Join(m.cache, "catalog.db.damaged-*"))
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// TestDamagedCatalogue damages the catalogue in several ways: it is set aside, the
// log says so, and every name and every image is back, without the registry.
func TestDamagedCatalogue(t *testing.T) {
	for what, damage := range map[string]func(db []byte) []byte{
		"zeros":    func(db []byte) []byte { return make([]byte, len(db)) },
		"short":    func(db []byte) []byte { return db[:5000] },
		"garbage":  func(db []byte) []byte { return []byte(filler("garbage", len(db))) },
		"half":     func(db []byte) []byte { clear(db[len(db)/4:]); return db },
		"meta":     func(db []byte) []byte { copy(db, filler("meta", 16384)); return db },
		"one page": func(db []byte) []byte { copy(db[4*4096:], filler("page", 4096)); return db },
	} {
		t.Run(strings.ReplaceAll(what, " ", "-"), func(t *testing.T) {
			s := startStock(t, chaosKinds)
			m := startMount(t, s.hub(t)...)
			names, state := fillCatalogue(t, s, m)
			path := filepath.Join(m.cache, "catalog.db")
			db, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, damage(db), 0o600); err != nil {
				t.Fatal(err)
			}
			m.start()
			if what == "one page" {
				// It may be met in use only. fsck finds it, and the next start makes the
				// catalogue again.
				if out, err := exec.Command(binary(t), "fsck", "--mount", m.dir).CombinedOutput(); err != nil {
					t.Logf("fsck: %s", out)
					m.restart()
				}
			}
			set := damagedCatalogues(t, m)
			if len(set) != 1 && what != "one page" {
				t.Errorf("set aside: %v, want one file", set)
			}
			if log, err := os.ReadFile(m.logs); len(set) > 0 && (err != nil || !strings.Contains(string(log), filepath.Base(set[0]))) {
				t.Errorf("the log does not name %v (%v):\n%s", set, err, log)
			}
			if got := m.names(); !slices.Equal(got, names) {
				t.Errorf("there is %v, want %v", got, names)
			}
			w := workload{Mount: m.dir, Repos: []string{"app", "team/app", s.host + "/other"}}
			checkState(t, w, report{Model: state})
			s.check(m)
			m.recountKnown()
			m.restart()
			if got := damagedCatalogues(t, m); len(got) != len(set) {
				t.Errorf("after another start: %v, want %v", got, set)
			}
			m.recountKnown()
		})
	}
}
