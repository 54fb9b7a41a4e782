package images

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"reflect"
	"slices"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/fetch/registrytest"
)

func link(name, target string) *tar.Header {
	e := file(name, "")
	e.Typeflag, e.Linkname = tar.TypeLink, target
	return e
}

// layerRoot is the root of the layer alone whose blob is l.
func (h *hub) layerRoot(l v1.Layer) Ino {
	h.t.Helper()
	root, err := h.LayerRoot(context.Background(), digestOf(h.t, l))
	if err != nil {
		h.t.Fatal(err)
	}
	return root
}

// walk describes everything below dir: path, kind, and what else there is to see.
func (h *hub) walk(dir Ino, path string) (list []string) {
	h.t.Helper()
	ctx := context.Background()
	type sub struct {
		ino  Ino
		name string
	}
	var subs []sub
	if _, err := h.Stat(ctx, dir, &Attr{}); err != nil {
		h.t.Fatal(err)
	}
	// By one at a time: each position must lead to the next name.
	for pos, more := 0, true; more; {
		more = false
		err := h.ReadDir(ctx, dir, pos, func(next int, e Entry, a *Attr) bool {
			if more {
				return false
			}
			pos, more = next, true
			var b, c Attr
			ino, final, err := h.Lookup(ctx, dir, e.Name, &b)
			if err != nil || ino != e.Ino || !final || !reflect.DeepEqual(*a, b) {
				h.t.Errorf("Lookup(%q) = %v %+v, %v, %v, ReadDir says %v %+v", e.Name, ino, b, final, err, e.Ino, *a)
			}
			if final, err := h.Stat(ctx, e.Ino, &c); err != nil || !final || !reflect.DeepEqual(*a, c) {
				h.t.Errorf("Stat(%q) = %+v, %v, ReadDir says %+v", e.Name, c, err, *a)
			}
			text := fmt.Sprintf("%s/%s %o", path, e.Name, a.Mode)
			names, err := h.XattrNames(ctx, e.Ino)
			if err != nil {
				h.t.Error(err)
			}
			for _, n := range names {
				v, ok, err := h.Xattr(ctx, e.Ino, n)
				if err != nil || !ok {
					h.t.Errorf("Xattr(%s, %s) = %v, %v, and it is listed", e.Name, n, ok, err)
				}
				text += " " + n + "=" + v
			}
			list = append(list, text)
			if a.Mode&syscall.S_IFMT == syscall.S_IFDIR {
				subs = append(subs, sub{e.Ino, path + "/" + e.Name})
				if parent, err := h.Parent(ctx, e.Ino); err != nil || parent != dir {
					h.t.Errorf("Parent(%s) = %v, %v, want %v", e.Name, parent, err, dir)
				}
			}
			return true
		})
		if err != nil {
			h.t.Fatal(err)
		}
	}
	for _, d := range subs {
		list = append(list, h.walk(d.ino, d.name)...)
	}
	return list
}

