package main

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

const mountLong = `Mount every image of every registry below DIR.

The command returns when the mount answers; the server stays in the background,
logs to imgfs.log in the cache directory, and ends with 'imgfs umount DIR'. With
-f it stays in the foreground instead, and tells systemd when it is ready.

A server that dies is replaced: who uses the mount waits for some milliseconds, and
goes on. See 'imgfs restart'.

Flags may be set in imgfs.toml too, under the same names, in /etc/imgfs and in
$XDG_CONFIG_HOME/imgfs. The command line wins. From mount(8) and fstab they are
options, when imgfs is linked as /sbin/mount.fuse.imgfs:

  imgfs  /mnt/images  fuse.imgfs  allow-other,cache-size=20GiB,_netdev  0 0`

const mountExample = `  imgfs mount /mnt/images
  imgfs mount --cache-size 20GiB --pull never /mnt/images
  imgfs mount -f --demo /tmp/demo`

// newMount returns the command mount; args is the command line that it runs
// again in the background.
func newMount(args []string) *cobra.Command {
	c := &config{}
	keys := c.keys()
	cmd := &cobra.Command{
		Use:     "mount [flags] DIR",
		Short:   "Mount all registries on a directory",
		Long:    mountLong,
		Example: mountExample,
		Args:    takes(1, 1, "DIR"),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		RunE: func(cmd *cobra.Command, dir []string) error {
			c.dir = dir[0]
			given, err := takeHandover()
			if err != nil {
				return err
			}
			if given != nil {
				c.cwd = given.Dir
			}
			if err = loadConfig(keys, cmd.Flags().Changed, configFiles()); err == nil {
				err = errors.Join(c.check(), c.absolute())
			}
			if given != nil {
				return given.run(c, err)
			}
			if err != nil {
				return err
			}
			if pipe := readyPipe(); pipe != nil {
				return superviseBackground(c, args, pipe)
			}
			if err := checkPlace(cmd, c); err != nil {
				return err
			}
			if c.foreground {
				return superviseForeground(cmd, c, args)
			}
			return startBackground(cmd, c, args)
		},
	}
	cmd.Flags().SortFlags = false
	cmd.Flags().BoolVarP(&c.foreground, "foreground", "f", false, "stay in the foreground")
	cmd.Flags().AddFlagSet(keys)
	cmd.Flags().StringVar(&c.fsName, "source", "imgfs", "the source to show in the mount table")
	// Only mount(8) gives a source, and only to show it.
	if err := cmd.Flags().MarkHidden("source"); err != nil {
		panic(err)
	}
	for flag, words := range map[string][]string{
		"pull": {"missing", "never"}, "verify": {"on", "strict"},
		"du": {"expanded", "cached"}, "modes": {"safe", "exact"}, "log-level": {"debug", "info", "warn", "error"},
	} {
		if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)); err != nil {
			panic(err)
		}
	}
	return cmd
}

// checkPlace looks for what can be known to be wrong before a server is started,
// so that the message can say what to do.
func checkPlace(cmd *cobra.Command, c *config) error {
	dir := c.dir
	info, err := os.Stat(dir)
	ours, tableErr := mountAt(dir)
	switch {
	case tableErr == nil && ours != nil && errors.Is(err, unix.ENOTCONN):
		return fmt.Errorf("%q: the mount there has lost its server and its supervisor; remove it with 'imgfs umount %s'", dir, dir)
	case tableErr == nil && ours != nil:
		return fmt.Errorf("%q: imgfs is mounted there already; unmount it with 'imgfs umount %s'", dir, dir)
	case errors.Is(err, iofs.ErrNotExist):
		return fmt.Errorf("%q: no such directory; make it with 'mkdir -p %s'", dir, dir)
	case errors.Is(err, unix.ENOTCONN):
		return fmt.Errorf("%q: a dead mount is in the way; remove it with 'umount %s'", dir, dir)
	case err != nil:
		return fmt.Errorf("%q: %w", dir, cause(err))
	case !info.IsDir():
		return fmt.Errorf("%q: not a directory", dir)
	}
	// A server that opens its own files through its own mount asks itself, and
	// waits for ever.
	for flag, path := range map[string]string{"cache-dir": c.cacheDir, "log-file": c.logFile, "certs-dir": c.certsDir, "prefetch": c.profiles()} {
		if path != "" && isBelow(path, dir) {
			return fmt.Errorf("%q: --%s %q would be hidden by the mount; choose a place outside of it", dir, flag, path)
		}
	}
	for _, path := range configFiles() {
		if isBelow(path, dir) {
			return fmt.Errorf("%q: the configuration %q would be hidden by the mount; choose a place outside of it", dir, path)
		}
	}
	if err := checkDevice(); err != nil {
		return fmt.Errorf("%q: %w", dir, err)
	}
	if c.allowOther && os.Geteuid() != 0 && !usersMayAllowOther("/etc/fuse.conf") {
		return fmt.Errorf("%q: --allow-other is for root, until /etc/fuse.conf says user_allow_other", dir)
	}
	if entries, err := readSome(dir); err == nil && len(entries) > 0 {
		fmt.Fprintf(cmd.ErrOrStderr(), "imgfs mount: note: %q is not empty; what it holds is hidden until it is unmounted\n", dir)
	}
	return nil
}

// isBelow reports whether path is dir or lies below it, once symbolic links are
// followed. What does not exist yet is judged by the directory that it would be
// made in.
func isBelow(path, dir string) bool {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false
	}
	rest := ""
	for {
		if real, err := filepath.EvalSymlinks(path); err == nil {
			path = filepath.Join(real, rest)
			break
		}
		if path == filepath.Dir(path) {
			break
		}
		path, rest = filepath.Dir(path), filepath.Join(filepath.Base(path), rest)
	}
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// readSome reads the first name in dir.
func readSome(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(1)
}

// checkDevice says why FUSE cannot be used, if it is plain to see.
func checkDevice() error {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	switch {
	case err == nil:
		f.Close()
	case errors.Is(err, iofs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return errors.New("/dev/fuse is missing; load it with 'modprobe fuse', or give it to the container with '--device /dev/fuse'")
	case os.Geteuid() != 0:
		return fmt.Errorf("/dev/fuse: %w; be root, or let users have it with 'chmod 666 /dev/fuse'", cause(err))
	default:
		return fmt.Errorf("/dev/fuse: %w; a container needs '--device /dev/fuse --cap-add SYS_ADMIN'", cause(err))
	}
	if os.Geteuid() != 0 {
		if _, err := exec.LookPath("fusermount3"); err != nil {
			return errors.New("fusermount3 is missing, which mounts for users; install the package fuse3, or be root")
		}
	}
	return nil
}

// usersMayAllowOther reports whether fusermount3 lets users mount for others: if
// its configuration has a line user_allow_other.
func usersMayAllowOther(conf string) bool {
	text, err := os.ReadFile(conf)
	if err != nil {
		return false
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		if strings.TrimSpace(line) == "user_allow_other" {
			return true
		}
	}
	return false
}

// explain adds to an error of the mount what may help.
func explain(err error) error {
	if errors.Is(err, iofs.ErrPermission) && os.Geteuid() == 0 {
		return fmt.Errorf("%w; in a container give it '--cap-add SYS_ADMIN --device /dev/fuse'", err)
	}
	return err
}

// cause is the system's own error inside err, without the operation and path
// that our message names itself.
func cause(err error) error {
	var path *iofs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}
