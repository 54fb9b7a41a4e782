package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// size is a flag that holds bytes ("20GiB") or a share of a file system ("30%").
// The zero value stands for the default of whoever uses it.
type size struct {
	text    string
	bytes   int64
	percent float64
}

// units are the powers that a size may be given in. One letter is a power of
// 1024, as in coreutils; the SI spelling with a B is one of 1000.
var units = map[string]float64{
	"": 1, "b": 1,
	"k": 1 << 10, "kib": 1 << 10, "kb": 1e3,
	"m": 1 << 20, "mib": 1 << 20, "mb": 1e6,
	"g": 1 << 30, "gib": 1 << 30, "gb": 1e9,
	"t": 1 << 40, "tib": 1 << 40, "tb": 1e12,
	"p": 1 << 50, "pib": 1 << 50, "pb": 1e15,
}

// parseSize reads a size; it must be positive, and a share at most 100%.
func parseSize(s string) (size, error) {
	bad := func(why string) (size, error) {
		return size{}, fmt.Errorf("size %q: %s (write 20GiB, 500M or 30%%)", s, why)
	}
	text := strings.TrimSpace(s)
	digits := strings.TrimRight(text, "%abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
	unit := strings.ToLower(strings.TrimSpace(text[len(digits):]))
	if strings.Trim(digits, "0123456789.") != "" || digits == "" {
		return bad("not a number")
	}
	n, err := strconv.ParseFloat(digits, 64)
	if err != nil {
		return bad("not a number")
	}
	if n <= 0 {
		return bad("must be more than nothing")
	}
	if unit == "%" {
		if n > 100 {
			return bad("more than the whole")
		}
		return size{text: text, percent: n}, nil
	}
	factor, ok := units[unit]
	if !ok {
		return bad(fmt.Sprintf("unknown unit %q", unit))
	}
	if n*factor >= math.MaxInt64 {
		return bad("too large")
	}
	if n*factor < 1 {
		return bad("less than a byte")
	}
	return size{text: text, bytes: int64(n * factor)}, nil
}

// of is the size in bytes, where 100% is total.
func (s size) of(total int64) int64 {
	if s.percent > 0 {
		return int64(float64(total) / 100 * s.percent)
	}
	return s.bytes
}

// Set makes size a flag's value.
func (s *size) Set(text string) error {
	v, err := parseSize(text)
	if err != nil {
		return err
	}
	*s = v
	return nil
}

func (s *size) String() string { return s.text }

// Type names the value in help texts.
func (s *size) Type() string { return "SIZE" }
