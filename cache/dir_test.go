package cache

import (
	"bytes"
	"crypto/sha256"
	"errors"
	iofs "io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func tree(t *testing.T, dir string) string {
	t.Helper()
	var names []string
	filepath.WalkDir(dir, func(path string, d iofs.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, path)
		names = append(names, rel)
		return err
	})
	sort.Strings(names)
	return strings.Join(names, " ")
}

func TestOpenRefuses(t *testing.T) {
	write := func(name, data string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, tt := range []struct {
		name  string
		setup func(t *testing.T, dir string)
		want  error
	}{
		{"newer version", write("version", "2\n"), ErrVersion},
		{"unreadable version", write("version", "one\n"), iofs.ErrInvalid},
		{"version 0", write("version", "0\n"), iofs.ErrInvalid},
		{"somebody's files", write("thesis.tex", "x"), iofs.ErrInvalid},
		{"lock alone", write("lock", ""), nil},
		{"crash before the version", write("version.new", "1"), nil},
		{"empty", func(*testing.T, string) {}, nil},
		{"a file", func(t *testing.T, dir string) { os.Remove(dir); os.WriteFile(dir, nil, 0o600) }, errAny},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "cache")
			os.Mkdir(dir, 0o700)
			tt.setup(t, dir)
			before := tree(t, dir)
			c, err := Open(dir, Options{})
			if err == nil {
				defer c.Close()
			}
			if tt.want == errAny && err != nil {
				return
			}
			if !errors.Is(err, tt.want) {
				t.Fatalf("Open = %v, want %v", err, tt.want)
			}
			if after := tree(t, dir); err != nil && after != before {
				t.Errorf("refused directory was touched: %s, was %s", after, before)
			}
		})
	}
}

var errAny = errors.New("any")

func TestSecondServer(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{})
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrInUse) {
		t.Fatalf("second Open = %v, want ErrInUse", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, dir, Options{})
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{})
	p := pack(t, c, "a")
	if err := put(t, p, "a", 0, 0, 100); err != nil {
		t.Fatal(err)
	}
	c.Close()
	hex := hashN("b").Hex
	for _, name := range []string{"tmp/x", "packs/" + hex + ".pack", "packs/" + hashN("c").Hex + ".map", "packs/README"} {
		os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600)
	}
	os.MkdirAll(filepath.Join(dir, "tmp/d/e"), 0o700)
	c = open(t, dir, Options{})
	a := hashN("a").Hex
	want := "packs packs/README packs/" + a + ".map packs/" + a + ".pack"
	if got := tree(t, dir); !strings.Contains(got, want) || strings.Contains(got, "tmp/") {
		t.Errorf("after the sweep: %s", got)
	}
	if got := c.Packs(); len(got) != 1 || got[hashN("a")] != 4096 {
		t.Errorf("Packs() = %v", got)
	}
}

func TestBlob(t *testing.T) {
	c := open(t, t.TempDir(), Options{})
	data := []byte("manifest")
	h := key(sha256.Sum256(data)).hash()
	if _, ok, err := c.Blob(h); ok || err != nil {
		t.Errorf("Blob(missing) = %v, %v", ok, err)
	}
	if err := c.PutBlob(h, []byte("other")); !errors.Is(err, ErrDigest) {
		t.Errorf("PutBlob(wrong) = %v, want ErrDigest", err)
	}
	if err := c.PutBlob(h, data); err != nil {
		t.Fatal(err)
	}
	if got, ok, err := c.Blob(h); !ok || err != nil || !bytes.Equal(got, data) {
		t.Errorf("Blob = %q, %v, %v", got, ok, err)
	}
	os.WriteFile(c.Path(Blob, h), []byte("manifesT"), 0o600)
	if _, ok, err := c.Blob(h); ok || err != nil || c.Has(Blob, h) {
		t.Errorf("Blob(damaged) = %v, %v, Has = %v", ok, err, c.Has(Blob, h))
	}
	for _, h := range []v1.Hash{{}, {Algorithm: "sha512", Hex: h.Hex}, {Algorithm: "sha256", Hex: "../../etc/passwd"}, {Algorithm: "sha256", Hex: strings.ToUpper(h.Hex)}} {
		if err := c.PutBlob(h, data); !errors.Is(err, iofs.ErrInvalid) {
			t.Errorf("PutBlob(%v) = %v, want ErrInvalid", h, err)
		}
		if _, err := c.Pack(h); !errors.Is(err, iofs.ErrInvalid) && h.Hex != "" {
			t.Errorf("Pack(%v) = %v, want ErrInvalid", h, err)
		}
		if c.Path(Index, h) != "" || c.Has(Index, h) {
			t.Errorf("Path(%v) = %q", h, c.Path(Index, h))
		}
	}
}

func TestInstall(t *testing.T) {
	c := open(t, t.TempDir(), Options{})
	h := hashN("layer")
	broken := errors.New("broken")
	err := c.Install(Index, h, func(f *os.File) error { f.WriteString("half"); return broken })
	if !errors.Is(err, broken) || c.Has(Index, h) || strings.Contains(tree(t, c.dir), "tmp/") {
		t.Errorf("Install(broken) = %v; %s", err, tree(t, c.dir))
	}
	for _, text := range []string{"one", "two"} {
		if err := c.Install(Index, h, func(f *os.File) error { _, err := f.WriteString(text); return err }); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(c.Path(Index, h)); string(got) != text {
			t.Errorf("installed %q, want %q", got, text)
		}
	}
	if err := c.Install(Blob, h, func(f *os.File) error { return nil }); !errors.Is(err, ErrDigest) {
		t.Errorf("Install(Blob, wrong) = %v, want ErrDigest", err)
	}
	if err := c.Remove(Index, h); err != nil || c.Has(Index, h) {
		t.Errorf("Remove = %v", err)
	}
	if err := c.Remove(Index, h); err != nil {
		t.Errorf("Remove(missing) = %v", err)
	}
}