// TestLayerAlone shows a layer with whiteouts, opaque directories, hard links and
// attributes that are overlayfs's own.
func TestLayerAlone(t *testing.T) {
	h := newHub(t)
	base := gzipLayer(t, file("etc/", ""), file("etc/a", "1"), file("etc/b", "2"), file("opt/", ""), file("opt/x", "3"))
	d := file("opt/", "")
	d.PAXRecords["SCHILY.xattr.user.dir"] = "1"
	d.PAXRecords["SCHILY.xattr.trusted.overlay.redirect"] = "/etc"
	e := file("etc/", "")
	e.PAXRecords["SCHILY.xattr.trusted.overlay.opaque"] = "y" // a lie
	top := gzipLayer(t, e, file("etc/.wh.a", ""), file("etc/c", "three"), link("etc/c2", "etc/c"), link("etc/hard", "etc/b"),
		d, file("opt/.wh..wh..opq", ""), file("opt/deep/", ""), file("opt/deep/.wh.y", ""), file("implied/dir/file", "4"))
	h.push("app", "v1", base, top)
	view := h.root(h.name("app", "v1"))
	root := h.layerRoot(top)
	want := []string{
		"/etc 40755",
		"/implied 40755",
		"/opt 40755 trusted.overlay.opaque=y user.dir=1",
		"/etc/a 20000", "/etc/c 100644", "/etc/c2 100644",
		"/implied/dir 40755",
		"/implied/dir/file 100644",
		"/opt/deep 40755",
		"/opt/deep/y 20000",
	}
	if got := h.walk(root, ""); !slices.Equal(got, want) {
		t.Errorf("the layer alone has\n%q, want\n%q", got, want)
	}
	if root.Kind() != KindLayer {
		t.Errorf("kind of the root = %d", root.Kind())
	}
	if p, err := h.Parent(context.Background(), root); p != root || err != nil {
		t.Errorf("Parent of the root = %v, %v", p, err)
	}
	etc := h.lookup(root, "etc")
	if a, b := h.lookup(etc, "c"), h.lookup(h.lookup(view, "etc"), "c"); a != b || a != h.lookup(etc, "c2") {
		t.Errorf("a file is inode %d in the layer and %d in the image", a, b)
	}
	if etc == h.lookup(view, "etc") {
		t.Error("a directory is one inode in the layer and in the image")
	}
	if a, b := h.lookup(etc, "a"), h.lookup(h.lookup(h.lookup(root, "opt"), "deep"), "y"); a != b || !a.isWhiteout() {
		t.Errorf("whiteouts are inodes %d and %d", a, b)
	}
	var a Attr
	if ino, _, err := h.Lookup(context.Background(), etc, "nothing", &a); ino != 0 || err != nil {
		t.Errorf("Lookup of nothing = %v, %v", ino, err)
	}
	if v, ok, err := h.Xattr(context.Background(), etc, "trusted.overlay.opaque"); ok || err != nil {
		t.Errorf("what a layer says of itself is shown: %q, %v", v, err)
	}
	if _, err := h.LayerRoot(context.Background(), hashOf("no layer")); !errors.Is(err, iofs.ErrNotExist) {
		t.Errorf("LayerRoot of no layer = %v", err)
	}
	if _, _, err := h.Lookup(context.Background(), layerIno(maxSeq, 0), "x", &a); !errors.Is(err, ErrStale) {
		t.Errorf("Lookup in no layer = %v", err)
	}
}

// TestLayerAloneWaits opens a layer while it is still arriving.
func TestLayerAloneWaits(t *testing.T) {
	h := newHub(t)
	l := gzipLayer(t, file("rest", noise(4<<20)), file("last", "x"))
	h.push("app", "v1", l)
	stall := &registrytest.Fault{Path: digestOf(t, l).String(), Stall: 1 << 20}
	h.Add(stall)
	h.root(h.name("app", "v1"))
	time.AfterFunc(50*time.Millisecond, stall.Release)
	h.lookup(h.layerRoot(l), "last")
}

// TestLayerAloneReplaced shows a directory that a layer hides and makes anew: it
// hides what is below, as an opaque one.
func TestLayerAloneReplaced(t *testing.T) {
	for name, entries := range map[string][]*tar.Header{
		"whiteout first": {file("etc/", ""), file("etc/.wh.conf", ""), file("etc/conf/", ""), file("etc/conf/new", "1")},
		"whiteout last":  {file("etc/", ""), file("etc/conf/", ""), file("etc/conf/new", "1"), file("etc/.wh.conf", "")},
		"opaque root":    {file(".wh..wh..opq", ""), file("etc/", ""), file("etc/conf/", ""), file("etc/conf/new", "1")},
	} {
		h := newHub(t)
		base := gzipLayer(t, file("etc/", ""), file("etc/conf/", ""), file("etc/conf/old", "0"))
		top := gzipLayer(t, entries...)
		h.push("app", "v1", base, top)
		view := h.root(h.name("app", "v1"))
		if err := h.Settle(context.Background(), view); err != nil {
			t.Fatal(err)
		}
		merged := h.walk(h.lookup(h.lookup(view, "etc"), "conf"), "")
		root := h.layerRoot(top)
		opaque := root
		if name != "opaque root" {
			opaque = h.lookup(h.lookup(root, "etc"), "conf")
		}
		alone := h.walk(h.lookup(h.lookup(root, "etc"), "conf"), "")
		v, ok, err := h.Xattr(context.Background(), opaque, "user.overlay.opaque")
		if !ok || v != "y" || err != nil || len(merged) != 1 || len(alone) != 1 {
			t.Errorf("%s: merged it is %q, alone %q, opaque %q, %v", name, merged, alone, v, err)
		}
	}
}
