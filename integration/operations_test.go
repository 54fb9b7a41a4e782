package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// TestOperations goes through the tables of docs/namespace.md by the scripts in
// testdata/operations, as people do it: with coreutils and with imgfs, on a real
// mount of Debian's docker-registry. Each script has a registry of its own, which
// is docker.io to it and also $REGISTRY, a host with a port. Commands besides
// those of TestScripts:
//
//	push NAME:TAG IMAGE [index]   pushes an image of the cast
//	id VARIABLE IMAGE             sets VARIABLE to its ID's 64 digits, VARIABLE12 to the first 12
//	want ERRNO SYSCALL PATH…      calls mkdir, rmdir, unlink, symlink, rename, noreplace, exchange, whiteout or stat
//	state FILE                    writes down all that .imgfs says of what is here
//	same A B                      compares two files, but for ages and for the widths of columns
//	restart                       unmounts and mounts again
func TestOperations(t *testing.T) {
	needFUSE(t)
	need(t, "docker-registry", "getfattr")
	bin := scriptBinary(t)
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "operations"),
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			if err := setupScript(env, bin); err != nil {
				return err
			}
			return setupRegistry(env)
		},
		Condition: fuseCondition,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":      exitsCommand,
			"capture":    captureCommand,
			"mounted":    mountedCommand,
			"eventually": eventuallyCommand,
			"push":       pushCommand,
			"id":         idCommand,
			"want":       wantCommand,
			"state":      stateCommand,
			"restart":    restartCommand,
			"same":       sameCommand,
		},
	})
}

// setupRegistry starts the script's registry, and makes the configuration that
// maps docker.io to it.
func setupRegistry(env *testscript.Env) error {
	d := &distribution{name: "registry-" + filepath.Base(env.WorkDir)}
	host, err := d.launch()
	if err != nil {
		return err
	}
	env.Defer(d.stop)
	env.Setenv("REGISTRY", host)
	env.Setenv("LC_ALL", "C")
	certs := filepath.Join(env.WorkDir, "certs.d")
	if err := writeHubConfig(certs, host); err != nil {
		return err
	}
	config := filepath.Join(env.WorkDir, "config/imgfs/imgfs.toml")
	old, err := os.ReadFile(config)
	if err != nil {
		return err
	}
	return os.WriteFile(config, fmt.Appendf(old, "certs-dir = %q\nplatform = \"linux/%s\"\ncache-size = \"1GiB\"\n", certs, castArch), 0o600)
}

func pushCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: push NAME:TAG IMAGE [index]")
	}
	ts.Check(pushCast(hubReference(ts.Getenv("REGISTRY"), args[0]), args[1], len(args) > 2))
}

// hubReference is where docker.io's name is in the registry that plays it.
func hubReference(host, name string) string {
	first, _, ok := strings.Cut(name, "/")
	switch {
	case !ok:
		return host + "/library/" + name
	case strings.ContainsAny(first, ".:"):
		return name
	}
	return host + "/" + name
}

func idCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: id VARIABLE IMAGE")
	}
	img, err := makeCast(args[1], castArch)
	ts.Check(err)
	id, err := img.ConfigName()
	ts.Check(err)
	ts.Setenv(args[0], id.Hex)
	ts.Setenv(args[0]+"12", id.Hex[:12])
	digest, err := img.Digest()
	ts.Check(err)
	ts.Setenv(args[0]+"digest", digest.String())
}

// errnos are the ones that the tables promise.
var errnos = map[string]unix.Errno{"OK": 0, "ENOENT": unix.ENOENT, "EEXIST": unix.EEXIST, "EROFS": unix.EROFS, "ENOTEMPTY": unix.ENOTEMPTY, "EINVAL": unix.EINVAL,
	"EPERM": unix.EPERM, "EBUSY": unix.EBUSY, "ENOTDIR": unix.ENOTDIR, "EISDIR": unix.EISDIR, "EACCES": unix.EACCES, "ENODATA": unix.ENODATA, "EHOSTUNREACH": unix.EHOSTUNREACH}

func wantCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: want ERRNO SYSCALL PATH…")
	}
	want, ok := errnos[args[0]]
	if !ok {
		ts.Fatalf("unknown errno %s", args[0])
	}
	if got := errnoOf(systemCall(ts, args[1], args[2:])); got != want {
		ts.Fatalf("%s: errno %d (%v), want %s", strings.Join(args[1:], " "), got, got, args[0])
	}
}

func systemCall(ts *testscript.TestScript, call string, paths []string) error {
	at := func(i int) string {
		if i >= len(paths) {
			ts.Fatalf("%s: %d paths are too few", call, len(paths))
		}
		return ts.MkAbs(paths[i])
	}
	switch call {
	case "mkdir":
		return unix.Mkdir(at(0), 0o755)
	case "rmdir":
		return unix.Rmdir(at(0))
	case "unlink":
		return unix.Unlink(at(0))
	case "touch":
		return touch(at(0))
	case "symlink":
		return unix.Symlink(paths[0], at(1))
	case "link":
		return unix.Link(at(0), at(1))
	case "rename":
		return rename2(at(0), at(1), 0)
	case "noreplace":
		return rename2(at(0), at(1), unix.RENAME_NOREPLACE)
	case "exchange":
		return rename2(at(0), at(1), unix.RENAME_EXCHANGE)
	case "whiteout":
		return rename2(at(0), at(1), unix.RENAME_WHITEOUT)
	case "chmod":
		return unix.Chmod(at(0), 0o700)
	case "create":
		f, err := os.Create(at(0))
		if err == nil {
			f.Close()
		}
		return err
	case "stat":
		var st unix.Stat_t
		return unix.Lstat(at(0), &st)
	}
	ts.Fatalf("unknown system call %s", call)
	return nil
}

// ages are what tables show of times; they change while a test runs.
var ages = regexp.MustCompile(`(About an?|Less than a|\d+) (second|minute|hour|day|week|month|year)s?( ago)?`)

// diskFree is what is true of the disk that the cache is on.
var diskFree = regexp.MustCompile(`(?m)^DISK FREE .*$`)

// stateFiles are what .imgfs says of what is here, and of nothing else.
var stateFiles = []string{"images", "images.json", "df", "layers.json", "chains.json"}

func stateCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: state FILE")
	}
	control := filepath.Join(ts.MkAbs("."), ".imgfs")
	if _, err := os.Stat(control); err != nil {
		control = filepath.Join(ts.Getenv("IMGFS_MOUNT"), ".imgfs")
	}
	var b strings.Builder
	for _, name := range stateFiles {
		data, err := os.ReadFile(filepath.Join(control, name))
		ts.Check(err)
		fmt.Fprintf(&b, "%s\n%s\n", name, diskFree.ReplaceAll(ages.ReplaceAll(data, []byte("AGE")), nil))
	}
	for _, dir := range []string{"ids", "dangling", "layers", "chains"} {
		entries, err := os.ReadDir(filepath.Join(control, dir))
		ts.Check(err)
		for _, e := range entries {
			var st unix.Stat_t
			ts.Check(unix.Lstat(filepath.Join(control, dir, e.Name()), &st))
			fmt.Fprintf(&b, "%s/%s %v\n", dir, e.Name(), e.Type())
		}
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(b.String()), 0o644))
}

func restartCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: restart")
	}
	dir := ts.Getenv("IMGFS_MOUNT")
	ts.Check(ts.Exec("imgfs", "umount", dir))
	ts.Check(ts.Exec("imgfs", "mount", dir))
}

// plainly is a text without ages, and without the widths of its columns.
func plainly(text string) string {
	text = ages.ReplaceAllString(text, "AGE")
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString(strings.Join(strings.Fields(line), " ") + "\n")
	}
	return strings.TrimSpace(b.String())
}

func sameCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: same A B")
	}
	want := os.Expand(ts.ReadFile(args[1]), ts.Getenv)
	if got := ts.ReadFile(args[0]); plainly(got) != plainly(want) {
		ts.Fatalf("%s is\n%s\nwant\n%s", args[0], got, want)
	}
}
