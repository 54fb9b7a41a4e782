package unionfs

import (
	"fmt"
	"strings"
	"testing"
)

// wordsFrom turns bytes into the words of up to six small layers over few names,
// so that layers meet.
func wordsFrom(data []byte) []string {
	next := func() int {
		if len(data) == 0 {
			return 0
		}
		b := data[0]
		data = data[1:]
		return int(b)
	}
	name := func() string { return string("abc"[next()%3]) }
	path := func(deep int) string {
		p := name()
		for n := next() % deep; n > 0; n-- {
			p += "/" + name()
		}
		return p
	}
	layers := make([]string, 1+next()%6)
	for len(data) > 0 {
		k := next() % len(layers)
		var w string
		switch b := next() % 16; {
		case b < 5:
			w = path(3) + "/"
		case b < 8:
			w = path(3)
		case b < 9:
			w = path(2) + "/.wh..wh..opq"
		case b < 11:
			p := path(3)
			i := strings.LastIndex(p, "/") + 1
			w = p[:i] + ".wh." + p[i:]
		case b < 12:
			w = path(3) + "=>" + path(3)
		default:
			target := path(2)
			switch next() % 4 {
			case 0:
				target = "/" + target
			case 1:
				target = "../" + target
			case 2:
				target = "."
			}
			w = path(3) + "->" + target
		}
		layers[k] += w + " "
	}
	return layers
}

// FuzzMerge compares Merge with the naive merge, and what a Stack answers while
// the layers arrive with the Tree.
func FuzzMerge(f *testing.F) {
	for n := range 60 {
		f.Add(randomBytes(uint64(n), 4+2*n))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1000 {
			return
		}
		specs := wordsFrom(data)
		t.Logf("layers: %q", specs)
		compareNaive(t, memLayers(specs...))
		compareStack(t, specs)
	})
}

// TestMergeRandom is FuzzMerge for a fixed set of random layers.
func TestMergeRandom(t *testing.T) {
	for n := range 1000 {
		specs := wordsFrom(randomBytes(uint64(n), 4+n%300))
		if !t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Logf("layers: %q", specs)
			compareNaive(t, memLayers(specs...))
			if n%20 == 0 {
				compareStack(t, specs)
			}
		}) {
			return
		}
	}
}
