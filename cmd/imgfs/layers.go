package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// sharing is a layer with those of the images asked for that have it.
type sharing struct {
	layer
	In []string `json:"in"` // images, as they were named
}

func newLayers() *cobra.Command {
	var noTrunc bool
	var format string
	cmd := &cobra.Command{
		Use:   "layers [flags] IMAGE…",
		Short: "Show which layers images have, and share",
		Long: `Show the layers of images, the lowest first: a line for each layer, a column for
each image that says whether it has the layer. IMAGES counts all images here that
have it; the last line sums up, and says how much of it several of these images have.

--format takes json, or a Go template with the fields .Digest .DiffID .Images
.Expanded .Compressed .Cached .Method .State .Command .In.`,
		Example: `  imgfs layers debian:12
  imgfs layers nginx redis`,
		Args:              takes(1, math.MaxInt, "IMAGE"),
		ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			show := func(w io.Writer, rows []sharing) error { return printMatrix(w, args, rows, noTrunc) }
			if format != "" && format != "table" {
				var err error
				if show, err = rowPrinter[sharing](format, "", layerFields); err != nil {
					return err
				}
			}
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			rows, err := sharings(mount, args)
			if err != nil {
				return err
			}
			return show(cmd.OutOrStdout(), rows)
		},
	}
	cmd.Flags().BoolVar(&noTrunc, "no-trunc", false, "show digests and commands in full")
	cmd.Flags().StringVar(&format, "format", "", "print each layer as json, or by a Go `TEMPLATE`")
	mountFlag(cmd)
	return cmd
}

// layerFields are the headings of the fields of a sharing.
var layerFields = map[string]string{
	"Key": "KEY", "Digest": "DIGEST", "DiffID": "DIFF ID", "MediaType": "MEDIA TYPE", "Images": "IMAGES",
	"Compressed": "COMPRESSED", "Expanded": "SIZE", "Usage": "USAGE", "Cached": "CACHED", "Method": "METHOD",
	"Lazy": "LAZY", "Why": "WHY", "State": "STATE", "Command": "COMMAND", "In": "IN",
}

// sharings are the layers of the images that args name, each once: those of the
// first image in its order, then what the others add.
func sharings(mount string, args []string) ([]sharing, error) {
	var rows []sharing
	for _, arg := range args {
		img, err := resolve(mount, arg)
		if err != nil {
			return nil, err
		}
		var layers []layer
		if err := readMeta(mount, img.name.path, "layers.json", &layers); err != nil {
			return nil, gone(err, img.name)
		}
		for _, l := range layers {
			i := slices.IndexFunc(rows, func(r sharing) bool { return r.Key == l.Key })
			if i < 0 {
				rows = append(rows, sharing{layer: l})
				i = len(rows) - 1
			}
			if !slices.Contains(rows[i].In, arg) {
				rows[i].In = append(rows[i].In, arg)
			}
		}
	}
	return rows, nil
}

// printMatrix writes the layers with a column for each image, and below it what
// is shared.
func printMatrix(w io.Writer, args []string, rows []sharing, noTrunc bool) error {
	var names []string
	for _, arg := range args {
		if !slices.Contains(names, arg) {
			names = append(names, arg)
		}
	}
	out := tabwriter.NewWriter(w, 10, 1, 3, ' ', 0)
	fmt.Fprintf(out, "LAYER\tSIZE\tCOMPRESSED\tCACHED\tIMAGES\t%s\tCOMMAND\n", strings.Join(names, "\t"))
	sums := map[string]int64{} // by what the line is called
	for _, r := range rows {
		digest, command := shortHex(r.Digest), oneLine(r.Command)
		if noTrunc {
			digest = r.Digest
		} else {
			command = ellipsis(command, 45)
		}
		fmt.Fprintf(out, "%s\t%s\t%s\t%s\t%d", digest, shortSize(r.Expanded), shortSize(r.Compressed), shortSize(r.Cached), r.Images)
		for _, name := range names {
			mark := "-"
			if slices.Contains(r.In, name) {
				mark = "x"
			}
			fmt.Fprintf(out, "\t%s", mark)
		}
		fmt.Fprintf(out, "\t%s\n", command)
		size := max(r.Expanded, 0)
		sums["total"] += size
		if len(r.In) > 1 {
			sums["shared"] += size
		}
	}
	if err := out.Flush(); err != nil {
		return err
	}
	if len(names) == 1 {
		return nil
	}
	_, err := fmt.Fprintf(w, "\n%s in all, %s of it in several of these images\n", humanSize(sums["total"]), humanSize(sums["shared"]))
	return err
}
