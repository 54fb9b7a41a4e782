package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	readers    = 8       // files read at once
	readBuffer = 1 << 20 // bytes
)

// content is a regular file of an image, under one of its names.
type content struct {
	ino  uint64
	path string
	size int64
}

// readAll reads every file of an image, each once, in the order of the layers,
// which is that of their inode numbers.
func readAll(ctx context.Context, cmd *cobra.Command, mount string, want image) error {
	start := time.Now().Add(-time.Second)
	files, total, err := contents(filepath.Join(mount, want.path))
	if err != nil {
		return fmt.Errorf("%q: %w", want.ref, err)
	}
	bar, done := progress(cmd, want, total)
	ended := make(chan error, 1)
	go func() {
		var group errgroup.Group
		group.SetLimit(readers)
		for _, file := range files {
			group.Go(func() error { return readFile(file.path, bar) })
		}
		ended <- group.Wait()
	}()
	select {
	case err = <-ended:
	case <-ctx.Done(): // what still reads ends with this process
		done(false)
		return fmt.Errorf("%q: interrupted; what was read is here", want.ref)
	}
	done(err == nil)
	if err != nil {
		if why := reason(mount, want, start); why != "" {
			return fmt.Errorf("%q: %w: %s", want.ref, err, why)
		}
		return fmt.Errorf("%q: %w", want.ref, err)
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s: %d files, %s, are here\n", want.ref, len(files), humanSize(total))
	return nil
}

// contents are the distinct regular files below root, and their bytes.
func contents(root string) ([]content, int64, error) {
	var files []content
	err := filepath.WalkDir(root, func(path string, d iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.Type().IsRegular() {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			files = append(files, content{st.Ino, path, info.Size()})
		}
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	slices.SortStableFunc(files, func(a, b content) int { return cmp.Compare(a.ino, b.ino) })
	files = slices.CompactFunc(files, func(a, b content) bool { return a.ino == b.ino })
	var total int64
	for _, f := range files {
		total += f.size
	}
	return files, total, nil
}

// readFile reads path to its end and adds what it read to bar, which may be nil.
func readFile(path string, bar *mpb.Bar) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOATIME, 0)
	if errors.Is(err, iofs.ErrPermission) {
		f, err = os.Open(path) // only the owner may ask for O_NOATIME
	}
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, readBuffer)
	for {
		n, err := f.Read(buf)
		if bar != nil {
			bar.IncrBy(n)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// progress shows a bar on a terminal, and nothing elsewhere. The function ends
// it.
func progress(cmd *cobra.Command, want image, total int64) (*mpb.Bar, func(ok bool)) {
	out, ok := cmd.OutOrStdout().(*os.File)
	if !ok || !isTerminal(out) {
		return nil, func(bool) {}
	}
	bars := mpb.New(mpb.WithOutput(out))
	bar := bars.AddBar(total,
		mpb.BarRemoveOnComplete(),
		mpb.PrependDecorators(decor.Name(want.ref+" ")),
		mpb.AppendDecorators(decor.CountersKiloByte("% .1f / % .1f")))
	return bar, func(ok bool) {
		if !ok {
			bar.Abort(true)
		} else {
			bar.SetTotal(-1, true)
		}
		bars.Wait()
	}
}

// isTerminal reports whether f is a terminal that can move its cursor.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil && os.Getenv("TERM") != "dumb"
}
