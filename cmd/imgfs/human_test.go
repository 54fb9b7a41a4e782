package main

import (
	"testing"
	"time"
)

func TestHumanSize(t *testing.T) {
	for _, tt := range []struct {
		n           int64
		want, short string
	}{
		{0, "0B", "0B"}, {1, "1B", "1B"}, {999, "999B", "999B"}, {1000, "1kB", "1kB"}, {1234, "1.234kB", "1.23kB"},
		{116_800_000, "116.8MB", "117MB"}, {999_600_000, "999.6MB", "1GB"}, {999_949_000, "999.9MB", "1GB"},
		{999_960_000, "1GB", "1GB"}, {1_500_000_000, "1.5GB", "1.5GB"}, {2e15, "2PB", "2PB"},
	} {
		if got := humanSize(tt.n); got != tt.want {
			t.Errorf("humanSize(%d) = %q, want %q", tt.n, got, tt.want)
		}
		if got := shortSize(tt.n); got != tt.short {
			t.Errorf("shortSize(%d) = %q, want %q", tt.n, got, tt.short)
		}
	}
	if got := shortSize(-1); got != "N/A" {
		t.Errorf("shortSize(-1) = %q, want N/A", got)
	}
}

func TestHumanAge(t *testing.T) {
	const day = 24 * time.Hour
	for _, tt := range []struct {
		d    time.Duration
		want string
	}{
		{-time.Hour, "Less than a second"}, {0, "Less than a second"}, {999 * time.Millisecond, "Less than a second"},
		{time.Second, "1 second"}, {45 * time.Second, "45 seconds"},
		{time.Minute, "About a minute"}, {119 * time.Second, "About a minute"}, {2 * time.Minute, "2 minutes"}, {59 * time.Minute, "59 minutes"},
		{time.Hour, "About an hour"}, {89 * time.Minute, "About an hour"}, {90 * time.Minute, "2 hours"},
		{47 * time.Hour, "47 hours"}, {2 * day, "2 days"}, {14*day - time.Hour, "13 days"},
		{14 * day, "2 weeks"}, {60*day - time.Hour, "8 weeks"}, {60 * day, "2 months"},
		{730*day - time.Hour, "24 months"}, {730 * day, "2 years"},
	} {
		if got := humanAge(tt.d); got != tt.want {
			t.Errorf("humanAge(%v) = %q, want %q", tt.d, got, tt.want)
		}
	}
}

func TestEllipsis(t *testing.T) {
	for _, tt := range []struct{ s, want string }{{"", ""}, {"abcde", "abcde"}, {"abcdef", "abcd…"}, {"äöüäöü", "äöüä…"}} {
		if got := ellipsis(tt.s, 5); got != tt.want {
			t.Errorf("ellipsis(%q) = %q, want %q", tt.s, got, tt.want)
		}
	}
}
