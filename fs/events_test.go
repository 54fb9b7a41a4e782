package fs

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/imgfs/imgfs/images"
)

func TestEvents(t *testing.T) {
	w, _, _, old := builtWorld(t, Options{})
	f, err := os.Open(w.ctl("events"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	first, err := io.ReadAll(f)
	if err != nil || w.read(w.ctl("events.json")) != string(first) {
		t.Errorf("events = %q, %v, events.json differs", first, err)
	}
	ops := func(data []byte) (ops []string) {
		for line := range strings.Lines(string(data)) {
			var e eventEntry
			if err := json.Unmarshal([]byte(line), &e); err != nil || e.Time.IsZero() {
				t.Errorf("event %q: %v", line, err)
			}
			ops = append(ops, e.Op)
		}
		return ops
	}
	if got := ops(first); !slices.Equal(got, []string{"pull", "pull", "update", "dangling"}) {
		t.Errorf("events = %q", got)
	}
	// Who has it open, as tail -f, sees what comes.
	if err := os.Remove(w.ctl("dangling", hexOf(t, old.ConfigName))); err != nil {
		t.Fatal(err)
	}
	more, err := io.ReadAll(f)
	if got := ops(more); !slices.Equal(got, []string{"delete"}) || err != nil {
		t.Errorf("then = %q, %v", got, err)
	}
}

// The log of events is bounded, and begins with a whole line.
func TestEventsBounded(t *testing.T) {
	var l eventLog
	held, _ := l.contents()
	for i := range 40000 {
		l.add("pull", images.Name{Repo: "app", Tag: fmt.Sprint(i)}, "sha256:0")
		if i == 100 {
			held, _ = l.contents()
		}
	}
	data, _ := l.contents()
	if len(data) > maxEvents || len(data) < maxEvents/3 || data[0] != '{' || !strings.Contains(string(data), "app:39999\"") {
		t.Errorf("%d bytes are kept, from %q", len(data), data[:20])
	}
	if strings.Count(string(held), "\n") != 101 || !strings.Contains(string(held), "app:100\"") {
		t.Error("who reads it does not keep what was there")
	}
}
