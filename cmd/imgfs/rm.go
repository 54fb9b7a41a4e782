package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newRm() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "rm [flags] IMAGE…",
		Aliases: []string{"rmi", "remove"},
		Short:   "Remove images",
		Long: `Remove images, as 'rmdir' of their directories does. IMAGE is a name, a name with
a digest, an ID or the beginning of one, or a path below the mount; a name wins
over an ID.

A name is untagged; the image is deleted with its last name. By its ID an image is
deleted with its name; if it has several, only with -f. Who has files of a deleted
image open goes on reading them.`,
		Example: `  imgfs rm debian:12
  imgfs rm -f 329ed837d508
  imgfs rm $(imgfs images -q redis)`,
		Args:              takes(1, math.MaxInt, "IMAGE"),
		ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			return removeAll(cmd, mount, args, force)
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "remove an image by its ID though it has several names")
	mountFlag(cmd)
	return cmd
}

// removeAll removes each image, and goes on when one cannot be removed. With
// force an image that is not here is only mentioned, as docker does.
func removeAll(cmd *cobra.Command, mount string, args []string, force bool) error {
	var failed error
	var ids []string // arguments that were IDs: lists of IDs repeat them
	for _, arg := range args {
		if slices.Contains(ids, arg) {
			continue
		}
		byID, err := removeImage(cmd.OutOrStdout(), mount, arg, force)
		if byID {
			ids = append(ids, arg)
		}
		if force && errors.As(err, new(notHere)) {
			fmt.Fprintf(cmd.ErrOrStderr(), "%s: %v\n", cmd.CommandPath(), err)
			err = nil
		}
		failed = errors.Join(failed, err)
	}
	return failed
}

// removeImage removes what arg stands for and writes what went. byID reports that
// arg was an ID.
func removeImage(out io.Writer, mount, arg string, force bool) (byID bool, err error) {
	f, err := resolve(mount, arg)
	if errors.As(err, new(notHere)) {
		if c, ok := intermediate(mount, arg); ok {
			return true, fmt.Errorf("conflict: unable to delete %s (cannot be forced) - image has dependent child images", shortHex(c.ID))
		}
	}
	if err != nil {
		return false, err
	}
	if strings.Contains(f.name.ref, "@") && !strings.Contains(f.name.path, "@") {
		return false, fmt.Errorf("%q is not a name here; it is the digest of %s: remove that", f.name.ref, f.record.ref())
	}
	before, err := namesOf(mount, f.name.path)
	if err != nil {
		return f.byID, gone(err, f.name)
	}
	if f.byID {
		err = removeID(mount, f, before, force)
	} else {
		err = rmdir(mount, f.name.path, f.name)
	}
	// A part may be gone even when it failed.
	for _, line := range whatWent(mount, f, before) {
		fmt.Fprintln(out, line)
	}
	return f.byID, err
}

// removeID removes an image by its ID; with force its names one after another.
func removeID(mount string, f found, names []image, force bool) error {
	ids := filepath.Join(control, "ids", hexOf(f.ID))
	err := unix.Rmdir(filepath.Join(mount, ids))
	if !errors.Is(err, unix.EBUSY) || len(names) < 2 {
		return removeError(err, image{ref: f.ID, path: ids})
	}
	if !force {
		refs := make([]string, len(names))
		for i, n := range names {
			refs[i] = n.ref
		}
		return fmt.Errorf("conflict: unable to delete %s (must be forced) - image is referenced in multiple repositories: %s",
			shortHex(f.ID), strings.Join(refs, ", "))
	}
	for _, n := range names {
		// A name that stands for another image meanwhile is not this image's.
		if r, err := recordAt(mount, n.path); err != nil || r.ID != f.ID {
			continue
		}
		if err := rmdir(mount, n.path, n); err != nil && !errors.As(err, new(notHere)) {
			return err
		}
	}
	// With its last name it went; unless that was taken away by somebody else.
	if err := unix.Rmdir(filepath.Join(mount, ids)); err != nil && !errors.Is(err, unix.ENOENT) {
		return removeError(err, image{ref: f.ID, path: ids})
	}
	return nil
}

func rmdir(mount, path string, img image) error {
	return removeError(unix.Rmdir(filepath.Join(mount, path)), img)
}

// removeError puts into words why rmdir failed for an image.
func removeError(err error, img image) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT):
		return notHere{img.ref}
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("conflict: unable to delete %q - something is mounted on it, or an image depends on it", img.ref)
	}
	return fmt.Errorf("%q: %s", img.ref, errnoText(err))
}

// gone is err, or notHere when it says that the image is no longer here.
func gone(err error, img image) error {
	if errors.Is(err, unix.ENOENT) {
		return notHere{img.ref}
	}
	return err
}

// whatWent are docker's lines for what is no longer here of an image that had
// these names.
func whatWent(mount string, f found, before []image) []string {
	left, here := namesLeft(mount, f.ID)
	var untagged []string
	for _, n := range before {
		if !slices.Contains(left, n) {
			untagged = append(untagged, n.ref)
		}
	}
	// With the last tag of a repository its digest goes there, as docker says.
	for _, ref := range untagged {
		byDigest := repositoryOf(ref) + "@" + f.Digest
		if f.Digest != "" && !slices.Contains(untagged, byDigest) &&
			!slices.ContainsFunc(left, func(n image) bool { return repositoryOf(n.ref) == repositoryOf(ref) }) {
			untagged = append(untagged, byDigest)
		}
	}
	// The name that was asked for comes first, and a repository's digests last.
	slices.SortStableFunc(untagged, func(a, b string) int {
		return cmp.Or(rank(b == f.name.ref, a == f.name.ref), strings.Compare(repositoryOf(a), repositoryOf(b)),
			rank(strings.Contains(a, "@"), strings.Contains(b, "@")), strings.Compare(a, b))
	})
	var lines []string
	for _, ref := range untagged {
		lines = append(lines, "Untagged: "+ref)
	}
	if !here {
		lines = append(lines, "Deleted: "+f.ID)
	}
	return lines
}

// rank orders false before true.
func rank(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// repositoryOf is a name without its tag or digest.
func repositoryOf(ref string) string {
	if repo, _, ok := strings.Cut(ref, "@"); ok {
		return repo
	}
	if i := strings.LastIndex(ref, ":"); i > strings.LastIndex(ref, "/") {
		return ref[:i]
	}
	return ref
}

// namesLeft are the names that the image with this ID has now, if it is here.
func namesLeft(mount, id string) (names []image, here bool) {
	f, err := resolveID(mount, id)
	if err != nil {
		return nil, !errors.As(err, new(notHere))
	}
	names, err = namesOf(mount, f.name.path)
	return names, err == nil || !errors.Is(err, unix.ENOENT)
}

// intermediate is the intermediate image whose ID is, or begins with, id.
func intermediate(mount, id string) (chain, bool) {
	if !idForm.MatchString(id) {
		return chain{}, false
	}
	if len(hexOf(id)) == 64 {
		_, err := os.Lstat(filepath.Join(mount, control, "chains", hexOf(id)))
		return chain{ID: "sha256:" + hexOf(id)}, err == nil
	}
	chains, err := readChains(mount)
	if err != nil {
		return chain{}, false
	}
	i := slices.IndexFunc(chains, func(c chain) bool { return strings.HasPrefix(hexOf(c.ID), hexOf(id)) })
	if i < 0 {
		return chain{}, false
	}
	return chains[i], true
}
