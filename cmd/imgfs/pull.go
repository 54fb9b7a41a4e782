package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// pullFlags are the flags of pull.
type pullFlags struct {
	all, quiet bool
	platform   string
}

func newPull() *cobra.Command {
	var f pullFlags
	cmd := &cobra.Command{
		Use:   "pull [flags] NAME…",
		Short: "Bring images here, or up to date",
		Long: `Bring images here, as 'mkdir' of their directories does. NAME is what docker pull
takes, or a path below the mount. Only what is needed to list the image is fetched
now, its files when they are read; with --all every file is fetched too.

For an image that is here the registry is asked again, as 'touch' of its directory
does: if the tag has moved, the directory shows the new image.

Each layer is shown with its method: here already (another image has it), lazy (it
stays in its registry and is read by ranges), or streaming (it has no index, and
arrives whole; its files can be read meanwhile). The command waits for those that
stream; an interrupt ends the waiting alone.`,
		Example: `  imgfs pull debian:12
  imgfs pull --platform linux/arm64 debian:12
  imgfs pull --all localhost:5000/team/app:v1`,
		Args:              takes(1, math.MaxInt, "NAME"),
		ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkPlatform(f.platform); err != nil {
				return err
			}
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			wanted := make([]image, len(args))
			for i, arg := range args {
				if wanted[i], err = parseImage(mount, arg); err != nil {
					return err
				}
				wanted[i] = wanted[i].on(f.platform)
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			context.AfterFunc(ctx, stop) // another signal is not asked
			var failed error
			for _, want := range wanted {
				err := pull(ctx, cmd, mount, want, f.quiet)
				if err == nil && f.all {
					err = readAll(ctx, cmd, mount, want)
				}
				failed = errors.Join(failed, err)
				if ctx.Err() != nil {
					break
				}
			}
			return failed
		},
	}
	cmd.Flags().BoolVar(&f.all, "all", false, "fetch every file, so that nothing is left in the registry")
	cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, "print the name alone")
	cmd.Flags().StringVar(&f.platform, "platform", "", "the image for `OS/ARCH[/VARIANT]` (default: the mount's), below .imgfs/platforms")
	mountFlag(cmd)
	return cmd
}

// on is the image for another platform than the mount's; for the empty string it
// is the image itself.
func (i image) on(platform string) image {
	if platform != "" {
		i.path = control + "/platforms/" + strings.ReplaceAll(platform, "/", "-") + "/" + i.path
	}
	return i
}

// pull brings the image here, shows how its layers come, and waits for them. The
// end of ctx ends the waiting.
func pull(ctx context.Context, cmd *cobra.Command, mount string, want image, quiet bool) error {
	out := cmd.OutOrStdout()
	before := digestOf(mount, want)
	show := newPullShow(cmd, mount, want, quiet)
	if !quiet {
		fmt.Fprintf(out, "%s: Pulling\n", want.ref)
	}
	// The server's clock is ours; its times may be rounded to the second.
	start := time.Now().Add(-time.Second)
	show.since = start
	err, waited := show.until(ctx, startBring(mount, want.path))
	if !waited {
		show.end()
		return fmt.Errorf("%q: interrupted; the pull goes on in the background, see 'imgfs events'", want.ref)
	}
	if err != nil {
		show.end()
		if why := reason(mount, want, start); why != "" {
			return fmt.Errorf("%q: %s", want.ref, why)
		}
		return fmt.Errorf("%q: %s", want.ref, errnoText(err))
	}
	after := digestOf(mount, want)
	if after == "" {
		show.end()
		return fmt.Errorf("%q: there is a directory of that name now, but no image: the registry knows no such tag", want.ref)
	}
	arriving, failures := show.arrive(ctx)
	show.end()
	if quiet {
		fmt.Fprintln(out, want.ref)
	} else {
		status := "Image is up to date for"
		if before != after {
			status = "Downloaded newer image for"
			if text := show.reused(); text != "" {
				fmt.Fprintln(out, text)
			}
		}
		fmt.Fprintf(out, "Digest: %s\nStatus: %s %s\n", after, status, want.ref)
	}
	if arriving > 0 {
		return fmt.Errorf("%q: interrupted; it can be used, while %s in the background", want.ref, count(arriving, "layer arrives", "layers arrive"))
	}
	if failures != "" {
		return fmt.Errorf("%q: %s", want.ref, failures)
	}
	return nil
}

// digestOf is the digest of the image that a name stands for: of what its registry
// answered; "" when none is here.
func digestOf(mount string, want image) string {
	text, err := os.ReadFile(metaPath(mount, want.path, "digest"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
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
