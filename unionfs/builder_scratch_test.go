package unionfs

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestBuilderDiskFull builds on a file system of 2 MiB: the error says that it is
// full, and no signal ends the process.
func TestBuilderDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	b, err := NewBuilder(dir)
	must(t, err)
	defer b.Close()
	for i := range 1_000_000 {
		if _, err = b.Add(file(fmt.Sprint("file-", i), fmt.Sprint(i))); err != nil {
			break
		}
	}
	if !errors.Is(err, unix.ENOSPC) || errors.Is(err, iofs.ErrInvalid) {
		t.Fatalf("Add() = %v, want ENOSPC", err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("%d names in the scratch directory, %v", len(left), err)
	}
	if _, err := b.Lookup(RootID, "file-1"); err != nil {
		t.Errorf("Lookup() = %v afterwards", err)
	}
}

// TestBuilderNoScratch has no place for a scratch file: a layer that needs none is
// built, a larger one fails.
func TestBuilderNoScratch(t *testing.T) {
	b, err := NewBuilder(t.TempDir() + "/nowhere")
	must(t, err)
	defer b.Close()
	for i := range 1_000_000 {
		if _, err = b.Add(file(fmt.Sprint("file-", i), fmt.Sprint(i))); err != nil {
			if i < 1000 || !errors.Is(err, iofs.ErrNotExist) {
				t.Errorf("Add() = %v after %d files", err, i)
			}
			return
		}
	}
	t.Error("a million files need no scratch file")
}

// TestBuilderDropsMuch has a tree of many names superseded and made again.
func TestBuilderDropsMuch(t *testing.T) {
	b := newBuilder(t)
	add := func(e *Entry) {
		if _, err := b.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	const n = 20_000
	for round := range 3 {
		for i := range n {
			add(file(fmt.Sprintf("d/s%d/f%d", i%100, i), ""))
		}
		if round < 2 {
			add(file("d", ""))
			add(dir("d"))
		}
	}
	if got, want := b.Replaced(), 2*(n+100+2); got != want {
		t.Errorf("Replaced() = %d, want %d", got, want)
	}
	x := openIndex(t, writeIndex(t, b))
	sameLayer(t, b, x)
	if got, want := x.Stats().Names, uint32(n+100+1); got != want {
		t.Errorf("Names = %d, want %d", got, want)
	}
}

// TestBuilderWaitsForNoWriter shows that asking for changes does not wait while
// the lock is held for reading, as Write holds it.
func TestBuilderWaitsForNoWriter(t *testing.T) {
	b := build(t, file("a", ""))
	b.mu.RLock()
	defer b.mu.RUnlock()
	asked := make(chan struct{})
	go func() {
		b.Changed()
		b.Fail(errors.New("failed"))
		b.Err()
		close(asked)
	}()
	select {
	case <-asked:
	case <-time.After(10 * time.Second):
		t.Error("Changed() waits for a reader")
	}
}

// TestBuilderHostile has archives whose cost must stay in proportion.
func TestBuilderHostile(t *testing.T) {
	var entries []*Entry
	for i := range 50_000 { // one name, again and again, in a large directory
		entries = append(entries, file("d/same", ""), file(fmt.Sprint("d/", i), ""))
	}
	deep := "d"
	for range MaxDepth - 2 {
		deep += "/d"
	}
	entries = append(entries, file("d", ""), dir("d"), file(deep+"/x", ""), file("d", ""))
	entries = append(entries, symlink("l0", "."))
	for i := range 30 { // symbolic links that make paths grow
		entries = append(entries, symlink(fmt.Sprint("l", i+1), fmt.Sprintf("l%d/l%d", i, i)))
	}
	b := build(t, entries...)
	if _, err := b.Add(file("l30/x", "")); !errors.Is(err, iofs.ErrInvalid) {
		t.Errorf("Add() through %d links = %v", 1<<30, err)
	}
	sameLayer(t, b, openIndex(t, writeIndex(t, b)))
}
