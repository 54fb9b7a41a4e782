package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// row is an image as `docker images` shows it; its fields are those of docker's
// templates, and some for programs.
type row struct {
	Repository     string
	Tag            string
	Digest         string
	ID             string
	CreatedSince   string
	CreatedAt      string
	Size           string
	SharedSize     string
	UniqueSize     string
	CompressedSize string
	CachedSize     string

	Bytes      int64 // expanded; -1 while a layer still arrives
	Compressed int64 // in the registry
	Shared     int64 // of Bytes, in layers that another image has too
	Unique     int64 // the rest of Bytes
	Cached     int64 // on this disk
	Platform   string
}

// imageHeadings are what a table of images calls the fields.
var imageHeadings = map[string]string{
	"Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", "ID": "IMAGE ID",
	"CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "Size": "SIZE",
	"SharedSize": "SHARED SIZE", "UniqueSize": "UNIQUE SIZE", "CompressedSize": "COMPRESSED", "CachedSize": "CACHED",
	"Bytes": "BYTES", "Compressed": "COMPRESSED", "Shared": "SHARED", "Unique": "UNIQUE", "Cached": "CACHED",
	"Platform": "PLATFORM",
}

// imagesFlags are the flags of images.
type imagesFlags struct {
	all, quiet, digests, noTrunc, verbose bool
	filters                               []string
	format                                string
}

func newImages() *cobra.Command {
	var f imagesFlags
	cmd := &cobra.Command{
		Use:     "images [flags] [NAME[:TAG]]",
		Aliases: []string{"ls"},
		Short:   "List the images that are here",
		Long: `List the images that are here: those that were pulled, by 'imgfs pull', by mkdir,
or by walking to them. NAME may have *, ? and [a-z].

An image that has lost its last name is dangling: <none>. With -a intermediate
images are shown too: what an image was after each of its layers.

--filter takes dangling=true|false, reference=PATTERN, before=IMAGE or since=IMAGE,
for those created before or after it, and until=TIME, for those created before a
date, a time, or that long ago ("24h"); it may be repeated.

--format takes json, or a Go template with the fields .Repository .Tag .Digest
.ID .CreatedSince .CreatedAt .Size .SharedSize .UniqueSize .CompressedSize
.CachedSize .Platform, and the numbers .Bytes .Compressed .Shared .Unique
.Cached; a template that begins with "table " gets headings.`,
		Example: `  imgfs images
  imgfs images debian
  imgfs images -q --filter dangling=true
  imgfs images --format '{{.Repository}}:{{.Tag}} {{.Size}}'`,
		Args:              takes(0, 1, "NAME[:TAG]"),
		ValidArgsFunction: completeFirst,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				f.filters = append(f.filters, "reference="+args[0])
			}
			return listImages(cmd, f)
		},
	}
	cmd.Flags().BoolVarP(&f.all, "all", "a", false, "show intermediate images too")
	cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, "print image IDs only")
	cmd.Flags().BoolVar(&f.digests, "digests", false, "show digests")
	cmd.Flags().BoolVar(&f.noTrunc, "no-trunc", false, "show IDs in full")
	cmd.Flags().BoolVarP(&f.verbose, "verbose", "v", false, "show compressed, shared, unique and cached sizes")
	cmd.Flags().StringArrayVar(&f.filters, "filter", nil, "show only what `KEY=VALUE` says")
	cmd.Flags().StringVar(&f.format, "format", "", "print each image as json, or by a Go `TEMPLATE`")
	mountFlag(cmd)
	return cmd
}

func listImages(cmd *cobra.Command, f imagesFlags) error {
	wanted, err := parseFilters(f.filters)
	if err != nil {
		return err
	}
	show, err := f.printer()
	if err != nil {
		return err
	}
	mount, err := theMount(cmd)
	if err != nil {
		return err
	}
	if err := wanted.resolve(mount); err != nil {
		return err
	}
	records, err := readImages(mount)
	if err != nil {
		return err
	}
	if f.all {
		between, err := intermediates(mount, records)
		if err != nil {
			return err
		}
		records = append(records, between...)
	}
	return show(cmd.OutOrStdout(), f.rows(records, wanted.keep, time.Now()))
}

// rows are the lines for the records that keep chooses, in docker's order: the
// newest first, then by name.
func (f imagesFlags) rows(records []record, keep func(record) bool, now time.Time) []row {
	tagged := map[string]bool{}
	for _, r := range records {
		if r.Tag != noTag {
			tagged[r.Repository+"\x00"+r.ID] = true
			tagged[r.Repository+"\x00"+r.ID+"\x00"+r.Digest] = true
		}
	}
	var chosen []record
	for _, r := range records {
		// As docker: an image's name by digest is no line of its own beside a tag.
		key := r.Repository + "\x00" + r.ID
		if f.digests {
			key += "\x00" + r.Digest
		}
		if r.Tag == noTag && !r.Dangling && tagged[key] {
			continue
		}
		if keep(r) {
			chosen = append(chosen, r)
		}
	}
	slices.SortStableFunc(chosen, newestFirst)
	rows := make([]row, len(chosen))
	for i, r := range chosen {
		rows[i] = newRow(r, f.noTrunc, now)
	}
	return rows
}

// newestFirst orders images as docker does; images of one time by name, those
// without a name last.
func newestFirst(a, b record) int {
	if c := b.Created.Compare(a.Created); c != 0 {
		return c
	}
	if none := a.Repository == noTag; none != (b.Repository == noTag) {
		if none {
			return 1
		}
		return -1
	}
	if c := strings.Compare(a.Repository, b.Repository); c != 0 {
		return c
	}
	if c := strings.Compare(a.Tag, b.Tag); c != 0 {
		return c
	}
	return strings.Compare(a.ID, b.ID)
}

func newRow(r record, noTrunc bool, now time.Time) row {
	out := row{
		Repository: orNone(r.Repository), Tag: orNone(r.Tag), Digest: orNone(r.Digest), ID: r.ID,
		CreatedSince: createdSince(r.Created, now), CreatedAt: createdAt(r.Created),
		Size: shortSize(r.Size), SharedSize: shortSize(r.Shared), UniqueSize: shortSize(r.Unique),
		CompressedSize: shortSize(r.Compressed), CachedSize: shortSize(r.Cached),
		Bytes: r.Size, Compressed: r.Compressed, Shared: r.Shared, Unique: r.Unique, Cached: r.Cached, Platform: oneLine(r.Platform),
	}
	if r.Dangling {
		out.Digest = noTag
	}
	if !noTrunc {
		out.ID = shortHex(r.ID)
	}
	return out
}

func orNone(s string) string {
	if s == "" {
		return noTag
	}
	return s
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
	}
	table := `{{.Repository}}\t{{.Tag}}\t`
	if f.digests {
		table += `{{.Digest}}\t`
	}
	table += `{{.ID}}\t{{.CreatedSince}}\t{{.Size}}`
	columns := imageHeadings
	if f.verbose {
		columns = maps.Clone(columns)
		columns["SharedSize"], columns["UniqueSize"] = "SHARED", "UNIQUE"
		table += `\t{{.CompressedSize}}\t{{.SharedSize}}\t{{.UniqueSize}}\t{{.CachedSize}}`
	}
	return rowPrinter[row](f.format, table, columns)
}
