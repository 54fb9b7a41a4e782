package main

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"
)

// totals is .imgfs/df.json.
type totals struct {
	Images            int   `json:"images"`   // manifests
	Tagged            int   `json:"tagged"`   // images that have a name
	Dangling          int   `json:"dangling"` // images that have none
	Names             int   `json:"names"`
	Layers            int   `json:"layers"` // that an image uses
	Idle              int   `json:"idle"`   // that none uses any more
	Arriving          int   `json:"arriving"`
	Compressed        int64 `json:"compressed"`
	Expanded          int64 `json:"expanded"`
	Usage             int64 `json:"usage"`
	Shared            int64 `json:"shared"`
	SharedUsage       int64 `json:"sharedUsage"`
	Unique            int64 `json:"unique"`
	Cached            int64 `json:"cached"`
	Reclaimable       int64 `json:"reclaimable"`
	ReclaimableCached int64 `json:"reclaimableCached"`
	CacheLimit        int64 `json:"cacheLimit"`
	CacheFree         int64 `json:"cacheFree"`
}

// dfRow is a line of df, with the fields of docker's templates.
type dfRow struct {
	Type        string
	TotalCount  string
	Active      string
	Size        string
	Reclaimable string
}

var dfHeadings = map[string]string{
	"Type": "TYPE", "TotalCount": "TOTAL", "Active": "ACTIVE", "Size": "SIZE", "Reclaimable": "RECLAIMABLE",
}

// layerRow is a layer as df -v and layers show it.
type layerRow struct {
	Layer, DiffID                string
	Images                       int
	Size, CompressedSize, Cached string
	Method, State                string
}

var layerHeadings = map[string]string{
	"Layer": "LAYER", "DiffID": "DIFF ID", "Images": "IMAGES", "Size": "SIZE", "CompressedSize": "COMPRESSED",
	"Cached": "CACHED", "Method": "METHOD", "State": "STATE",
}

func newDf() *cobra.Command {
	var verbose bool
	var format string
	cmd := &cobra.Command{
		Use:   "df [flags]",
		Short: "Show what images take",
		Long: `Show what images and layers take, as 'docker system df' does. A layer counts once,
however many images have it. Images is what they hold, fetched or not; Layers what
of it a registry would send; Cache what of it is on this disk; Shared what is in
layers of several images, Unique the rest. ACTIVE are images with a name, and
layers that images use. What is reclaimable goes with 'imgfs prune'.

With -v, by image and by layer. --format takes json, or a Go template with the
fields .Type .TotalCount .Active .Size .Reclaimable.`,
		Example: `  imgfs df
  imgfs df -v`,
		Args: takes(0, 0, ""),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			show, err := rowPrinter[dfRow](format, `{{.Type}}\t{{.TotalCount}}\t{{.Active}}\t{{.Size}}\t{{.Reclaimable}}`, dfHeadings)
			if err != nil {
				return err
			}
			if verbose && format != "" {
				return usagef("-v and --format exclude each other; 'imgfs images --format' and .imgfs/layers.json say the same")
			}
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			if verbose {
				return dfVerbose(cmd.OutOrStdout(), mount)
			}
			var t totals
			if err := readJSON(filepath.Join(mount, control, "df.json"), &t); err != nil {
				return err
			}
			return show(cmd.OutOrStdout(), t.rows())
		},
	}
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "show each image and each layer")
	cmd.Flags().StringVar(&format, "format", "", "print each line as json, or by a Go `TEMPLATE`")
	mountFlag(cmd)
	return cmd
}

func (t totals) rows() []dfRow {
	return []dfRow{
		{"Images", strconv.Itoa(t.Images), strconv.Itoa(t.Tagged), humanSize(t.Expanded), partOf(t.Reclaimable, t.Expanded)},
		{"Layers", strconv.Itoa(t.Layers + t.Idle), strconv.Itoa(t.Layers), humanSize(t.Compressed), "-"},
		{"Cache", strconv.Itoa(t.Layers + t.Idle), strconv.Itoa(t.Layers), humanSize(t.Cached), partOf(t.ReclaimableCached, t.Cached)},
		{"Shared", "", "", humanSize(t.Shared), ""},
		{"Unique", "", "", humanSize(t.Unique), ""},
	}
}

// partOf is a size with its share of the whole, as docker writes it.
func partOf(n, whole int64) string {
	if whole <= 0 {
		return humanSize(n)
	}
	return fmt.Sprintf("%s (%d%%)", humanSize(n), n*100/whole)
}

// dfVerbose lists the images and the layers with what they take.
func dfVerbose(w io.Writer, mount string) error {
	records, err := readImages(mount)
	if err != nil {
		return err
	}
	layers, err := readLayers(mount)
	if err != nil {
		return err
	}
	rows := imagesFlags{}.rows(records, func(record) bool { return true }, time.Now())
	show, err := rowPrinter[row]("", `{{.Repository}}\t{{.Tag}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}\t{{.SharedSize}}\t{{.UniqueSize}}\t{{.CachedSize}}`, imageHeadings)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprint(w, "Images space usage:\n\n"); err != nil {
		return err
	}
	if err := show(w, rows); err != nil {
		return err
	}
	if _, err := fmt.Fprint(w, "\nLayers space usage:\n\n"); err != nil {
		return err
	}
	showLayers, err := rowPrinter[layerRow]("", `{{.Layer}}\t{{.Images}}\t{{.Size}}\t{{.CompressedSize}}\t{{.Cached}}\t{{.Method}}\t{{.State}}`, layerHeadings)
	if err != nil {
		return err
	}
	// What takes most comes first; layers that nobody uses at the end.
	slices.SortStableFunc(layers, func(a, b layer) int {
		if idle := a.Images == 0; idle != (b.Images == 0) {
			if idle {
				return 1
			}
			return -1
		}
		switch {
		case a.Expanded > b.Expanded:
			return -1
		case a.Expanded < b.Expanded:
			return 1
		}
		return 0
	})
	var lines []layerRow
	for _, l := range layers {
		lines = append(lines, newLayerRow(l, false))
	}
	return showLayers(w, lines)
}

func newLayerRow(l layer, noTrunc bool) layerRow {
	out := layerRow{
		Layer: l.Digest, DiffID: l.DiffID, Images: l.Images,
		Size: longSize(l.Expanded), CompressedSize: longSize(l.Compressed), Cached: longSize(l.Cached),
		Method: l.Method, State: l.State,
	}
	if !noTrunc {
		out.Layer, out.DiffID = shortHex(l.Digest), shortHex(l.DiffID)
	}
	return out
}
