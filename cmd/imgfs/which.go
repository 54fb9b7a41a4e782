package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// origin is where a path of an image comes from.
type origin struct {
	Path    string // in the image, once symbolic links on the way are followed
	Type    string // "file", "directory", "symbolic link", …
	Target  string // of a symbolic link
	Layer   string // digest of the layer that set it
	Number  int    // of the layer, from 1, the lowest
	Layers  int    // of the image
	Command string // of the layer, in the history
	Digest  string // of a file's content
	Size    int64  // bytes of a file
	Cached  int64  // bytes of it on this disk; -1 when that is not known
}

func newWhich() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "which [flags] IMAGE PATH",
		Short: "Show which layer of an image a path comes from",
		Long: `Show the layer that a path of an image comes from, the command in the image's
history that made the layer, the digest of the content, and how much of it is on
this disk. Symbolic links on the way to PATH are followed inside the image, one at
its end is not. Nothing is fetched for it.

--format takes json, or a Go template with the fields .Path .Type .Target .Layer
.Number .Layers .Command .Digest .Size .Cached.`,
		Example: `  imgfs which debian:12 /etc/os-release
  imgfs which --format '{{.Command}}' nginx:1.27 /usr/sbin/nginx`,
		Args:              takes(2, 2, "IMAGE PATH"),
		ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			print, err := linePrinter(format, printOrigin)
			if err != nil {
				return err
			}
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			img, err := resolve(mount, args[0])
			if err != nil {
				return err
			}
			o, err := originOf(mount, img.name.path, args[1])
			if err != nil {
				return fmt.Errorf("%q: %q: %w", img.name.ref, args[1], err)
			}
			return print(cmd.OutOrStdout(), o)
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "print it as json, or by a Go `TEMPLATE`")
	mountFlag(cmd)
	return cmd
}

// inside opens a path below root, which is "/" to the path and to the symbolic
// links on its way. One at its end is opened itself, unless a slash follows.
// Nothing but names is asked for: the descriptor cannot be read.
func inside(root, path string) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	path = cmp.Or(strings.TrimLeft(path, "/"), ".")
	for {
		fd, err := unix.Openat2(dir, path, &unix.OpenHow{
			Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_XDEV,
		})
		if err == nil {
			return os.NewFile(uintptr(fd), path), nil
		}
		// EAGAIN: something was renamed meanwhile, anywhere.
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return nil, err
		}
	}
}

// originOf is where path of the image below mount comes from.
func originOf(mount, image, path string) (origin, error) {
	var layers []layer
	if err := readMeta(mount, image, "layers.json", &layers); err != nil {
		return origin{}, err
	}
	root := filepath.Join(mount, image)
	f, err := inside(root, path)
	if err != nil {
		return origin{}, errors.New(whichErrno(err))
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return origin{}, err
	}
	self := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	o := origin{Path: "/", Type: typeName(st.Mode), Cached: -1}
	if full, err := os.Readlink(self); err == nil {
		if rel, ok := strings.CutPrefix(full, root); ok && rel != "" {
			o.Path = rel
		}
	}
	o.Layers = len(layers)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		o.Size = st.Size
		o.Digest = fact(self, "digest")
		if n, err := strconv.ParseInt(fact(self, "cached"), 10, 64); err == nil {
			o.Cached = n
		}
		o.Layer = fact(self, "layer")
	case unix.S_IFDIR:
		o.Layer = fact(self, "layer")
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		if n, err := unix.Readlinkat(int(f.Fd()), "", buf); err == nil {
			o.Target = string(buf[:n])
		}
	}
	if o.Layer == "" { // the kernel lets only files and directories have user attributes
		o.Layer = layerWithInode(mount, layers, o.Path, st.Ino)
	}
	for i, l := range layers {
		if o.Layer == l.Digest || o.Layer == l.Key {
			o.Layer, o.Number, o.Command = l.Digest, i+1, l.Command
		}
	}
	return o, nil
}

// layerWithInode is the digest of the topmost layer that has the inode under path,
// which is the same number in the image and in the layer alone.
func layerWithInode(mount string, layers []layer, path string, ino uint64) string {
	for i := len(layers) - 1; i >= 0; i-- {
		var st unix.Stat_t
		if unix.Lstat(filepath.Join(mount, control, "layers", hexOf(layers[i].Key), path), &st) == nil && st.Ino == ino {
			return layers[i].Digest
		}
	}
	return ""
}

// fact is an extended attribute user.imgfs.NAME; "" when there is none.
func fact(path, name string) string {
	buf := make([]byte, 4096)
	n, err := unix.Getxattr(path, "user.imgfs."+name, buf)
	if err != nil {
		return ""
	}
	return string(buf[:n])
}

func whichErrno(err error) string {
	switch {
	case errors.Is(err, unix.ENOENT):
		return "no such path in the image"
	case errors.Is(err, unix.ENOTDIR):
		return "a file is on the way to it"
	}
	return errnoText(err)
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symbolic link"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	case unix.S_IFIFO:
		return "named pipe"
	}
	return "socket"
}

func printOrigin(w io.Writer, o origin) error {
	out := tabwriter.NewWriter(w, 0, 0, 1, ' ', 0)
	link := ""
	if o.Target != "" {
		link = " -> " + shownPath(o.Target)
	}
	fmt.Fprintf(out, "Path:\t%s%s\n", shownPath(o.Path), link)
	fmt.Fprintf(out, "Type:\t%s\n", o.Type)
	if o.Number > 0 {
		fmt.Fprintf(out, "Layer:\t%s (%d of %d)\n", o.Layer, o.Number, o.Layers)
	} else {
		fmt.Fprintf(out, "Layer:\t%s\n", orNone(o.Layer))
	}
	if o.Command != "" {
		fmt.Fprintf(out, "Command:\t%s\n", oneLine(o.Command))
	}
	if o.Type == "file" {
		fmt.Fprintf(out, "Content:\t%s\n", orNone(o.Digest))
		fmt.Fprintf(out, "Size:\t%s\n", humanSize(o.Size))
		cached := "yes"
		switch {
		case o.Cached < 0:
			cached = "unknown"
		case o.Cached == 0 && o.Size > 0:
			cached = "no"
		case o.Cached < o.Size:
			cached = fmt.Sprintf("%s of %s", humanSize(o.Cached), humanSize(o.Size))
		}
		fmt.Fprintf(out, "Cached:\t%s\n", cached)
	}
	return out.Flush()
}
