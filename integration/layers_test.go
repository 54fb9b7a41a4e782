package integration

import (
	"archive/tar"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLayersAsLowerdirs mounts the kernel's overlayfs over .imgfs/layers/* of real
// images, and compares it with the image as the mount merges it.
func TestLayersAsLowerdirs(t *testing.T) {
	for _, image := range []string{"nginx", "python"} {
		t.Run(image, func(t *testing.T) {
			r := startRegistry(t)
			m := startMount(t)
			path := r.push(t, image, "gzip")
			root := m.path(path)
			if _, err := os.Stat(root); err != nil {
				t.Fatal(err)
			}
			merged := m.overlayLayers(path)
			ours, err := takeSnapshot(root, nil)
			if err != nil {
				t.Fatal(err)
			}
			theirs, err := takeSnapshot(merged, nil)
			if err != nil {
				t.Fatal(err)
			}
			reportOverlay(t, compareOverlay(t, image, root, merged, ours, theirs))
		})
	}
}

// overlayLayers mounts overlayfs over the layers of an image that is here.
func (m *mount) overlayLayers(path string) string {
	t := m.t
	t.Helper()
	var layers []layerRow
	m.control("meta/"+path+"/layers.json", &layers)
	top := t.TempDir()
	at := filepath.Join(top, "merged")
	var lower []string
	for i, l := range layers {
		// Links, because the options of a mount are at most a page.
		link := filepath.Join(top, string(rune('a'+i)))
		if err := os.Symlink(m.path(".imgfs/layers", strings.TrimPrefix(l.Key, "sha256:")), link); err != nil {
			t.Fatal(err)
		}
		lower = append(lower, link)
	}
	slices.Reverse(lower)
	empty := filepath.Join(top, "empty") // one lower directory alone is not allowed
	for _, d := range []string{at, empty} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	options := "lowerdir=" + strings.Join(append(lower, empty), ":")
	if err := unix.Mount("overlay", at, "overlay", unix.MS_RDONLY, options); err != nil {
		t.Fatalf("mount -t overlay -o %s: %v", options, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	return at
}

// compareOverlay lists the differences between an image and overlayfs over its
// layers. The exceptions, all of them:
//   - hard links to a file of a lower layer cannot be said in a layer alone: they
//     are left out of it (across);
//   - a directory that no entry of the upper layer describes is made there with
//     the mode and owner of none, where the merge keeps the lower one's (implied);
//   - a name that leads through a symbolic link of a lower layer stands in a
//     directory in the layer alone, and that hides the link (odd/change/link-followed).
func compareOverlay(t *testing.T, image, root, merged string, ours, theirs snapshot) (diffs []string) {
	t.Helper()
	across, implied := layerExceptions(t, image)
	all := maps.Clone(ours)
	maps.Copy(all, theirs)
	implied["."] = true
	for _, name := range []string{"odd/change/link-followed", "odd/change/link-followed/through", "odd/change/target-dir/through"} {
		delete(all, name)
	}
	buf := make([]byte, 1<<20)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		a, here := ours[name]
		b, there := theirs[name]
		add := func(what string, got, want any) {
			diffs = append(diffs, name+": "+what+difference(got, want))
		}
		switch {
		case here && !there && across[name]:
			continue
		case !here || !there:
			add("exists", there, here)
			continue
		}
		if b.isDir() && implied[name] {
			b.stat.Mode, b.stat.Uid, b.stat.Gid, b.stat.Mtim, b.xattrs = a.stat.Mode, a.stat.Uid, a.stat.Gid, a.stat.Mtim, a.xattrs
		}
		for key := range b.xattrs {
			if strings.HasPrefix(key, "trusted.overlay.") || strings.HasPrefix(key, "user.overlay.") {
				add("xattr", key, "none of overlayfs's own")
			}
		}
		compareInode(name, b, a, comparison{}, func(_, what string, got, want any) { add(what, got, want) })
		if !a.isFile() || !b.isFile() {
			continue
		}
		sa, err := checksum(filepath.Join(root, name), buf)
		if err != nil {
			t.Fatal(err)
		}
		sb, err := checksum(filepath.Join(merged, name), buf)
		if err != nil {
			t.Fatal(err)
		}
		if sa != sb {
			add("content", sb, sa)
		}
	}
	return diffs
}

func reportOverlay(t *testing.T, diffs []string) {
	t.Helper()
	if len(diffs) > 0 {
		t.Errorf("%d differences between overlayfs over the layers and the image:\n%s", len(diffs), strings.Join(diffs[:min(25, len(diffs))], "\n"))
	}
}

// layerExceptions finds, from the archives, the names that are hard links to a
// file of a lower layer, and the directories that a layer only implies while a
// lower one has them.
func layerExceptions(t testing.TB, image string) (across, implied map[string]bool) {
	t.Helper()
	across, implied = map[string]bool{}, map[string]bool{}
	for _, layer := range images[image] {
		own, before := map[string]bool{}, map[string]bool{} // in the layer; in it before a link
		list := headers(t, openCorpus(t).tar(t, layer))
		for _, h := range list {
			own[filepath.Clean(h.Name)] = true
		}
		for _, h := range list {
			name := filepath.Clean(h.Name)
			before[name] = true
			if h.Typeflag == tar.TypeLink && (!before[filepath.Clean(h.Linkname)] || across[filepath.Clean(h.Linkname)]) {
				across[name] = true
			}
			for dir := filepath.Dir(name); dir != "." && dir != "/"; dir = filepath.Dir(dir) {
				if !own[dir] {
					implied[dir] = true
				}
			}
		}
	}
	return across, implied
}

func difference(got, want any) string { return fmt.Sprintf(" = %v, want %v", got, want) }
