package main

import (
	"strings"
	"testing"
	"time"
)

// What an image says of its steps neither talks to a terminal nor makes lines.
func TestHistoryMisleading(t *testing.T) {
	const evil = "a\nb\x1b[2Jc\u202ed"
	rows := historyFlags{noTrunc: true}.rows("sha256:1", []step{{CreatedBy: evil, Comment: evil}}, time.Now())
	if r := rows[0]; r.CreatedBy != "a b [2Jc d" || r.Comment != r.CreatedBy {
		t.Errorf("rows = %+q", rows)
	}
	if got := shownPath("/etc/" + evil); strings.ContainsFunc(got, misleads) || shownPath("/etc/ä b") != "/etc/ä b" {
		t.Errorf("path = %s", got)
	}
}
