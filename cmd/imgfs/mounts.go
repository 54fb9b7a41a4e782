package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/fs"
)

// fsType is what the mount table calls an imgfs mount.
const fsType = "fuse.imgfs"

// control is the directory of control files at the root of a mount.
const control = ".imgfs"

// errNoMount reports that there is no mount, and that none was asked for.
var errNoMount = errors.New("imgfs is not mounted; mount it with 'imgfs mount DIR'")

// mountFlag gives cmd the flag by which one of several mounts is chosen.
func mountFlag(cmd *cobra.Command) {
	cmd.Flags().String("mount", "", "the mount to use, by its `DIR` (default: $IMGFS_MOUNT, or the only one)")
}

// theMount is the directory of the mount that cmd is to use.
func theMount(cmd *cobra.Command) (string, error) {
	chosen, err := cmd.Flags().GetString("mount")
	if err != nil {
		return "", err
	}
	from := "--mount"
	if chosen == "" {
		chosen, from = os.Getenv("IMGFS_MOUNT"), "IMGFS_MOUNT"
	}
	if chosen != "" {
		info, err := mountAt(chosen)
		if err != nil {
			return "", err
		}
		if info == nil {
			return "", fmt.Errorf("%s %q: imgfs is not mounted there", from, chosen)
		}
		return info.Mountpoint, nil
	}
	mounts, err := allMounts()
	if err != nil {
		return "", err
	}
	var dirs []string
	for _, m := range mounts {
		if !slices.Contains(dirs, m.Mountpoint) {
			dirs = append(dirs, m.Mountpoint)
		}
	}
	switch len(dirs) {
	case 0:
		return "", errNoMount
	case 1:
		return dirs[0], nil
	}
	return "", fmt.Errorf("several mounts: %s; choose one with --mount or IMGFS_MOUNT", strings.Join(dirs, ", "))
}

// allMounts are the imgfs mounts in the mount table, oldest first.
func allMounts() ([]*mountinfo.Info, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter(fsType))
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	return mounts, nil
}

// mountAt is the imgfs mount on dir, the topmost if there are several; nil if
// there is none. It never asks the server, which may not answer any more.
func mountAt(dir string) (*mountinfo.Info, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("%q: %w", dir, err)
	}
	// Symbolic links on the way to the mount count, the mount itself is not asked.
	if parent, err := filepath.EvalSymlinks(filepath.Dir(abs)); err == nil {
		abs = filepath.Join(parent, filepath.Base(abs))
	}
	mounts, err := allMounts()
	if err != nil {
		return nil, err
	}
	if at := topmost(mounts, abs); at != nil {
		return at, nil
	}
	if target, err := os.Readlink(abs); err == nil {
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(abs), target)
		}
		return topmost(mounts, filepath.Clean(target)), nil
	}
	return nil, nil
}

func topmost(mounts []*mountinfo.Info, dir string) *mountinfo.Info {
	for _, m := range slices.Backward(mounts) {
		if m.Mountpoint == dir {
			return m
		}
	}
	return nil
}

// detach takes the mount off its path while those who use it keep it.
func detach(dir string) error { return fs.Unmount(dir, unix.MNT_DETACH) }
