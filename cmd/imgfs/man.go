package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"github.com/spf13/pflag"
)

// newMan returns the hidden command man, which writes the pages of docs/man.
func newMan() *cobra.Command {
	return &cobra.Command{
		Use:     "man DIR",
		Short:   "Write the man pages of all commands into DIR",
		Example: "  imgfs man /usr/local/share/man/man1",
		Hidden:  true,
		Args:    takes(1, 1, "DIR"),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		RunE: func(_ *cobra.Command, args []string) error { return writeMan(args[0]) },
	}
}

// writeMan writes a page for each command into dir. The pages are the same
// wherever and whenever they are made.
func writeMan(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("man pages: %w", err)
	}
	root := newRoot(nil)
	root.DisableAutoGenTag = true
	steady(root)
	date := time.Date(2026, time.November, 1, 0, 0, 0, 0, time.UTC) // of the release; the pages show its month
	header := &doc.GenManHeader{Section: "1", Source: "imgfs " + release, Manual: "imgfs", Date: &date}
	if err := doc.GenManTreeFromOpts(root, doc.GenManTreeOptions{Header: header, Path: dir, CommandSeparator: "-"}); err != nil {
		return fmt.Errorf("man pages %q: %w", dir, err)
	}
	return nil
}

// steady removes from help texts what depends on who asks.
func steady(cmd *cobra.Command) {
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Name == "cache-dir" {
			f.DefValue = "/var/lib/imgfs"
		}
	})
	for _, sub := range cmd.Commands() {
		steady(sub)
	}
}
