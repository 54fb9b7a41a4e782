package fs

import "testing"

func TestRest(t *testing.T) {
	freed := 0
	r := rest{free: func() { freed++ }}
	for i, c := range []struct {
		work int64
		want int // how often memory was given back
	}{{0, 0}, {0, 0}, {5, 0}, {9, 0}, {9, 1}, {9, 1}, {9, 1}, {10, 1}, {10, 2}} {
		if r.tick(c.work); freed != c.want {
			t.Errorf("tick %d: memory given back %d times, want %d", i, freed, c.want)
		}
	}
}
