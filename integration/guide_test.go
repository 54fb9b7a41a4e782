package integration

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write docs/guide.md with what its commands print")

// A guide is docs/guide.md as it is run: its console blocks by a shell, in order,
// below a mount that it makes itself.
type guide struct {
	t        testing.TB
	host     string
	dir      string // what /mnt/images is
	work     string
	commands int
}

// guideMount is where the page says that the mount is.
const guideMount = "/mnt/images"

// TestGuide runs the commands of docs/guide.md and compares what they print with
// what the page says. Lines "<!-- run: push NAME:TAG IMAGE -->", which no reader
// sees, push images of the cast.
func TestGuide(t *testing.T) {
	needFUSE(t)
	need(t, "docker-registry", "getfattr")
	page := filepath.Join("..", "docs", "guide.md")
	old, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	g := newGuide(t)
	text := g.run(string(old))
	if g.commands < 60 {
		t.Errorf("the page has %d commands, want a tour", g.commands)
	}
	if g.normal(text) == g.normal(string(old)) {
		return
	}
	if *update {
		if err := os.WriteFile(page, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	fresh := filepath.Join(g.work, "guide.md")
	if err := os.WriteFile(fresh, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	diff, _ := exec.Command("diff", "-U2", page, fresh).CombinedOutput()
	t.Errorf("docs/guide.md is stale (go test ./integration -run TestGuide -update):\n%s", diff)
}

func newGuide(t *testing.T) *guide {
	g := &guide{t: t, work: t.TempDir()}
	d := &distribution{name: "registry-guide"}
	g.host = d.start(t)
	t.Cleanup(d.stop)
	g.dir = filepath.Join(g.work, "mnt")
	for _, dir := range []string{"mnt", "home", "config/imgfs", "bin"} {
		if err := os.MkdirAll(filepath.Join(g.work, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(binary(t), filepath.Join(g.work, "bin/imgfs")); err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf("cache-dir = %q\ncerts-dir = %q\nplatform = \"linux/%s\"\ncache-size = \"10GiB\"\n", filepath.Join(g.work, "cache"), hubConfig(t, g.work, g.host), castArch)
	if err := os.WriteFile(filepath.Join(g.work, "config/imgfs/imgfs.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = exec.Command("umount", "-l", g.dir).Run() })
	return g
}

// moments are what changes from run to run: times, what the disk has left, and
// when which layer of a pull was heard of.
var moments = regexp.MustCompile(`(?m)\d{4}-\d\d-\d\dT[0-9:.]+Z|^DISK FREE \d+$|^[0-9a-f]{12}: .*\n`)

// normal is a page without what changes from run to run.
func (g *guide) normal(page string) string { return plainly(moments.ReplaceAllString(page, "")) }

// run returns the page with the outputs of its commands anew.
func (g *guide) run(page string) string {
	var b strings.Builder
	inside := false
	for line := range strings.Lines(page) {
		switch {
		case strings.HasPrefix(line, "```"):
			inside = line == "```console\n"
		case inside && strings.HasPrefix(line, "$ "):
			b.WriteString(line)
			g.commands++
			b.WriteString(g.shell(strings.TrimSpace(line[2:])))
			continue
		case inside:
			continue // the old output
		}
		if hidden, ok := strings.CutPrefix(line, "<!-- run: push "); ok {
			f := strings.Fields(hidden)
			if err := pushCast(hubReference(g.host, f[0]), f[1], f[2] == "index"); err != nil {
				g.t.Fatalf("%s: %v", strings.TrimSpace(line), err)
			}
		}
		b.WriteString(line)
	}
	return b.String()
}

// shell runs a command as a shell does, on both streams as they come.
func (g *guide) shell(command string) string {
	cmd := exec.Command("bash", "-c", "exec 2>&1\n"+strings.ReplaceAll(command, guideMount, g.dir))
	cmd.Dir = g.work
	cmd.Env = []string{"PATH=" + filepath.Join(g.work, "bin") + ":" + os.Getenv("PATH"), "HOME=" + filepath.Join(g.work, "home"), "LC_ALL=C", "TZ=UTC",
		"XDG_CONFIG_HOME=" + filepath.Join(g.work, "config"), "IMGFS_MOUNT=" + g.dir, "TMPDIR=" + os.TempDir()}
	out, err := runFor(cmd, time.Minute)
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		g.t.Fatalf("%s: %v\n%s", command, err, out)
	}
	g.settle()
	out = strings.ReplaceAll(out, g.dir, guideMount)
	if out != "" && !strings.HasSuffix(out, "\n") {
		out += "\n"
	}
	return out
}

// settle waits until no layer arrives any more: the reader of the page takes longer
// to type the next command.
func (g *guide) settle() {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		var df totals
		data, err := os.ReadFile(filepath.Join(g.dir, ".imgfs/df.json"))
		if err != nil || json.Unmarshal(data, &df) == nil && df.Arriving == 0 {
			return
		}
	}
	g.t.Errorf("after %v layers still arrive", patience)
}
