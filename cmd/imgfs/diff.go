package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// difference is a line of diff.
type difference struct {
	Kind string // "A", "C" or "D": added, changed or deleted
	Path string
}

func newDiff() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "diff [flags] A B [PATH]",
		Short: "Show the files that differ between two images or layers",
		Long: `Show what has to be done to A to make it B: files added (A), changed (C) and
deleted (D), sorted, as 'docker diff' shows them: everything below an added
directory, a deleted directory alone, and as changed each directory in which
something differs. A file is changed when its type, mode, owner, size, time of
modification, content, target or extended attributes are; the size and time of a
directory do not count.

A and B are images, or the digests of two layers (in .imgfs/layers) or of two
intermediate images (in .imgfs/chains). With PATH only what is at and below it is
compared. Contents are compared by their digests: nothing is read or fetched.

--format takes json, or a Go template with the fields .Kind .Path.`,
		Example: `  imgfs diff nginx:1.26 nginx:1.27
  imgfs diff nginx:1.26 nginx:1.27 /etc
  imgfs diff sha256:4f4fb700ef54… sha256:a3ed95caeb02…`,
		Args:              takes(2, 3, "A B [PATH]"),
		ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			print, err := linePrinter(format, printDifference)
			if err != nil {
				return err
			}
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			var roots [2]string
			for i := range roots {
				if roots[i], err = treeOf(mount, args[i]); err != nil {
					return err
				}
			}
			below := "/"
			if len(args) == 3 {
				below = args[2]
			}
			found, err := diffTrees(roots[0], roots[1], below)
			if err != nil {
				return err
			}
			for _, d := range found {
				if err := print(cmd.OutOrStdout(), d); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "print each file as json, or by a Go `TEMPLATE`")
	mountFlag(cmd)
	return cmd
}

func printDifference(w io.Writer, d difference) error {
	_, err := fmt.Fprintf(w, "%s %s\n", d.Kind, shownPath(d.Path))
	return err
}

// treeOf is the directory that an argument of diff means: that of an image, a
// layer or a chain. It pulls nothing.
func treeOf(mount, text string) (string, error) {
	kinds, hex := []string{"layers", "chains"}, hexOf(text)
	inControl := false
	if rel, ok := controlPath(mount, text); ok {
		// One of an image of .imgfs is resolve's.
		if kind, name, _ := strings.Cut(strings.TrimPrefix(rel, control+"/"), "/"); slices.Contains(kinds, kind) {
			kinds, hex, inControl = []string{kind}, name, true
		}
	}
	if inControl || len(hex) == 64 && idForm.MatchString(hex) {
		for _, kind := range kinds {
			dir := filepath.Join(mount, control, kind, hex)
			if _, err := os.Lstat(dir); err == nil {
				return dir, nil
			}
		}
	}
	if inControl {
		return "", fmt.Errorf("%q: no such layer or intermediate image here", text)
	}
	img, err := resolve(mount, text)
	if err != nil {
		return "", err
	}
	return filepath.Join(mount, img.name.path), nil
}

// diffTrees are the differences of what is at and below a path in two directory
// trees, sorted by path. No file is read.
func diffTrees(a, b, below string) ([]difference, error) {
	at := path.Clean("/" + below)
	var sides [2]entry
	for i, root := range []string{a, b} {
		dir, err := inside(root, path.Dir(at)+"/")
		if err == nil {
			defer dir.Close()
			sides[i], err = entryIn(dir, cmp.Or(strings.Trim(path.Base(at), "/"), "."), at)
		}
		if err != nil && !isMissing(err) {
			return nil, fmt.Errorf("%q: %s", filepath.Join(root, at), errnoText(err))
		}
	}
	if !sides[0].here && !sides[1].here {
		return nil, fmt.Errorf("%q: in neither of them", at)
	}
	var walk differ
	if _, err := walk.compare(sides[0], sides[1]); err != nil {
		return nil, err
	}
	slices.SortFunc(walk.found, func(x, y difference) int { return strings.Compare(x.Path, y.Path) })
	return walk.found, nil
}

// isMissing reports whether a path is not there.
func isMissing(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) }

// differ walks two trees in step.
type differ struct {
	found []difference
}

// entry is one side of a step.
type entry struct {
	here bool
	path string // in the tree
	proc string // in /proc, by the descriptor of its directory
	st   unix.Stat_t
}

func (e entry) isDir() bool { return e.here && e.st.Mode&unix.S_IFMT == unix.S_IFDIR }

func (d *differ) add(kind, path string) { d.found = append(d.found, difference{kind, path}) }

