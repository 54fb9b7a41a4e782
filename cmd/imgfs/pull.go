package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newPull() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "pull [flags] NAME…",
		Short: "Bring images here",
		Long: `Bring images here, as 'mkdir -p' of their directories does. NAME is what docker
pull takes, or a path below the mount. Only what is needed to list the image is
fetched now, its files when they are read; with --all every file is fetched too.

An image that is here stays as it is, even if its tag has moved in the registry.`,
		Example: `  imgfs pull debian:12
  imgfs pull --all localhost:5000/team/app:v1`,
		Args:              takes(1, math.MaxInt, "NAME"),
		ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			wanted := make([]image, len(args))
			for i, arg := range args {
				if wanted[i], err = parseImage(mount, arg); err != nil {
					return err
				}
			}
			var failed error
			for _, want := range wanted {
				err := pull(cmd, mount, want)
				if err == nil && all {
					err = readAll(cmd, mount, want)
				}
				failed = errors.Join(failed, err)
			}
			return failed
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "fetch every file, so that nothing is left in the registry")
	mountFlag(cmd)
	return cmd
}

// pull makes the image's directory, which is what pulls it.
func pull(cmd *cobra.Command, mount string, want image) error {
	out := cmd.OutOrStdout()
	_, before := findImage(mount, want)
	fmt.Fprintf(out, "%s: Pulling\n", want.ref)
	// The server's clock is ours; its times may be rounded to the second.
	start := time.Now().Add(-time.Second)
	if err := makeAll(mount, want.path); err != nil {
		if why := reason(mount, want, start); why != "" {
			return fmt.Errorf("%q: %s", want.ref, why)
		}
		return fmt.Errorf("%q: %s", want.ref, errnoText(err))
	}
	r, ok := findImage(mount, want)
	if !ok {
		return fmt.Errorf("%q: there is a directory of that name now, but no image: the registry knows no such tag", want.ref)
	}
	fmt.Fprintf(out, "Digest: %s\n", r.Digest)
	status := "Downloaded newer image for"
	if before {
		status = "Image is up to date for"
	}
	fmt.Fprintf(out, "Status: %s %s\n", status, want.ref)
	return nil
}

// makeAll makes path below mount, in one call: the server then knows which image
// is meant, and asks for nothing on the way to it. Where it cannot know that, the
// directories on the way have to be made first.
func makeAll(mount, path string) error {
	err := unix.Mkdir(filepath.Join(mount, path), 0o755)
	if err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EEXIST) {
		return err
	}
	dir := mount
	for _, part := range strings.Split(path, "/") {
		dir = filepath.Join(dir, part)
		if err := unix.Mkdir(dir, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		return unix.ENOTDIR
	}
	return err
}

// errnoText puts into words what the mount's errnos mean.
func errnoText(err error) string {
	for errno, text := range map[unix.Errno]string{
		unix.ENOENT:       "no such image; or its registry shows it only with credentials (docker login)",
		unix.EACCES:       "the registry refuses; log in with docker login",
		unix.EAGAIN:       "the registry's rate limit is reached; try later, or log in",
		unix.EHOSTUNREACH: "the registry cannot be reached",
		unix.ETIMEDOUT:    "the registry did not answer in time",
		unix.EINVAL:       "this is no image that can be mounted",
		unix.ENOTCONN:     "the server of the mount has died; unmount and mount it again",
	} {
		if errors.Is(err, errno) {
			return text
		}
	}
	return cause(err).Error()
}
