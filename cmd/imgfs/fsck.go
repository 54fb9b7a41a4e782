package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/images"
)

func newFsck() *cobra.Command {
	c := &config{}
	keys := c.keys()
	var repair bool
	var format string
	cmd := &cobra.Command{
		Use:   "fsck [flags]",
		Short: "Check everything in the cache against its digest",
		Long: `Check every manifest, layer index, tree and cached chunk against its digest, and
the counters of the catalogue against a count. With --repair, what is damaged is
removed, so that its next use fetches or makes it again, and counters are set
right: no image is lost by that.

While imgfs is mounted, its server checks what it has open; readers go on. When it
is not, the cache directory is opened, as 'imgfs mount' would find it. The exit
status is 1 when something is damaged and was not repaired.

--format takes json, or a Go template with the fields .Kind .Object .Problem
.Repaired, for each finding.`,
		Example: `  imgfs fsck
  imgfs fsck --repair
  imgfs fsck --cache-dir /var/lib/imgfs`,
		Args:              takes(0, 0, ""),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			print, err := linePrinter(format, printFinding)
			if err != nil {
				return err
			}
			if err := loadConfig(keys, cmd.Flags().Changed, configFiles()); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			context.AfterFunc(ctx, stop) // another signal is not asked
			run := checkup{repair: repair, plain: format == "", print: print, out: cmd.OutOrStdout()}
			return run.check(ctx, cmd, c)
		},
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "remove what is damaged, and set counters right")
	cmd.Flags().StringVar(&format, "format", "", "print each finding as json, or by a Go `TEMPLATE`")
	cmd.Flags().AddFlag(keys.Lookup("cache-dir"))
	mountFlag(cmd)
	return cmd
}

// checkup is a run of fsck.
type checkup struct {
	repair, plain bool
	print         func(io.Writer, images.Finding) error
	out           io.Writer

	found, repaired int
}

// check asks the server of the mount, or opens the cache that no mount has.
func (u *checkup) check(ctx context.Context, cmd *cobra.Command, c *config) error {
	if !cmd.Flags().Changed("cache-dir") {
		mount, err := theMount(cmd)
		if err == nil {
			return u.byServer(ctx, mount)
		}
		// Nothing is mounted, and nobody said that something were.
		if !errors.Is(err, errNoMount) {
			return err
		}
	}
	if err := c.absolute(); err != nil {
		return err
	}
	return u.byHand(ctx, c)
}

// byServer has the server of a mount check its store.
func (u *checkup) byServer(ctx context.Context, mount string) error {
	answer, err := ask(ctx, mount, http.MethodPost, fmt.Sprintf("/fsck?repair=%t", u.repair))
	if err != nil {
		return u.interrupted(ctx, err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("mount %q: the server answers %s", mount, answer.Status)
	}
	for lines := json.NewDecoder(answer.Body); ; {
		var line checkLine
		switch err := lines.Decode(&line); {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return u.interrupted(ctx, fmt.Errorf("mount %q: the server has ended before the check had", mount))
		case err != nil:
			return u.interrupted(ctx, fmt.Errorf("mount %q: %w", mount, err))
		case line.Error != "":
			return fmt.Errorf("mount %q: %s", mount, line.Error)
		case line.Checked != nil:
			return u.end(*line.Checked)
		case line.Finding != nil:
			if err := u.report(*line.Finding); err != nil {
				return err
			}
		}
	}
}

// byHand checks a cache directory that no server has open.
func (u *checkup) byHand(ctx context.Context, c *config) error {
	if _, err := os.Stat(c.cacheDir); err != nil {
		return fmt.Errorf("cache %q: %w", c.cacheDir, cause(err))
	}
	store, err := openStore(c, images.Options{Keep: true}, slog.New(slog.DiscardHandler))
	if errors.Is(err, images.ErrInUse) {
		return fmt.Errorf("cache %q: in use by a mounted imgfs; name the mount with --mount instead", c.cacheDir)
	}
	if err != nil {
		return err
	}
	var failed error
	checked, err := store.Check(ctx, u.repair, func(f images.Finding) { failed = errors.Join(failed, u.report(f)) })
	if err = errors.Join(err, store.Close()); err != nil {
		return u.interrupted(ctx, fmt.Errorf("cache %q: %w", c.cacheDir, err))
	}
	return errors.Join(failed, u.end(checked))
}

func (u *checkup) interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return errors.New("interrupted; what was not looked at may be damaged")
	}
	return err
}

func (u *checkup) report(f images.Finding) error {
	u.found++
	if f.Repaired {
		u.repaired++
	}
	return u.print(u.out, f)
}

func printFinding(w io.Writer, f images.Finding) error {
	repaired := ""
	if f.Repaired {
		repaired = " (repaired)"
	}
	_, err := fmt.Fprintf(w, "%s %s: %s%s\n", f.Kind, f.Object, f.Problem, repaired)
	return err
}

// end prints what was checked, and is an error when damage is left.
func (u *checkup) end(n images.Checked) error {
	if u.plain {
		looked := []string{
			count(n.Names, "name"), count(n.Blobs, "blob"), count(n.Indexes, "layer index", "layer indexes"),
			count(n.Trees, "tree"), count(n.Packs, "pack"), count(n.Chunks, "chunk"),
		}
		result := "nothing is damaged"
		if u.found > 0 {
			result = fmt.Sprintf("%s found, %d repaired", count(u.found, "problem"), u.repaired)
		}
		if _, err := fmt.Fprintf(u.out, "Checked %s: %s\n", strings.Join(looked, ", "), result); err != nil {
			return err
		}
	}
	if left := u.found - u.repaired; left > 0 {
		hint := ""
		if !u.repair {
			hint = "; repair with 'imgfs fsck --repair'"
		}
		return fmt.Errorf("%s left%s", count(left, "problem"), hint)
	}
	return nil
}

// count is "1 layer", "2 layers"; plural is for words that take no s.
func count(n int, one string, plural ...string) string {
	switch {
	case n == 1:
		return "1 " + one
	case len(plural) > 0:
		return fmt.Sprintf("%d %s", n, plural[0])
	}
	return fmt.Sprintf("%d %ss", n, one)
}
