package main

import (
	"fmt"
	"io"
	"strings"
	"text/template"
)

// linePrinter is how a command writes its rows one by one: as json, by a Go
// template, or, when format is empty, as plain does.
func linePrinter[T any](format string, plain func(io.Writer, T) error) (func(io.Writer, T) error, error) {
	switch format {
	case "":
		return plain, nil
	case "json":
		return func(w io.Writer, row T) error { return printJSON(w, []T{row}) }, nil
	}
	// Shells make it hard to type a tab or a newline.
	text := strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(format) + "\n"
	line, err := template.New("format").Funcs(templateFuncs).Parse(text)
	if err == nil {
		var zero T
		err = line.Execute(io.Discard, zero)
	}
	if err != nil {
		return nil, usagef("--format %q: %v", format, err)
	}
	return func(w io.Writer, row T) error {
		if err := line.Execute(w, row); err != nil {
			return fmt.Errorf("--format %q: %w", format, err)
		}
		return nil
	}, nil
}
