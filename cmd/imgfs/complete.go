package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// hexPrefix is what a user types who wants an ID.
var hexPrefix = regexp.MustCompile(`^(sha256:)?[0-9a-f]+$`)

// completeImages offers the names that are here and, where what was typed may be
// the beginning of an ID, the IDs, each with what it says of the image.
func completeImages(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	mount, err := theMount(cmd)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	records, err := readImages(mount)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return completions(records, args, typed), cobra.ShellCompDirectiveNoFileComp
}

func completions(records []record, args []string, typed string) []cobra.Completion {
	var out []cobra.Completion
	offer := func(word, about string) {
		if strings.HasPrefix(word, typed) && !slices.Contains(args, word) {
			out = append(out, cobra.CompletionWithDesc(word, about))
		}
	}
	var ids []string
	for _, r := range records {
		if !r.Dangling {
			offer(r.ref(), fmt.Sprintf("%s, %s", shortHex(r.ID), shortSize(r.Size)))
		}
		// Dangling images have nothing but their IDs.
		if (r.Dangling || hexPrefix.MatchString(typed)) && !slices.Contains(ids, r.ID) {
			ids = append(ids, r.ID)
			id := shortHex(r.ID)
			if strings.HasPrefix(typed, "sha256:") {
				id = r.ID
			}
			about := r.ref()
			if r.Dangling {
				about = "<none>, " + shortSize(r.Size)
			}
			offer(id, about)
		}
	}
	return out
}

// completeFirst is completeImages for commands that take one.
func completeFirst(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return completeImages(cmd, args, typed)
}
