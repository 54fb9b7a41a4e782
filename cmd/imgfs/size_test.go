package main

import "testing"

func TestParseSize(t *testing.T) {
	for _, tt := range []struct {
		text string
		want int64 // of a total of 1000
		ok   bool
	}{
		{"1", 1, true},
		{"512", 512, true},
		{"512B", 512, true},
		{"2k", 2048, true},
		{"2K", 2048, true},
		{"2kB", 2000, true},
		{"2KiB", 2048, true},
		{"20GiB", 20 << 30, true},
		{"20 GiB", 20 << 30, true},
		{"1.5M", 3 << 19, true},
		{"3TB", 3e12, true},
		{"30%", 300, true},
		{"0.5 %", 5, true},
		{"100%", 1000, true},
		{"", 0, false},
		{"GiB", 0, false},
		{"-1G", 0, false},
		{"0", 0, false},
		{"0%", 0, false},
		{"0.1B", 0, false},
		{"101%", 0, false},
		{"1e3", 0, false},
		{"0x10", 0, false},
		{"1.2.3G", 0, false},
		{"5 parsecs", 0, false},
		{"%", 0, false},
		{"10%%", 0, false},
		{"10000P", 0, false},
		{"99999999999999999999999999", 0, false},
		{"NaN", 0, false},
		{"Inf", 0, false},
	} {
		got, err := parseSize(tt.text)
		if (err == nil) != tt.ok || got.of(1000) != tt.want {
			t.Errorf("parseSize(%q) = %d, %v, want %d, ok %v", tt.text, got.of(1000), err, tt.want, tt.ok)
		}
	}
}
