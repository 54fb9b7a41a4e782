// Command imgfs mounts container registries as a directory.
//
// Every command but mount works on the mount itself: it reads and writes the
// files there, with the system calls that ls, mkdir and a script would use, and
// keeps no state of its own. One file holds one command; config.go and size.go
// hold what mount is told, background.go how it leaves the terminal, supervise.go
// how it outlives its servers, child.go when one is dead, handover.go what a server has from it, mounts.go
// how the other commands find the mount, and demo.go the registry of --demo.
//
// Exit status: 0 done, 1 it failed, 2 wrong usage.
//
// Source: https://github.com/imgfs/imgfs
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

const (
	exitOK    = 0
	exitFail  = 1
	exitUsage = 2
)

// usageError is a mistake in how the command was called.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }

func (e *usageError) Unwrap() error { return e.err }

// statusError is the end of a process with a certain exit status. Without an err
// all has been said.
type statusError struct {
	code int
	err  error
}

func (e *statusError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *statusError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// takes is the check of a command's arguments: from least to most of what.
func takes(least, most int, what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return usagef("%s is missing", what)
		case len(args) > most && most == 0:
			return usagef("unexpected argument %q", args[0])
		case len(args) > most:
			return usagef("unexpected argument %q after %s", args[most], what)
		}
		return nil
	}
}

func main() {
	os.Exit(run(os.Args, os.Stdout, os.Stderr))
}

// run executes one command line (with the program's name first) and returns the
// exit status.
func run(argv []string, stdout, stderr io.Writer) int {
	args := argv[1:]
	if strings.HasPrefix(filepath.Base(argv[0]), "mount.") {
		translated, err := helperArgs(args)
		if err != nil {
			fmt.Fprintf(stderr, "%s: %v\n", filepath.Base(argv[0]), err)
			return exitUsage
		}
		args = translated
	}
	root := newRoot(args)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteC()
	return report(cmd, err, stderr)
}

// report prints err, if any, a line for each failure that it joins, and returns
// the exit status for it.
func report(cmd *cobra.Command, err error, stderr io.Writer) int {
	if err == nil {
		return exitOK
	}
	for line := range strings.SplitSeq(strings.TrimSpace(err.Error()), "\n") {
		if line == "" {
			continue
		}
		fmt.Fprintf(stderr, "%s: %s\n", cmd.CommandPath(), line)
	}
	var status *statusError
	if errors.As(err, &status) {
		return status.code
	}
	var usage *usageError
	// Cobra has no type for an unknown subcommand of a command without a Run.
	if errors.As(err, &usage) || strings.HasPrefix(err.Error(), "unknown command ") {
		fmt.Fprintf(stderr, "See '%s --help'.\n", cmd.CommandPath())
		return exitUsage
	}
	return exitFail
}

const rootLong = `imgfs mounts container registries as a directory: the root filesystem of every
image of every registry is there to be listed and read, and only what is read is
fetched.

  imgfs mount /mnt/images
  ls /mnt/images/debian/12/etc

Every other command finds the mount by --mount, by the environment variable
IMGFS_MOUNT, or because there is only one.`

// newRoot returns the command imgfs with its subcommands. args is the command
// line (without the program's name), which mount runs again in the background.
func newRoot(args []string) *cobra.Command {
	root := &cobra.Command{
		Use:           "imgfs",
		Short:         "Every image of every registry is a directory",
		Long:          rootLong,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			hint := ""
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				hint = "; did you mean " + strings.Join(s, " or ") + "?"
			}
			return usagef("unknown command %q%s", args[0], hint)
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SuggestionsMinimumDistance = 2
	root.SetVersionTemplate("imgfs {{.Version}}\n")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	root.AddCommand(newMount(args), newUmount(), newRestart(), newPull(), newImages(), newVersion())
	root.AddCommand(newRm(), newTag(), newPrune(), newDf(), newHistory(), newInspect(), newLayers())
	root.AddCommand(newDiff(), newWhich(), newStatus(), newEvents(), newErrors(), newFsck(), newRecord(), newMan(), newBring())
	root.SetHelpCommand(newHelp())
	root.InitDefaultVersionFlag()
	root.InitDefaultCompletionCmd()
	if completion, _, err := root.Find([]string{"completion"}); err == nil {
		completion.Args = takes(1, 0, "SHELL")
		completion.RunE = func(*cobra.Command, []string) error { return nil }
		completion.Example = "  source <(imgfs completion bash)"
	}
	return root
}