// compare adds the differences between two entries of one path, and those below
// them. It reports whether there are any.
func (d *differ) compare(a, b entry) (bool, error) {
	switch {
	case a.here && !b.here:
		d.add("D", a.path)
		return true, nil
	case !a.here:
		d.add("A", b.path)
		if b.isDir() {
			_, err := d.children(a, b)
			return true, err
		}
		return true, nil
	}
	// One inode is one file, in whichever images it is. Directories have a number
	// for each place.
	if a.st.Ino == b.st.Ino && a.st.Dev == b.st.Dev && a.st.Mode&unix.S_IFMT == b.st.Mode&unix.S_IFMT && !a.isDir() {
		return false, nil
	}
	changed, err := differs(a, b)
	if err != nil {
		return false, err
	}
	if a.isDir() || b.isDir() {
		inner, err := d.children(a, b)
		if err != nil {
			return false, err
		}
		changed = changed || inner
	}
	if changed && b.path != "/" {
		d.add("C", b.path)
	}
	return changed, nil
}

// children compares what is in two directories; an entry that is none has no
// children. What was below a directory that is now a file is not named, as
// nothing is below a deleted directory.
func (d *differ) children(a, b entry) (bool, error) {
	if !b.isDir() {
		return true, nil
	}
	left, err := openEntries(a)
	if err != nil {
		return false, err
	}
	defer left.close()
	right, err := openEntries(b)
	if err != nil {
		return false, err
	}
	defer right.close()
	names := slices.Concat(left.names, right.names)
	slices.Sort(names)
	changed := false
	for _, name := range slices.Compact(names) {
		x, err := left.entry(name, path.Join(b.path, name))
		if err != nil {
			return false, err
		}
		y, err := right.entry(name, path.Join(b.path, name))
		if err != nil {
			return false, err
		}
		differ, err := d.compare(x, y)
		if err != nil {
			return false, err
		}
		changed = changed || differ
	}
	return changed, nil
}

// entries is an open directory. The zero value is one that holds nothing.
type entries struct {
	f     *os.File
	names []string
	has   map[string]bool
}

func openEntries(e entry) (*entries, error) {
	if !e.isDir() {
		return &entries{}, nil
	}
	f, err := os.Open(e.proc) // what is behind it was found to be a directory
	if err != nil {
		return nil, fmt.Errorf("%q: %w", e.path, cause(err))
	}
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%q: %w", e.path, cause(err)), f.Close())
	}
	has := make(map[string]bool, len(names))
	for _, name := range names {
		has[name] = true
	}
	return &entries{f, names, has}, nil
}

func (e *entries) close() {
	if e.f != nil {
		e.f.Close()
	}
}

// entry is that of a name in the directory.
func (e *entries) entry(name, at string) (entry, error) {
	if !e.has[name] {
		return entry{path: at}, nil
	}
	out, err := entryIn(e.f, name, at)
	if err != nil {
		return out, fmt.Errorf("%q: %w", at, err)
	}
	return out, nil
}

// entryIn is that of a name in an open directory; at is its path in the tree.
func entryIn(dir *os.File, name, at string) (entry, error) {
	out := entry{path: at, proc: fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name)}
	err := unix.Fstatat(int(dir.Fd()), name, &out.st, unix.AT_SYMLINK_NOFOLLOW)
	out.here = err == nil
	return out, err
}

// differs compares two entries by all that is known of them without reading.
func differs(a, b entry) (bool, error) {
	x, y := &a.st, &b.st
	if x.Mode != y.Mode || x.Uid != y.Uid || x.Gid != y.Gid || x.Rdev != y.Rdev {
		return true, nil
	}
	if !a.isDir() && (x.Size != y.Size || x.Mtim != y.Mtim) {
		return true, nil
	}
	switch x.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		p, err := os.Readlink(a.proc)
		if err != nil {
			return false, fmt.Errorf("%q: %w", a.path, cause(err))
		}
		q, err := os.Readlink(b.proc)
		if err != nil {
			return false, fmt.Errorf("%q: %w", b.path, cause(err))
		}
		if p != q {
			return true, nil
		}
	case unix.S_IFREG:
		// A content without a digest may be anything.
		if p, q := fact(a.proc, "digest"), fact(b.proc, "digest"); x.Size > 0 && (p == "" || p != q) {
			return true, nil
		}
	}
	p, err := listedXattrs(a.proc)
	if err != nil {
		return false, fmt.Errorf("%q: %w", a.path, err)
	}
	q, err := listedXattrs(b.proc)
	if err != nil {
		return false, fmt.Errorf("%q: %w", b.path, err)
	}
	return !slices.Equal(p, q), nil
}

// maxXattrs is the most that the kernel passes: names of an inode, or a value.
const maxXattrs = 64 << 10

// listedXattrs are the extended attributes that an inode says it has, as
// "name=value", sorted.
func listedXattrs(path string) ([]string, error) {
	buf := make([]byte, maxXattrs)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.EOPNOTSUPP) || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []string
	value := make([]byte, maxXattrs)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(path, name, value)
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) {
			n, err = 0, nil // trusted.* is root's to see
		}
		if err != nil {
			return nil, err
		}
		all = append(all, name+"="+string(value[:n]))
	}
	slices.Sort(all)
	return all, nil
}
