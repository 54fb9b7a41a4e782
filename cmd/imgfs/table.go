package main

import (
	"encoding/json"
	"io"
	"strings"
	"text/tabwriter"
	"text/template"
)

// rowPrinter returns how rows of T are written: as a table by default, one JSON
// object a line for the format "json", else by a Go template, with headings when
// it begins with "table ". table is the default's template, headings what the
// fields are called in tables.
func rowPrinter[T any](format, table string, headings map[string]string) (func(io.Writer, []T) error, error) {
	switch format {
	case "json":
		return printJSON[T], nil
	case "", "table":
		format = "table " + table
	}
	text, headed := strings.CutPrefix(format, "table ")
	// \t and \n may be spelt out, as shells make it hard to type them.
	text = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(text) + "\n"
	line, err := template.New("format").Funcs(templateFuncs).Parse(text)
	if err == nil {
		var zero T
		err = line.Execute(io.Discard, zero)
	}
	if err != nil {
		return nil, usagef("--format %q: %v", format, err)
	}
	// Columns as wide as docker's.
	return func(w io.Writer, rows []T) error {
		out := tabwriter.NewWriter(w, 10, 1, 3, ' ', 0)
		if headed {
			if err := line.Execute(out, headings); err != nil {
				return err
			}
		}
		for _, r := range rows {
			if err := line.Execute(out, r); err != nil {
				return err
			}
		}
		return out.Flush()
	}, nil
}

func printJSON[T any](w io.Writer, rows []T) error {
	lines := json.NewEncoder(w)
	lines.SetEscapeHTML(false)
	for _, r := range rows {
		if err := lines.Encode(r); err != nil {
			return err
		}
	}
	return nil
}

// templateFuncs are docker's, as far as anybody uses them.
var templateFuncs = template.FuncMap{
	"json": func(v any) (string, error) {
		var out strings.Builder
		e := json.NewEncoder(&out)
		e.SetEscapeHTML(false)
		err := e.Encode(v)
		return strings.TrimSuffix(out.String(), "\n"), err
	},
	"join": func(list any, sep string) string {
		var words []string
		switch list := list.(type) {
		case []string:
			words = list
		case []any:
			for _, v := range list {
				if s, ok := v.(string); ok {
					words = append(words, s)
				}
			}
		}
		return strings.Join(words, sep)
	},
	"split":    strings.Split,
	"lower":    strings.ToLower,
	"upper":    strings.ToUpper,
	"truncate": func(s string, n int) string { return string([]rune(s)[:min(n, len([]rune(s)))]) },
}
