package main

import (
	"encoding/json"
	"fmt"
	"io"
	"path"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"

	"github.com/spf13/cobra"
)

// row is an image as `docker images` shows it; its fields are those of docker's
// templates, and some numbers for programs.
type row struct {
	Repository   string
	Tag          string
	Digest       string
	ID           string
	CreatedSince string
	CreatedAt    string
	Size         string

	Bytes      int64 // expanded; -1 while a layer still arrives
	Compressed int64 // in the registry
}

// imagesFlags are the flags of images.
type imagesFlags struct {
	quiet, digests, noTrunc bool
	format                  string
}

func newImages() *cobra.Command {
	var f imagesFlags
	cmd := &cobra.Command{
		Use:     "images [flags] [NAME[:TAG]]",
		Aliases: []string{"ls"},
		Short:   "List the images that are here",
		Long: `List the images that are here: those that were pulled, by 'imgfs pull', by mkdir,
or by walking to them. NAME may have *, ? and [a-z].

--format takes json, or a Go template with the fields .Repository .Tag .Digest
.ID .CreatedSince .CreatedAt .Size, and the numbers .Bytes .Compressed;
a template that begins with "table " gets headings.`,
		Example: `  imgfs images
  imgfs images debian
  imgfs images --format '{{.Repository}}:{{.Tag}} {{.Size}}'`,
		Args:              takes(0, 1, "NAME[:TAG]"),
		ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			pattern := ""
			if len(args) == 1 {
				pattern = args[0]
			}
			return listImages(cmd, f, pattern)
		},
	}
	cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, "print image IDs only")
	cmd.Flags().BoolVar(&f.digests, "digests", false, "show digests")
	cmd.Flags().BoolVar(&f.noTrunc, "no-trunc", false, "show IDs in full")
	cmd.Flags().StringVar(&f.format, "format", "", "print each image as json, or by a Go `TEMPLATE`")
	mountFlag(cmd)
	return cmd
}

func listImages(cmd *cobra.Command, f imagesFlags, pattern string) error {
	keep, err := filter(pattern)
	if err != nil {
		return err
	}
	print, err := f.printer()
	if err != nil {
		return err
	}
	mount, err := theMount(cmd)
	if err != nil {
		return err
	}
	records, err := readImages(mount)
	if err != nil {
		return err
	}
	var rows []row
	now := time.Now()
	for _, r := range records {
		if keep(r) {
			rows = append(rows, newRow(r, f.noTrunc, now))
		}
	}
	return print(cmd.OutOrStdout(), rows)
}

// filter is the condition that NAME[:TAG] stands for: a name without a tag means
// all its tags.
func filter(pattern string) (func(record) bool, error) {
	if pattern == "" {
		return func(record) bool { return true }, nil
	}
	if _, err := path.Match(pattern, ""); err != nil {
		return nil, usagef("pattern %q: %v", pattern, err)
	}
	full := pattern
	full = strings.TrimPrefix(full, "docker.io/")
	full = strings.TrimPrefix(full, "library/")
	return func(r record) bool {
		repo, _ := path.Match(full, r.Repository)
		tagged, _ := path.Match(full, r.ref())
		return repo || tagged
	}, nil
}

func newRow(r record, noTrunc bool, now time.Time) row {
	out := row{
		Repository: orNone(r.Repository), Tag: orNone(r.Tag), Digest: orNone(r.Digest), ID: r.ID,
		CreatedSince: "N/A", CreatedAt: "N/A",
		Size: humanSize(r.Size), Bytes: r.Size, Compressed: r.Compressed,
	}
	if r.Size < 0 {
		out.Size = "N/A"
	}
	if hex := strings.TrimPrefix(r.ID, "sha256:"); !noTrunc && len(hex) > 12 {
		out.ID = hex[:12]
	}
	// Images made reproducible say 1970, or nothing at all.
	if !r.Created.IsZero() {
		out.CreatedSince = humanAge(now.Sub(r.Created)) + " ago"
		out.CreatedAt = r.Created.Local().Format("2006-01-02 15:04:05 -0700 MST")
	}
	return out
}

func orNone(s string) string {
	if s == "" {
		return noTag
	}
	return s
}

// humanAge is a duration in its largest fitting unit, as docker words it.
func humanAge(d time.Duration) string {
	const day = 24 * time.Hour
	for _, u := range []struct {
		name string
		size time.Duration
		from time.Duration
	}{
		{"year", 365 * day, 2 * 365 * day},
		{"month", 30 * day, 60 * day},
		{"week", 7 * day, 14 * day},
		{"day", day, 2 * day},
		{"hour", time.Hour, time.Hour},
		{"minute", time.Minute, time.Minute},
	} {
		if d < u.from {
			continue
		}
		if n := int64(d / u.size); n > 1 {
			return fmt.Sprintf("%d %ss", n, u.name)
		}
		return "1 " + u.name
	}
	return "a moment"
}

// printer is how rows are to be written.
func (f imagesFlags) printer() (func(io.Writer, []row) error, error) {
	switch {
	case f.quiet && f.format != "":
		return nil, usagef("-q and --format exclude each other")
	case f.quiet:
		return func(w io.Writer, rows []row) error {
			for _, r := range rows {
				if _, err := fmt.Fprintln(w, r.ID); err != nil {
					return err
				}
			}
			return nil
		}, nil
	case f.format == "json":
		return func(w io.Writer, rows []row) error {
			lines := json.NewEncoder(w)
			for _, r := range rows {
				if err := lines.Encode(r); err != nil {
					return err
				}
			}
			return nil
		}, nil
	case f.format != "":
		return templatePrinter(f.format)
	}
	digest := ""
	if f.digests {
		digest = "{{.Digest}}\t"
	}
	return templatePrinter("table {{.Repository}}\t{{.Tag}}\t" + digest + "{{.ID}}\t{{.CreatedSince}}\t{{.Size}}")
}

// headings are what a table calls the fields.
var headings = map[string]string{
	"Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", "ID": "IMAGE ID",
	"CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "Size": "SIZE",
	"Bytes": "BYTES", "Compressed": "COMPRESSED",
}

// templatePrinter writes a line for each row by a Go template; \t and \n in it
// may be spelt out, as shells make it hard to type them.
func templatePrinter(format string) (func(io.Writer, []row) error, error) {
	text, table := strings.CutPrefix(format, "table ")
	text = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(text) + "\n"
	line, err := template.New("format").Funcs(template.FuncMap{
		"json": func(v any) (string, error) {
			out, err := json.Marshal(v)
			return string(out), err
		},
		"lower": strings.ToLower,
		"upper": strings.ToUpper,
	}).Parse(text)
	if err == nil {
		err = line.Execute(io.Discard, row{})
	}
	if err != nil {
		return nil, usagef("--format %q: %v", format, err)
	}
	return func(w io.Writer, rows []row) error {
		out := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		if table {
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
