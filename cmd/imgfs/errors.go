package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// problem is a line of .imgfs/errors.json.
type problem struct {
	Time   time.Time `json:"time"` // of the last one
	Name   string    `json:"name"`
	Op     string    `json:"op"`
	Errno  string    `json:"errno"`
	Reason string    `json:"reason"`
	Count  int       `json:"count"`
}

func newErrors() *cobra.Command {
	var since, format string
	cmd := &cobra.Command{
		Use:   "errors [flags] [NAME…]",
		Short: "Show the last errors, and why",
		Long: `Show the last errors of the mount: the reasons behind the errnos that programs saw.
NAME is an image, or a part of its name.

--format takes json, or a Go template with the fields .Time .Name .Op .Errno
.Reason .Count.`,
		Example: `  imgfs errors
  imgfs errors --since 10m debian`,
		Args:              takes(0, math.MaxInt, "NAME"),
		ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			print, err := linePrinter(format, printProblem)
			if err != nil {
				return err
			}
			var after time.Time
			if since != "" {
				if after, err = parseMoment("--since", since, time.Now()); err != nil {
					return err
				}
			}
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			problems, err := readProblems(mount)
			if err != nil {
				return err
			}
			for _, p := range problems {
				if p.Time.Before(after) || !p.about(args) {
					continue
				}
				if err := print(cmd.OutOrStdout(), p); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&since, "since", "", "only errors after `TIME`, as 10m or 2026-01-02T15:04:05Z")
	cmd.Flags().StringVar(&format, "format", "", "print each error as json, or by a Go `TEMPLATE`")
	mountFlag(cmd)
	return cmd
}

// about reports whether the problem is that of an image with one of the names;
// any is, when there are none.
func (p problem) about(names []string) bool {
	for _, name := range names {
		if strings.Contains(p.Name, name) {
			return true
		}
	}
	return len(names) == 0
}

func readProblems(mount string) ([]problem, error) {
	text, err := os.ReadFile(filepath.Join(mount, control, "errors.json"))
	if err != nil {
		return nil, fmt.Errorf("mount %q: errors: %w", mount, deadMount(mount, err))
	}
	var problems []problem
	for lines := bufio.NewReader(bytes.NewReader(text)); ; {
		line, err := lines.ReadBytes('\n')
		var p problem
		if json.Unmarshal(line, &p) == nil {
			problems = append(problems, p)
		}
		if err != nil {
			return problems, nil
		}
	}
}

// deadMount says what to try when the server of a mount has died.
func deadMount(mount string, err error) error {
	if cause(err) == unix.ENOTCONN {
		return fmt.Errorf("its server has died; 'imgfs umount %s', then mount it again", mount)
	}
	return cause(err)
}

func printProblem(w io.Writer, p problem) error {
	times := ""
	if p.Count > 1 {
		times = fmt.Sprintf(" (%d times)", p.Count)
	}
	_, err := fmt.Fprintf(w, "%s %s %s %s: %s%s\n", p.Time.Local().Format(time.RFC3339), p.Errno, p.Op, oneLine(p.Name), oneLine(p.Reason), times)
	return err
}

// misleads reports whether a character could make what a registry or an image says
// look like something else: it ends a line, talks to a terminal, or turns the
// direction of what is around it.
func misleads(r rune) bool {
	return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' || unicode.Is(unicode.Bidi_Control, r)
}

// oneLine is text of a registry or an image that cannot be taken for lines of
// ours.
func oneLine(text string) string {
	return strings.Map(func(r rune) rune {
		if misleads(r) {
			return ' '
		}
		return r
	}, text)
}

// shownPath is a path in an image as it is, or quoted where it would mislead.
func shownPath(path string) string {
	if strings.ContainsFunc(path, misleads) {
		return strconv.Quote(path)
	}
	return path
}
