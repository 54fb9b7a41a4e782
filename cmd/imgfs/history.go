package main

import (
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
)

// step is one entry of an image's history.json, lowest first.
type step struct {
	Created    time.Time `json:"created"`
	CreatedBy  string    `json:"createdBy"`
	Comment    string    `json:"comment"`
	EmptyLayer bool      `json:"emptyLayer"`
	Size       int64     `json:"size"`  // expanded, of its layer; 0 without one; -1 unknown
	Layer      string    `json:"layer"` // its digest, or ""
}

// stepRow is a step as `docker history` shows it.
type stepRow struct {
	ID           string
	CreatedSince string
	CreatedAt    string
	CreatedBy    string
	Size         string
	Comment      string
	Layer        string
}

var stepHeadings = map[string]string{
	"ID": "IMAGE", "CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "CreatedBy": "CREATED BY", "Size": "SIZE",
	"Comment": "COMMENT", "Layer": "LAYER",
}

// historyFlags are the flags of history.
type historyFlags struct {
	noTrunc, quiet, human bool
	format                string
}

func newHistory() *cobra.Command {
	var f historyFlags
	cmd := &cobra.Command{
		Use:   "history [flags] IMAGE",
		Short: "Show the steps that made an image",
		Long: `Show the steps that made an image, the last one first, as its configuration
records them, with the sizes of their layers.

--format takes json, or a Go template with the fields .ID .CreatedSince
.CreatedAt .CreatedBy .Size .Comment .Layer.`,
		Example: `  imgfs history debian:12
  imgfs history --no-trunc --format '{{.Size}} {{.CreatedBy}}' debian:12`,
		Args:              takes(1, 1, "IMAGE"),
		ValidArgsFunction: completeFirst,
		RunE: func(cmd *cobra.Command, args []string) error {
			show, err := f.printer()
			if err != nil {
				return err
			}
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			img, err := resolve(mount, args[0])
			if err != nil {
				return err
			}
			var steps []step
			if err := readMeta(mount, img.name.path, "history.json", &steps); err != nil {
				return gone(err, img.name)
			}
			return show(cmd.OutOrStdout(), f.rows(img.ID, steps, time.Now()))
		},
	}
	cmd.Flags().BoolVar(&f.noTrunc, "no-trunc", false, "show commands and IDs in full")
	cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, "print image IDs only")
	cmd.Flags().BoolVarP(&f.human, "human", "H", true, "print sizes and times for people; =false: bytes, and times as RFC 3339 has them")
	cmd.Flags().StringVar(&f.format, "format", "", "print each step as json, or by a Go `TEMPLATE`")
	mountFlag(cmd)
	return cmd
}

func (f historyFlags) printer() (func(io.Writer, []stepRow) error, error) {
	if f.quiet {
		if f.format != "" {
			return nil, usagef("-q and --format exclude each other")
		}
		return rowPrinter[stepRow](`{{.ID}}`, "", nil)
	}
	created := "CreatedSince"
	if !f.human {
		created = "CreatedAt"
	}
	return rowPrinter[stepRow](f.format, fmt.Sprintf(`{{.ID}}\t{{.%s}}\t{{.CreatedBy}}\t{{.Size}}\t{{.Comment}}`, created), stepHeadings)
}

// missing is what docker says of the steps of an image that was not built here.
const missing = "<missing>"

// rows are the lines of the steps, the last step first.
func (f historyFlags) rows(id string, steps []step, now time.Time) []stepRow {
	rows := make([]stepRow, len(steps))
	for i, s := range steps {
		r := stepRow{
			ID: missing, CreatedBy: oneLine(s.CreatedBy), Comment: oneLine(s.Comment), Size: shortSize(s.Size), Layer: s.Layer,
			CreatedAt: s.Created.Local().Format(time.RFC3339),
		}
		// As docker: what has no time, or a made up one, has no age.
		if s.Created.Year() >= 2000 {
			r.CreatedSince = createdSince(s.Created, now)
		}
		if s.Created.IsZero() {
			r.CreatedAt = ""
		}
		if i == len(steps)-1 {
			r.ID = id
			if !f.noTrunc {
				r.ID = shortHex(id)
			}
		}
		if !f.human {
			r.Size, r.CreatedSince = strconv.FormatInt(s.Size, 10), r.CreatedAt
		}
		if !f.noTrunc {
			r.CreatedBy = ellipsis(r.CreatedBy, 45)
		}
		rows[len(steps)-1-i] = r
	}
	return rows
}
