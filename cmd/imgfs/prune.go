package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// pruneFlags are the flags of prune.
type pruneFlags struct {
	all, force bool
	filters    []string
}

func newPrune() *cobra.Command {
	var f pruneFlags
	cmd := &cobra.Command{
		Use:   "prune [flags]",
		Short: "Remove images that nobody needs",
		Long: `Remove the images that have no name any more, and give the disk back what is kept
of layers that no image uses. With -a every image goes that no process uses: as
its working or root directory, by an open or mapped file, or by a mount.

A dangling image that a process uses stays. --filter until=TIME keeps the images
created since then; TIME is a date, a time, or how long ago ("24h").`,
		Example: `  imgfs prune
  imgfs prune -a -f --filter until=720h`,
		Args: takes(0, 0, ""),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			until, err := parseUntil(f.filters, time.Now())
			if err != nil {
				return err
			}
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			if err := f.confirm(cmd); err != nil {
				return err
			}
			return prune(cmd, mount, f.all, until)
		},
	}
	cmd.Flags().BoolVarP(&f.all, "all", "a", false, "remove every image that no process uses")
	cmd.Flags().BoolVarP(&f.force, "force", "f", false, "do not ask")
	cmd.Flags().StringArrayVar(&f.filters, "filter", nil, "remove only what `KEY=VALUE` says (until=TIME)")
	mountFlag(cmd)
	return cmd
}

// parseUntil is the time before which an image must be created to go; zero for
// any.
func parseUntil(filters []string, now time.Time) (until time.Time, err error) {
	for _, text := range filters {
		key, value, _ := strings.Cut(text, "=")
		if key != "until" {
			return until, usagef("--filter %q: unknown key; known is until", text)
		}
		t, ok := parseTime(value, now)
		if !ok {
			return until, usagef("--filter %q: write until=24h, until=2026-01-31 or until=2026-01-31T12:00:00Z", text)
		}
		if until.IsZero() || t.Before(until) {
			until = t
		}
	}
	return until, nil
}

func parseTime(text string, now time.Time) (time.Time, bool) {
	if d, err := time.ParseDuration(text); err == nil {
		return now.Add(-d), true
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, true
		}
	}
	return time.Time{}, false
}

// confirm asks, on a terminal; elsewhere -f must have been said.
func (f pruneFlags) confirm(cmd *cobra.Command) error {
	if f.force {
		return nil
	}
	in, ok := cmd.InOrStdin().(*os.File)
	if ok {
		_, err := unix.IoctlGetTermios(int(in.Fd()), unix.TCGETS)
		ok = err == nil
	}
	if !ok {
		return errors.New("standard input is not a terminal, so nobody can be asked; say -f to remove without asking")
	}
	what := "dangling images"
	if f.all {
		what = "images that no process uses"
	}
	fmt.Fprintf(cmd.OutOrStdout(), "WARNING! This will remove all %s.\nAre you sure you want to continue? [y/N] ", what)
	answer, err := bufio.NewReader(in).ReadString('\n')
	if err != nil {
		fmt.Fprintln(cmd.OutOrStdout())
	}
	if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
		return errors.New("cancelled; nothing was removed")
	}
	return nil
}

// prune removes the images, then what is left of their layers, and says what went.
func prune(cmd *cobra.Command, mount string, all bool, until time.Time) error {
	records, err := readImages(mount)
	if err != nil {
		return err
	}
	used, err := imagesInUse(mount, records)
	if err != nil {
		return err
	}
	if all && used != nil && len(used.unknown) > 0 {
		return fmt.Errorf("%s uses an image that cannot be told from here; 'imgfs prune' without -a removes what has no name", used.unknown[0])
	}
	out := cmd.OutOrStdout()
	var lines []string
	var failed error
	for _, r := range records {
		if !r.Dangling && !all || !until.IsZero() && !r.Created.Before(until) {
			continue
		}
		if used != nil && used.ids[r.ID] != "" {
			if r.Dangling {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s stays: %s uses it\n", cmd.CommandPath(), shortHex(r.ID), used.ids[r.ID])
			}
			continue
		}
		went, err := pruneImage(mount, r)
		lines = append(lines, went...)
		failed = errors.Join(failed, err)
	}
	if len(lines) > 0 {
		fmt.Fprintf(out, "Deleted Images:\n%s\n\n", strings.Join(lines, "\n"))
	}
	freed, err := dropIdle(mount)
	fmt.Fprintf(out, "Total reclaimed space: %s\n", humanSize(freed))
	return errors.Join(failed, err)
}

// pruneImage removes one record, and returns docker's lines for it.
func pruneImage(mount string, r record) ([]string, error) {
	f := found{record: r, name: image{ref: r.ref(), path: r.path()}}
	before, err := namesOf(mount, f.name.path)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil // with the name before it, or by somebody else
	}
	if err != nil {
		return nil, err
	}
	if now, err := recordAt(mount, f.name.path); err == nil && now.ID != r.ID {
		return nil, nil // the name stands for another image by now
	}
	err = rmdir(mount, f.name.path, f.name)
	if errors.As(err, new(notHere)) {
		err = nil
	}
	lines := whatWent(mount, f, before)
	for i, line := range lines {
		lines[i] = strings.ToLower(line[:1]) + line[1:]
	}
	return lines, err
}

// dropIdle drops the layers that no image uses and returns how many bytes of this
// disk that gives back.
func dropIdle(mount string) (freed int64, err error) {
	layers, err := readLayers(mount)
	if err != nil {
		return 0, err
	}
	for _, l := range layers {
		if l.Images > 0 {
			continue
		}
		switch dropped := unix.Rmdir(filepath.Join(mount, control, "layers", hexOf(l.Key))); {
		case dropped == nil:
			freed += max(l.Cached, 0)
		// An image uses it again, or it is gone.
		case slices.Contains([]error{unix.EBUSY, unix.ENOENT}, dropped):
		default:
			err = errors.Join(err, fmt.Errorf("layer %s: %w", shortHex(l.Key), dropped))
		}
	}
	return freed, err
}
