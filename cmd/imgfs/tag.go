package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newTag() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tag IMAGE NAME[:TAG]",
		Short: "Give an image another name",
		Long: `Give an image another name, as 'ln -sfn' does. IMAGE is a name, an ID or a path
below the mount. The name is the image's own from then on, and outlives the first;
if it stood for another image, that one loses it, and is dangling if it has no
other. Nothing is sent to a registry.`,
		Example: `  imgfs tag ubuntu:18.04 ubuntu:bionic
  imgfs tag 329ed837d508 localhost:5000/team/base:v1`,
		Args:              takes(2, 2, "IMAGE and NAME[:TAG]"),
		ValidArgsFunction: completeTwo,
		RunE: func(cmd *cobra.Command, args []string) error {
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			return tag(mount, args[0], args[1])
		},
	}
	mountFlag(cmd)
	return cmd
}

// tag makes dst a name of the image src, by one system call.
func tag(mount, src, dst string) error {
	to, err := parseImage(mount, dst)
	if err != nil {
		return err
	}
	if strings.Contains(to.path, "/@") {
		return usagef("%q: refusing to create a tag with a digest reference", dst)
	}
	from, err := resolve(mount, src)
	if err != nil {
		return err
	}
	if from.name.path == to.path {
		return nil
	}
	err = to.link(mount, from.name.path, "")
	if !errors.Is(err, unix.EEXIST) {
		return tagError(err, to, src)
	}
	// A link into a directory that is no image would be another name.
	if _, none := recordAt(mount, to.path); none != nil {
		return tagError(err, to, src)
	}
	// The name is here: then a link into it, called as its target is, replaces it,
	// as 'ln -sfn' does. If the image there has a file of that name, the target is
	// the image by its ID, which is no file's name.
	err = to.link(mount, from.name.path, filepath.Base(from.name.path))
	if errors.Is(err, unix.EEXIST) {
		err = to.link(mount, filepath.Join(control, "ids", hexOf(from.ID)), hexOf(from.ID))
	}
	if errors.Is(err, unix.ENOENT) { // one of the two has gone meanwhile
		if err = to.link(mount, from.name.path, ""); errors.Is(err, unix.EEXIST) {
			err = unix.ENOENT
		}
	}
	return tagError(err, to, src)
}

// link makes the image's path, or name in it, a symbolic link to target, which is
// a path below the mount. Either way the mount takes the target as seen from the
// directory that has the image.
func (i image) link(mount, target, name string) error {
	rel, err := filepath.Rel(filepath.Dir(i.path), target)
	if err != nil {
		return err
	}
	return unix.Symlink(rel, filepath.Join(mount, i.path, name))
}

func tagError(err error, to image, src string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT):
		return notHere{src}
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENAMETOOLONG):
		return fmt.Errorf("%q: not a tag that an image can have", to.ref)
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%q: there is a directory of that name, which is no image", to.ref)
	}
	return fmt.Errorf("%q: %w", to.ref, cause(err))
}

// completeTwo offers images for both arguments of tag.
func completeTwo(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return completeImages(cmd, args, typed)
}
