package unionfs

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

// TestStackConcurrent reads a stack while its layers are built, waits where it is
// told to, and compares all answers with the tree.
func TestStackConcurrent(t *testing.T) {
	var specs []string
	for k := range 4 {
		var b strings.Builder
		b.WriteString("d/ ")
		for i := range 300 {
			switch (i + k) % 5 {
			case 0:
				fmt.Fprintf(&b, "d/f%d ", i)
			case 1:
				fmt.Fprintf(&b, "d/.wh.f%d ", i)
			case 2:
				fmt.Fprintf(&b, "d/f%d/ d/f%d/x%d ", i, i, k)
			}
		}
		specs = append(specs, b.String())
	}
	tree, err := mergeTree(t, realLayers(t, specs...))
	if err != nil {
		t.Fatal(err)
	}
	builders := make([]wordLayer, len(specs))
	stack := make(Stack, len(specs))
	for k := range specs {
		builders[k] = newWordLayer(t)
		stack[k] = builders[k]
	}
	var wg sync.WaitGroup
	for k, l := range builders {
		wg.Go(func() {
			for _, w := range strings.Fields(specs[k]) {
				l.add(w)
			}
			l.finish()
		})
	}
	lookup := func(dir Ref, name string) (Ref, bool) {
		for {
			changed := make([]<-chan struct{}, len(stack))
			for k := range stack {
				changed[k] = builders[k].Changed()
			}
			ref, ok, wait, err := stack.Lookup(dir, name)
			if err != nil || wait == len(stack) {
				t.Errorf("Lookup(%q) = wait %d, %v", name, wait, err)
				return ref, false
			}
			if wait < 0 {
				return ref, ok
			}
			<-changed[wait]
		}
	}
	for r := range 2 {
		wg.Go(func() {
			d, ok := lookup(tree.Root(), "d")
			if !ok {
				t.Errorf("no d")
				return
			}
			for i := range 300 {
				i = (i + 150*r) % 300
				name := fmt.Sprintf("f%d", i)
				ref, ok := lookup(d, name)
				want, wok, _ := tree.Lookup(d, name)
				if ref != want || ok != wok {
					t.Errorf("Lookup(%q) = %v, %v, tree: %v, %v", name, ref, ok, want, wok)
				}
				for k := 0; ok && ref.ID.IsDir() && k < len(specs); k++ {
					name := fmt.Sprintf("x%d", k)
					got, ok := lookup(ref, name)
					if want, wok, _ := tree.Lookup(ref, name); got != want || ok != wok {
						t.Errorf("Lookup(f%d/%s) = %v, %v, tree: %v, %v", i, name, got, ok, want, wok)
					}
				}
			}
		})
	}
	wg.Wait()
}
