package unionfs

import (
	"slices"
	"strings"
	"testing"
)

// liveLayer is a layer to which words are added.
type liveLayer interface {
	Layer
	add(word string)
	finish()
}

// compareStack feeds layers word by word, in turns, and compares everything that
// a Stack answers on the way with the tree of the finished layers.
func compareStack(t testing.TB, specs []string) {
	t.Helper()
	specs = slices.Clone(specs)
	for k, spec := range specs {
		specs[k] = withoutReplaced(spec)
	}
	if tree, err := mergeTree(t, memLayers(specs...)); err == nil {
		feedStack(t, specs, tree, func() liveLayer { return newMemLayer() })
	}
}

// feedStack is compareStack with layers of any kind.
func feedStack(t testing.TB, specs []string, tree *Tree, newLayer func() liveLayer) {
	t.Helper()
	links := strings.Contains(strings.Join(specs, ""), "=>")
	for _, order := range []string{"top", "bottom", "turns"} {
		live := make([]liveLayer, len(specs))
		words := make([][]string, len(specs))
		stack := make(Stack, len(specs))
		for k, spec := range specs {
			live[k], words[k] = newLayer(), strings.Fields(spec)
			stack[k] = live[k]
		}
		for left := len(specs); left > 0; {
			for i := range specs {
				k := i
				if order == "top" {
					k = len(specs) - 1 - i
				}
				for !live[k].Done() {
					if len(words[k]) > 0 {
						live[k].add(words[k][0])
						words[k] = words[k][1:]
					} else {
						live[k].finish()
						left--
					}
					stackAgrees(t, stack, tree, left == 0, links)
					if order == "turns" {
						break
					}
				}
			}
		}
	}
}

// withoutReplaced leaves out words that give a name another inode: what a Stack
// said of it is taken back then, and Builder.Replaced tells.
func withoutReplaced(spec string) string {
	l, kept := newMemLayer(), ""
	for _, w := range strings.Fields(spec) {
		if l.add(w); l.replaced {
			l = newMemLayer()
			for _, w := range strings.Fields(kept) {
				l.add(w)
			}
			continue
		}
		kept += w + " "
	}
	return kept
}

// stackAgrees walks what stack shows and compares it with tree. done says that
// all layers are; hard, that some answers may be left to the merge even so.
func stackAgrees(t testing.TB, stack Stack, tree *Tree, done, hard bool) {
	t.Helper()
	for _, l := range stack[1:] {
		hard = hard || l.HasImplicit()
	}
	names := map[string]bool{"none": true}
	walkTree(t, tree, func(p string, _ Ref) { names[p[strings.LastIndex(p, "/")+1:]] = true })
	var walk func(p string, dir Ref)
	walk = func(p string, dir Ref) {
		var got, want Attr
		final, err := stack.Attr(dir, &got)
		if err != nil {
			t.Fatalf("Stack.Attr(%q) = %v", p, err)
		}
		if err := tree.Attr(dir, &want); err != nil || final && got != want {
			t.Errorf("Stack.Attr(%q) = %+v, tree: %+v, %v", p, got, want, err)
		}
		if !dir.ID.IsDir() {
			return
		}
		for name := range names {
			ref, ok, wait, err := stack.Lookup(dir, name)
			if err != nil {
				t.Fatalf("Stack.Lookup(%q, %q) = %v", p, name, err)
			}
			if wait >= 0 {
				switch {
				case wait < len(stack) && stack[wait].Done():
					t.Errorf("Stack.Lookup(%q, %q) waits for layer %d, which is done", p, name, wait)
				case wait == len(stack) && (!done || !hard):
					t.Errorf("Stack.Lookup(%q, %q) leaves it to the merge", p, name)
				}
				continue
			}
			wref, wok, err := tree.Lookup(dir, name)
			if ref != wref || ok != wok || err != nil {
				t.Errorf("Stack.Lookup(%q, %q) = %v, %v, tree: %v, %v, %v", p, name, ref, ok, wref, wok, err)
			}
			if ok && wok {
				walk(p+"/"+name, ref)
			}
		}
	}
	walk("", tree.Root())
}
