package integration

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The diagram of docs/architecture.md: which rooms a room may import. To change
// it is a design decision (docs/decisions.md), never a way to mend a build.
var diagram = map[string][]string{
	"cmd/imgfs":   {"fs", "images"},
	"fs":          {"images"},
	"images":      {"fetch", "unionfs", "cache"},
	"fetch":       {"unionfs", "cache"},
	"unionfs":     {},
	"cache":       {},
	"integration": {},
}

// Heavy libraries, and the only rooms (or files of a room) that import them.
// Tests may use them everywhere.
var heavy = []struct {
	prefix string
	where  []string
}{
	{"github.com/hanwen/go-fuse/", []string{"fs"}},
	{"go.etcd.io/bbolt", []string{"images"}},
	{"github.com/containerd/containerd/", []string{"fetch/hosts.go"}},
	{"github.com/containerd/stargz-snapshotter/", []string{"fetch", "cmd/imgfs/demoimage.go"}},
	{"github.com/klauspost/compress/", []string{"fetch"}},
	{"github.com/google/go-containerregistry/pkg/registry", []string{"cmd/imgfs"}},
	{"github.com/google/go-containerregistry/pkg/v1/remote", []string{"fetch", "cmd/imgfs"}},
	{"github.com/spf13/cobra/doc", []string{"cmd/imgfs/man.go"}},
	{"github.com/spf13/", []string{"cmd/imgfs"}},
	{"github.com/vbauerster/mpb/", []string{"cmd/imgfs"}},
	{"github.com/coreos/go-systemd/", []string{"cmd/imgfs"}},
	{"github.com/pelletier/go-toml/", []string{"cmd/imgfs"}},
	{"github.com/prometheus/", []string{"cmd/imgfs"}},
}

// Rooms that make do with the standard library and these.
var frugal = map[string][]string{
	"unionfs": {"golang.org/x/sys/", "golang.org/x/sync/"},
}

const (
	maxFileLines = 600
	maxFuncLines = 100
)

// vague names of packages, which say nothing of what is in them.
var vague = []string{"util", "utils", "common", "types", "helpers", "manager", "misc"}

// goPackage is what `go list -json` tells.
type goPackage struct {
	ImportPath, Dir, Name              string
	GoFiles, TestGoFiles, XTestGoFiles []string
	Imports, TestImports, XTestImports []string
	Module                             struct{ Path string }
}

func (p goPackage) rel() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, p.Module.Path), "/")
}

// roomOf is the room that a package of the module belongs to.
func roomOf(rel string) string {
	first, rest, _ := strings.Cut(rel, "/")
	if first == "cmd" {
		second, _, _ := strings.Cut(rest, "/")
		return "cmd/" + second
	}
	return first
}

// forTests reports whether a package is there for tests only (xxxtest).
func forTests(rel string) bool { return strings.HasSuffix(path.Base(rel), "test") }

func listPackages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json", "./...")
	cmd.Dir = ".."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := dec.Decode(&p); err == io.EOF {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

func TestRoomsDiagram(t *testing.T) {
	for _, p := range listPackages(t) {
		rel := p.rel()
		room := roomOf(rel)
		below, ok := diagram[room]
		if !ok {
			t.Errorf("%s: %q is no room of the diagram", p.ImportPath, room)
			continue
		}
		if slices.Contains(vague, p.Name) {
			t.Errorf("%s: the name %q says nothing", p.ImportPath, p.Name)
		}
		check := func(imports []string, test bool) {
			for _, imp := range imports {
				to, ok := strings.CutPrefix(imp, p.Module.Path+"/")
				if !ok {
					continue
				}
				if forTests(to) && !test && !forTests(rel) {
					t.Errorf("%s imports %s, which is for tests", rel, to)
				}
				if to := roomOf(to); to != room && !slices.Contains(below, to) {
					t.Errorf("%s imports %s: room %s may import %v", rel, to, room, below)
				}
			}
		}
		check(p.Imports, false)
		check(p.TestImports, true)
		check(p.XTestImports, true)
	}
}

func TestRoomsLibraries(t *testing.T) {
	for _, p := range listPackages(t) {
		rel := p.rel()
		if forTests(rel) {
			continue
		}
		for _, name := range p.GoFiles {
			file := path.Join(rel, name)
			for _, imp := range importsOf(t, filepath.Join(p.Dir, name)) {
				if imp == "testing" || strings.HasPrefix(imp, "testing/") {
					t.Errorf("%s imports %s outside a test", file, imp)
				}
				for _, h := range heavy {
					if !strings.HasPrefix(imp, h.prefix) {
						continue
					}
					if !slices.ContainsFunc(h.where, func(w string) bool { return w == file || w == roomOf(rel) }) {
						t.Errorf("%s imports %s, which belongs to %v", file, imp, h.where)
					}
				}
				if err := frugality(roomOf(rel), p.Module.Path, imp); err != nil {
					t.Errorf("%s: %v", file, err)
				}
			}
		}
	}
}

// frugality says why a room that lives of the standard library may not import imp.
func frugality(room, module, imp string) error {
	allowed, ok := frugal[room]
	first, _, _ := strings.Cut(imp, "/")
	if !ok || !strings.Contains(first, ".") || strings.HasPrefix(imp, module+"/") {
		return nil
	}
	if slices.ContainsFunc(allowed, func(a string) bool { return strings.HasPrefix(imp, a) }) {
		return nil
	}
	return fmt.Errorf("imports %s: room %s makes do with the standard library and %v", imp, room, allowed)
}

func importsOf(t *testing.T, file string) []string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, imp := range f.Imports {
		paths = append(paths, strings.Trim(imp.Path.Value, `"`))
	}
	return paths
}

func TestRoomsSizes(t *testing.T) {
	for _, p := range listPackages(t) {
		for _, name := range slices.Concat(p.GoFiles, p.TestGoFiles, p.XTestGoFiles) {
			rel := path.Join(p.rel(), name)
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, filepath.Join(p.Dir, name), nil, parser.SkipObjectResolution)
			if err != nil {
				t.Error(err)
				continue
			}
			if n := fset.File(f.FileStart).LineCount(); n > maxFileLines {
				t.Errorf("%s has %d lines, more than %d", rel, n, maxFileLines)
			}
			for _, d := range f.Decls {
				fn, ok := d.(*ast.FuncDecl)
				if !ok {
					continue
				}
				if n := fset.Position(fn.End()).Line - fset.Position(fn.Pos()).Line + 1; n > maxFuncLines {
					t.Errorf("%s: %s has %d lines, more than %d", rel, fn.Name.Name, n, maxFuncLines)
				}
				if fn.Recv == nil && fn.Name.Name == "init" {
					t.Errorf("%s: has an init function", rel)
				}
			}
		}
	}
}
