package fs

import (
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMeta(t *testing.T) {
	w, app, _, old := builtWorld(t, Options{})
	if got := w.list(w.ctl("meta")); !slices.Equal(got, []string{w.host}) {
		t.Errorf("meta = %q", got)
	}
	if got := w.list(w.ctl("meta", w.host, "app")); !slices.Equal(got, []string{"1", "2"}) {
		t.Errorf("meta/…/app = %q", got)
	}
	m := func(name string) string { return w.read(w.ctl("meta", w.host, "app/1", name)) }
	want := []string{"Dockerfile", "config.json", "created", "digest", "env", "fetched", "fetched.json", "history", "history.json", "id",
		"layers", "layers.json", "manifest.json", "names", "names.json", "size", "size.json"}
	if diff := cmp.Diff(want, w.list(w.ctl("meta", w.host, "app/1"))); diff != "" {
		t.Error(diff)
	}
	config, _ := app.RawConfigFile()
	manifest, _ := app.RawManifest()
	digest := "sha256:" + hexOf(t, app.Digest)
	for name, want := range map[string]string{"digest": digest + "\n", "id": "sha256:" + hexOf(t, app.ConfigName) + "\n",
		"created": "2023-11-14T22:13:20Z\n", "config.json": string(config), "manifest.json": string(manifest),
		"env": "A=b\nEVIL=x y\n", "names": w.host + "/app:1\n"} {
		if got := m(name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	var layers []layerJSON
	w.decode(&layers, "meta", w.host, "app/1/layers.json")
	base := layers[0].Digest
	want2 := "# Rebuilt from the history of sha256:" + hexOf(t, app.ConfigName) + ", which does not say everything.\nFROM scratch\n# ADD layer " +
		base + " /: ADD rootfs.tar /\nCMD [\"sh\"]\nRUN make\n"
	if diff := cmp.Diff(want2, m("Dockerfile")); diff != "" {
		t.Error(diff)
	}
	if len(layers) != 2 || layers[1].Command == nil || !strings.Contains(*layers[1].Command, "make") || layers[0].Expanded != 3000 {
		t.Errorf("layers.json = %+v", layers)
	}
	var steps []step
	w.decode(&steps, "meta", w.host, "app/1/history.json")
	if len(steps) != 3 || steps[0].Layer != base || steps[0].Size != 3000 || !steps[1].EmptyLayer || steps[1].Size != 0 || steps[2].Size != 1000 {
		t.Errorf("history.json = %+v", steps)
	}
	history := strings.Split(strings.TrimSpace(m("history")), "\n")
	if len(history) != 4 || !strings.HasPrefix(history[0], "IMAGE ") || !strings.Contains(history[1], "make") || !strings.HasPrefix(history[3], "<missing>") {
		t.Errorf("history = %q", history)
	}
	var one imageJSON
	w.decode(&one, "meta", w.host, "app/1/size.json")
	if one.Size != 4000 || one.Unique != 1000 || one.Tag != "1" {
		t.Errorf("size.json = %+v", one)
	}
	if got := m("fetched"); !strings.Contains(got, base) || strings.Count(got, "\n") != 3 {
		t.Errorf("fetched =\n%s", got)
	}
	if got := m("size"); !strings.Contains(got, "4000") {
		t.Errorf("size =\n%s", got)
	}
	// By digest, by docker's spelling, and of a dangling image.
	for _, path := range []string{w.host + "/app:1", ".imgfs/dangling/" + hexOf(t, old.ConfigName)} {
		if got := w.read(w.ctl("meta", path, "id")); !strings.HasPrefix(got, "sha256:") {
			t.Errorf("meta/%s/id = %q", path, got)
		}
	}
	if err := os.Symlink("1", w.path("app", "copy")); err != nil {
		t.Fatal(err)
	}
	var names []string
	w.decode(&names, "meta", w.host, "app/copy/names.json")
	if !slices.Equal(names, []string{w.host + "/app:1", w.host + "/app:copy"}) {
		t.Errorf("names.json = %q", names)
	}
	requests := w.requests.Load()
	for _, path := range []string{"x", w.host + "/x", w.host + "/app/x", w.host + "/app/1/x", w.host + "/app:x", ".imgfs/x"} {
		_, err := os.Stat(w.ctl("meta", path))
		w.wantErr("stat meta/"+path, err, syscall.ENOENT)
	}
	if got := w.requests.Load() - requests; got != 0 {
		t.Errorf("walking below meta made %d requests", got)
	}
}
