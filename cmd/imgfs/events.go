package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// event is a line of .imgfs/events.
type event struct {
	Time  time.Time `json:"time"`
	Op    string    `json:"op"`
	Name  string    `json:"name,omitempty"`
	ID    string    `json:"id,omitempty"`
	Error string    `json:"error,omitempty"`
}

// eventPoll is the time between two looks at .imgfs/events.
const eventPoll = 200 * time.Millisecond

func newEvents() *cobra.Command {
	var since, until, format string
	var follow bool
	cmd := &cobra.Command{
		Use:   "events [flags]",
		Short: "Show what happens to the images, as it happens",
		Long: `Show what happens to the images: pull, update, untag, tag, move, exchange, delete,
dangling, drop, restart, error. What has happened before is shown with --since; then
come new events, until an interrupt, or --until. With --follow=false only what has
happened is shown.

Times are RFC 3339 (2026-01-02T15:04:05Z), or durations before now (10m, 2h).

--format takes json, or a Go template with the fields .Time .Op .Name .ID .Error.`,
		Example: `  imgfs events
  imgfs events --since 1h --follow=false
  imgfs events --format '{{.Op}} {{.Name}}'`,
		Args:              takes(0, 0, ""),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			print, err := linePrinter(format, printEvent)
			if err != nil {
				return err
			}
			now := time.Now()
			w := eventWatch{out: cmd.OutOrStdout(), print: print, follow: follow, since: now}
			if !follow {
				w.since = time.Time{}
			}
			if since != "" {
				if w.since, err = parseMoment("--since", since, now); err != nil {
					return err
				}
			}
			if until != "" {
				if w.until, err = parseMoment("--until", until, now); err != nil {
					return err
				}
			}
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			w.mount, w.file = mount, filepath.Join(mount, control, "events")
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			context.AfterFunc(ctx, stop) // another signal is not asked
			return w.watch(ctx)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", true, "go on with new events")
	cmd.Flags().StringVar(&since, "since", "", "begin with events after `TIME` (default: now)")
	cmd.Flags().StringVar(&until, "until", "", "end at `TIME`")
	cmd.Flags().StringVar(&format, "format", "", "print each event as json, or by a Go `TEMPLATE`")
	mountFlag(cmd)
	return cmd
}

// parseMoment reads a time, or a duration before now.
func parseMoment(flag, text string, now time.Time) (time.Time, error) {
	if ago, err := time.ParseDuration(text); err == nil {
		return now.Add(-ago), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, usagef("%s %q: must be a time as 2026-01-02T15:04:05Z, or a duration as 10m", flag, text)
}

func printEvent(w io.Writer, e event) error {
	var line bytes.Buffer
	fmt.Fprintf(&line, "%s %s", e.Time.Local().Format(time.RFC3339), e.Op)
	for _, word := range []string{e.Name, e.ID} {
		if word != "" {
			line.WriteString(" " + oneLine(word))
		}
	}
	if e.Error != "" {
		line.WriteString(": " + oneLine(e.Error))
	}
	line.WriteByte('\n')
	_, err := w.Write(line.Bytes())
	return err
}

// eventWatch reads the events of a mount and prints those in a span of time.
type eventWatch struct {
	mount, file  string
	since, until time.Time // until may be zero
	follow       bool
	out          io.Writer
	print        func(io.Writer, event) error

	size    int64     // of the file, as far as it was read
	changed time.Time // when it was then
	last    []byte    // the last line that was read, with its end
}

// watch prints until the context or the span ends. The file is not kept open, so
// that whoever watches keeps nobody from unmounting.
func (w *eventWatch) watch(ctx context.Context) error {
	tick := time.NewTicker(eventPoll)
	defer tick.Stop()
	for {
		if err := w.look(); err != nil {
			return err
		}
		if !w.follow || !w.until.IsZero() && !time.Now().Before(w.until) {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// look prints what is new.
func (w *eventWatch) look() error {
	info, err := os.Stat(w.file)
	// The size alone may be the same after the older half was dropped.
	if err == nil && info.Size() == w.size && info.ModTime().Equal(w.changed) {
		return nil
	}
	var text []byte
	if err == nil {
		text, err = os.ReadFile(w.file)
	}
	if errors.Is(err, unix.ESTALE) {
		return nil // another server has taken over; the file is there again
	}
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTCONN) {
			return fmt.Errorf("mount %q: it has ended", w.mount)
		}
		return fmt.Errorf("mount %q: events: %w", w.mount, cause(err))
	}
	fresh := w.fresh(text)
	for len(fresh) > 0 {
		end := bytes.IndexByte(fresh, '\n')
		if end < 0 {
			break
		}
		line := fresh[:end+1]
		fresh = fresh[end+1:]
		w.last = bytes.Clone(line)
		var e event
		if json.Unmarshal(line, &e) != nil || e.Time.Before(w.since) || !w.until.IsZero() && e.Time.After(w.until) {
			continue
		}
		if err := w.print(w.out, e); err != nil {
			return err
		}
	}
	w.size, w.changed = int64(len(text)-len(fresh)), info.ModTime()
	return nil
}

// fresh is the part of text that was not read before. The file only grows, until
// its older half is dropped: then what comes after the last line is new.
func (w *eventWatch) fresh(text []byte) []byte {
	if n := w.size; n <= int64(len(text)) && bytes.HasSuffix(text[:n], w.last) {
		return text[n:]
	}
	if at := bytes.LastIndex(text, w.last); at >= 0 {
		return text[at+len(w.last):]
	}
	return text
}
