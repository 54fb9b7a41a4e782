package main

import (
	"fmt"
	"strconv"
	"time"
	"unicode/utf8"
)

// humanSize is n bytes as docker prints them in sums: four significant digits,
// powers of 1000.
func humanSize(n int64) string { return humanBytes(n, 4) }

// shortSize is n bytes as docker prints them in lists: three significant digits.
// What is not known yet is N/A.
func shortSize(n int64) string {
	if n < 0 {
		return notKnown
	}
	return humanBytes(n, 3)
}

// longSize is humanSize, but N/A for what is not known yet.
func longSize(n int64) string {
	if n < 0 {
		return notKnown
	}
	return humanBytes(n, 4)
}

// notKnown stands for a size or a time that nobody knows.
const notKnown = "N/A"

func humanBytes(n int64, digits int) string {
	v := float64(n)
	// As 999.96 would print as 1000, the next unit begins half a digit earlier.
	limit := map[int]float64{3: 999.5, 4: 999.95}[digits]
	for _, unit := range []string{"B", "kB", "MB", "GB", "TB"} {
		if v < limit {
			return strconv.FormatFloat(v, 'g', digits, 64) + unit
		}
		v /= 1000
	}
	return strconv.FormatFloat(v, 'g', digits, 64) + "PB"
}

// humanAge is a duration in its largest fitting unit, as docker words it.
func humanAge(d time.Duration) string {
	seconds, minutes, hours := int64(d.Seconds()), int64(d.Minutes()), int64(d.Hours()+0.5)
	switch {
	case seconds < 1:
		return "Less than a second"
	case seconds == 1:
		return "1 second"
	case minutes < 1:
		return fmt.Sprintf("%d seconds", seconds)
	case minutes == 1:
		return "About a minute"
	case minutes < 60:
		return fmt.Sprintf("%d minutes", minutes)
	case hours == 1:
		return "About an hour"
	case hours < 48:
		return fmt.Sprintf("%d hours", hours)
	case hours < 14*24:
		return fmt.Sprintf("%d days", hours/24)
	case hours < 60*24:
		return fmt.Sprintf("%d weeks", hours/24/7)
	case hours < 2*365*24:
		return fmt.Sprintf("%d months", hours/24/30)
	}
	return fmt.Sprintf("%d years", int64(d.Hours())/24/365)
}

// createdSince is how long ago t was. Images made reproducible say 1970, or
// nothing at all: the latter is N/A.
func createdSince(t, now time.Time) string {
	if t.IsZero() {
		return notKnown
	}
	return humanAge(now.Sub(t)) + " ago"
}

// createdAt is t as docker prints it.
func createdAt(t time.Time) string {
	if t.IsZero() {
		return notKnown
	}
	return t.Local().Format("2006-01-02 15:04:05 -0700 MST")
}

// ellipsis is s in at most width characters.
func ellipsis(s string, width int) string {
	if utf8.RuneCountInString(s) <= width {
		return s
	}
	return string([]rune(s)[:width-1]) + "…"
}

// shortHex is what docker shows of a digest or an ID: 12 hexadecimal digits.
func shortHex(id string) string {
	hex := hexOf(id)
	return hex[:min(12, len(hex))]
}
