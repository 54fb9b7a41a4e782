package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// docs/man is what the commands say of themselves. After a change of a help
// text: make man.
func TestManPages(t *testing.T) {
	dir := t.TempDir()
	if err := writeMan(dir); err != nil {
		t.Fatal(err)
	}
	read := func(dir string) map[string]string {
		pages := map[string]string{}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			text, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			pages[e.Name()] = string(text)
		}
		return pages
	}
	if diff := cmp.Diff(read(dir), read("../../docs/man")); diff != "" {
		t.Errorf("docs/man is not current; run make man (- wanted, + there):\n%s", diff)
	}
}
