package fs

import (
	"bytes"
	"errors"
	"strings"
	"syscall"
	"testing"
)

// Neither a name that a caller made up nor a registry's words make lines of their
// own, talk to a terminal or turn what is around them; and they are not kept
// without end.
func TestErrorLogMisleading(t *testing.T) {
	const evil = "a\nb\x1b[2Jc\u009bd\u202ee\u2028f"
	l := &errorLog{}
	l.add(evil, "walk", syscall.EIO, errors.New(evil+strings.Repeat("x", 1<<20)))
	var b bytes.Buffer
	if err := l.text(&b); err != nil {
		t.Fatal(err)
	}
	line, rest, _ := strings.Cut(b.String(), "\n")
	if rest != "" || strings.ContainsFunc(line, misleads) || strings.Count(line, "a b [2Jc d e f") != 2 {
		t.Errorf("text = %.200q", b.String())
	}
	if b.Len() > maxReason+200 {
		t.Errorf("%d bytes of one error are kept", b.Len())
	}
}
