package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// TestUsersOf keeps a file system of its own busy in each way, and looks for the
// one who does it.
func TestUsersOf(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("imgfs-test", dir, "tmpfs", 0, ""); err != nil {
		t.Skipf("a mount of its own: %v (needs root)", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
	if err != nil || len(mounts) != 1 {
		t.Fatalf("GetMounts = %v, %v", mounts, err)
	}
	at := placeOf(mounts[0])
	if users := usersOf("/proc", at); len(users) != 0 {
		t.Errorf("usersOf(unused) = %v, want none", users)
	}

	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(dir, "sleep")
	if err := os.WriteFile(own, program, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}

	t.Run("cwd", func(t *testing.T) {
		cmd := exec.Command(sleep, "60")
		cmd.Dir = dir
		expectUser(t, at, cmd, "working directory")
	})
	t.Run("exe", func(t *testing.T) {
		expectUser(t, at, exec.Command(own, "60"), "program, mapped file")
	})
	t.Run("fd", func(t *testing.T) {
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(sleep, "60")
		cmd.ExtraFiles = []*os.File{f, f}
		expectUser(t, at, cmd, "2 open files", f)
	})
}

// expectUser starts cmd and wants it to be the only user of the mount; files are
// closed in this process first.
func expectUser(t *testing.T, at place, cmd *exec.Cmd, how string, files ...*os.File) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait() // it was killed
	}()
	for _, f := range files {
		f.Close()
	}
	// Start returns when the program runs, but its image may still be read.
	users := usersOf("/proc", at)
	if len(users) != 1 || users[0].pid != cmd.Process.Pid || strings.Join(users[0].how, ", ") != how {
		t.Errorf("usersOf = %v, want pid %d: %s", users, cmd.Process.Pid, how)
	}
	if len(users) == 1 && users[0].name != "sleep" {
		t.Errorf("name = %q, want sleep", users[0].name)
	}
}

func TestProcessNameIsEscaped(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "comm"), []byte("a\x1b[2Jb\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := processName(dir), `a\x1b[2Jb`; got != want {
		t.Errorf("processName = %q, want %q", got, want)
	}
}

func TestMapsOtherDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "maps")
	text := "7f0000000000-7f0000001000 r--p 00000000 00:2f 0 \n" +
		"7f0000001000-7f0000002000 r-xp 00000000 fe:01 1234 /usr/bin/x\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		dev  uint64
		want bool
	}{
		{unix.Mkdev(0xfe, 1), true},
		{unix.Mkdev(0, 0x2f), false}, // anonymous memory: inode 0
		{unix.Mkdev(0, 0x30), false},
	} {
		if got := (place{dev: tt.dev}).maps(file); got != tt.want {
			t.Errorf("maps(%x) = %v, want %v", tt.dev, got, tt.want)
		}
	}
}
