package integration

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// benchLinks are the links to a registry.
var benchLinks = []benchLink{
	{"100M", &link{latency: 20 * time.Millisecond, mbit: 100}},
	{"1G", &link{latency: 5 * time.Millisecond, mbit: 1000}},
}

type benchLink struct {
	name string
	link *link
}

// coldBench is one image over one link.
type coldBench struct {
	t     *testing.T
	image benchImage
	r     *registry
	work  string
	runs  int // made so far, for names
}

// side is one way from nothing to the first useful command done.
type side struct {
	name  string
	needs []string // programs
	// prepare does what is not timed, and returns what is; undo may be nil.
	prepare func(b *coldBench) (run func(), undo func())
}

var coldSides = []side{
	{"imgfs eStargz", []string{"runc"}, func(b *coldBench) (func(), func()) { return b.imgfs("estargz") }},
	{"imgfs eStargz + profile", []string{"runc"}, func(b *coldBench) (func(), func()) { return b.profiled("estargz") }},
	{"imgfs zstd:chunked", []string{"runc"}, func(b *coldBench) (func(), func()) { return b.imgfs("zstdchunked") }},
	{"imgfs gzip", []string{"runc"}, func(b *coldBench) (func(), func()) { return b.imgfs("gzip") }},
	{"imgfs zstd", []string{"runc"}, func(b *coldBench) (func(), func()) { return b.imgfs("zstd") }},
	{"ctr pull + run", []string{"containerd", "ctr", "runc"}, (*coldBench).ctr},
	{"skopeo + umoci", []string{"skopeo", "umoci", "runc"}, (*coldBench).umoci},
	{"curl \\| gunzip", []string{"curl"}, (*coldBench).curl},
}

// TestBenchCold is from nothing to the first useful command done.
func TestBenchCold(t *testing.T) {
	overLinks(t, benchLinks, coldSides, "ctr pull + run", table{
		title: "Cold start",
		text:  "From nothing to the first useful command done: seconds, MB and requests of the registry; medians of %d. In brackets the speed-up over `ctr pull + run`.",
	})
}

// overLinks makes a table for each link, whose title begins as that of out.
func overLinks(t *testing.T, links []benchLink, sides []side, base string, out table) {
	dir := bench(t)
	name, _, _ := strings.Cut(strings.ToLower(out.title), " ")
	for _, l := range links {
		if benchChosen("IMGFS_BENCH_LINKS", l.name) {
			t.Run(l.name, func(t *testing.T) {
				over := out
				over.title += ", " + l.link.String()
				sidesOver(t, l.link, sides, base, over).save(t, dir, name+"-"+l.name)
			})
		}
	}
}

// sidesOver runs all sides with all images over a link, in turns, and fills out,
// whose text has a place for the number of runs. Speed-ups are over the side base.
func sidesOver(t *testing.T, l *link, all []side, base string, out table) *table {
	r := startRegistry(t)
	r.through(l)
	out.text = fmt.Sprintf(out.text, benchRuns(t))
	out.head = []string{"image"}
	var sides []side
	for _, s := range all {
		if benchChosen("IMGFS_BENCH_SIDES", s.name) && have(s.needs...) {
			sides = append(sides, s)
			out.head = append(out.head, s.name)
		}
	}
	speedups := make([][]float64, len(sides))
	for _, image := range benchImages {
		if !benchChosen("IMGFS_BENCH_IMAGES", image.name) {
			continue
		}
		b := &coldBench{t: t, image: image, r: r, work: t.TempDir()}
		samples := make([][]sample, len(sides))
		for range benchRuns(t) {
			for i, s := range sides {
				samples[i] = append(samples[i], b.once(s))
			}
		}
		row, than := []string{image.name}, time.Duration(0)
		for i, s := range sides {
			if s.name == base {
				than = median(samples[i]).time
			}
		}
		for i := range sides {
			m := median(samples[i])
			text := m.String()
			if than > 0 {
				x := float64(than) / float64(m.time)
				speedups[i] = append(speedups[i], x)
				text += fmt.Sprintf(" (%.2f×)", x)
			}
			row = append(row, text)
		}
		t.Logf("%s: %s", l, strings.Join(row, " | "))
		out.add(row...)
	}
	mean := []string{"geometric mean"}
	for _, xs := range speedups {
		mean = append(mean, fmt.Sprintf("%.2f×", geometricMean(xs)))
	}
	out.add(mean...)
	return &out
}

func geometricMean(xs []float64) float64 {
	sum := 0.0
	for _, x := range xs {
		sum += math.Log(x)
	}
	return math.Exp(sum / float64(max(len(xs), 1)))
}

func have(programs ...string) bool {
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			return false
		}
	}
	return true
}

// once runs a side.
func (b *coldBench) once(s side) sample {
	b.t.Helper()
	b.runs++
	run, undo := s.prepare(b)
	b.r.reset()
	start := time.Now()
	run()
	took := time.Since(start)
	requests, bytes, _ := b.r.traffic()
	if os.Getenv("IMGFS_BENCH_LOG") != "" {
		b.t.Logf("%s, %v:\n%s", s.name, took, b.r.describe())
	}
	if undo != nil {
		undo()
	}
	return sample{took, bytes, requests}
}

// push makes the image available in a format, and returns its path in the mount.
func (b *coldBench) push(format string) string {
	return b.r.push(b.t, benchPrefix+b.image.name, format)
}

// imgfs mounts an empty cache; timed is an overlayfs over the image, and the
// command in it.
func (b *coldBench) imgfs(format string, flags ...string) (func(), func()) {
	path := b.push(format)
	m := startMount(b.t, flags...)
	bundle := b.bundle()
	return func() {
			b.overlayOn(m.path(path), bundle)
			b.runc(bundle)
		}, func() {
			if err := unix.Unmount(filepath.Join(bundle, "rootfs"), 0); err != nil {
				b.t.Error(err)
			}
			m.stop()
			if os.Getenv("IMGFS_BENCH_LOG") != "" {
				b.t.Log(m.tail())
			}
			b.keepProfile(m, format)
			os.RemoveAll(m.cache)
		}
}

// profiled is imgfs with the profile of an earlier start, made first if there is
// none.
func (b *coldBench) profiled(format string) (func(), func()) {
	dir := b.profiles(format)
	if _, err := os.Stat(dir); err != nil {
		run, undo := b.imgfs(format)
		run()
		undo()
	}
	return b.imgfs(format, "--prefetch", dir)
}

func (b *coldBench) profiles(format string) string { return filepath.Join(b.work, "profiles-"+format) }

// keepProfile keeps the profile of the first run.
func (b *coldBench) keepProfile(m *mount, format string) {
	b.t.Helper()
	if _, err := os.Stat(b.profiles(format)); err == nil {
		return
	}
	if err := os.Rename(filepath.Join(m.cache, "profiles"), b.profiles(format)); err != nil {
		b.t.Fatal(err)
	}
}

// bundle makes a runc bundle for the image's command, with an empty rootfs.
func (b *coldBench) bundle() string {
	b.t.Helper()
	dir := filepath.Join(b.work, fmt.Sprint("bundle-", b.runs))
	for _, d := range []string{"rootfs", "upper", "work"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			b.t.Fatal(err)
		}
	}
	b.spec(dir)
	return dir
}

// containerCapabilities are those that containerd gives.
var containerCapabilities = []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE"}

// spec writes a bundle's config.json.
func (b *coldBench) spec(dir string) {
	b.t.Helper()
	path := filepath.Join(dir, "config.json")
	os.Remove(path)
	mustRun(b.t, "runc", "spec", "--bundle", dir)
	data, err := os.ReadFile(path)
	if err != nil {
		b.t.Fatal(err)
	}
	var spec map[string]any
	if err := json.Unmarshal(data, &spec); err != nil {
		b.t.Fatal(err)
	}
	process := spec["process"].(map[string]any)
	process["terminal"], process["args"] = false, b.image.command
	process["capabilities"] = map[string]any{"bounding": containerCapabilities, "effective": containerCapabilities, "permitted": containerCapabilities}
	spec["root"] = map[string]any{"path": "rootfs", "readonly": false}
	if data, err = json.Marshal(spec); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

func (b *coldBench) overlayOn(lower, bundle string) {
	b.t.Helper()
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", strings.ReplaceAll(lower, ":", `\:`), bundle, bundle)
	if err := unix.Mount("overlay", filepath.Join(bundle, "rootfs"), "overlay", 0, options); err != nil {
		b.t.Fatalf("overlayfs over %s: %v", lower, err)
	}
}

func (b *coldBench) runc(bundle string) {
	b.t.Helper()
	mustRun(b.t, "runc", "run", "--bundle", bundle, fmt.Sprintf("imgfs-bench-%d-%d", os.Getpid(), b.runs))
}

// ctr pulls by containerd and runs.
func (b *coldBench) ctr() (func(), func()) {
	b.push("gzip")
	ctr := startContainerd(b.t)
	ref := b.r.host + "/debian:" + benchPrefix + b.image.name
	id := fmt.Sprintf("bench-%d", b.runs)
	return func() {
			ctr("images", "pull", "--plain-http", ref)
			ctr(append([]string{"run", "--rm", ref, id}, b.image.command...)...)
		}, func() {
			ctr("images", "rm", "--sync", ref)
		}
}

// containerd is one per run, with a state of its own.
var containerd struct {
	once sync.Once
	err  error
	argv []string
}

// startContainerd starts containerd unless it runs, and returns its client.
func startContainerd(t *testing.T) (ctr func(args ...string)) {
	t.Helper()
	containerd.once.Do(func() {
		dir := filepath.Join(scratch.dir, "containerd")
		sock := filepath.Join(dir, "sock")
		conf := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = %q\n",
			filepath.Join(dir, "root"), filepath.Join(dir, "state"), sock)
		if containerd.err = os.MkdirAll(dir, 0o755); containerd.err != nil {
			return
		}
		path := filepath.Join(dir, "config.toml")
		if containerd.err = os.WriteFile(path, []byte(conf), 0o644); containerd.err != nil {
			return
		}
		log, err := os.Create(filepath.Join(dir, "log"))
		if containerd.err = err; err != nil {
			return
		}
		defer log.Close()
		cmd := exec.Command("containerd", "--config", path)
		cmd.Stdout, cmd.Stderr = log, log
		cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGTERM}
		if containerd.err = cmd.Start(); containerd.err != nil {
			return
		}
		atExit(func() { cmd.Process.Signal(unix.SIGTERM); cmd.Wait() })
		containerd.argv = []string{"ctr", "--address", sock, "--namespace", "bench"}
		for range 200 {
			if exec.Command("ctr", "--address", sock, "version").Run() == nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		said, _ := os.ReadFile(log.Name())
		containerd.err = fmt.Errorf("containerd does not answer: %s", said)
	})
	if containerd.err != nil {
		t.Fatal(containerd.err)
	}
	return func(args ...string) {
		t.Helper()
		mustRun(t, append(containerd.argv[:len(containerd.argv):len(containerd.argv)], args...)...)
	}
}

// umoci copies the image by skopeo, unpacks it by umoci, and runs by runc.
func (b *coldBench) umoci() (func(), func()) {
	b.push("gzip")
	dir := filepath.Join(b.work, fmt.Sprint("umoci-", b.runs))
	if err := os.Mkdir(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	bundle := filepath.Join(dir, "bundle")
	return func() {
		mustRun(b.t, "skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false",
			"docker://"+b.r.host+"/debian:"+benchPrefix+b.image.name, "oci:"+dir+"/oci:image")
		mustRun(b.t, "umoci", "unpack", "--image", dir+"/oci:image", bundle)
		b.spec(bundle)
		b.runc(bundle)
	}, func() { os.RemoveAll(dir) }
}

// curl is the limit: all layers at once, decompressed, and thrown away.
func (b *coldBench) curl() (func(), func()) {
	b.push("gzip")
	img := openCorpus(b.t).image(b.t, benchPrefix+b.image.name, "gzip")
	return func() { b.gunzip(img) }, nil
}

func (b *coldBench) gunzip(img v1.Image) {
	b.t.Helper()
	m, err := img.Manifest()
	if err != nil {
		b.t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, l := range m.Layers {
		wg.Go(func() {
			url := fmt.Sprintf("http://%s/v2/debian/blobs/%s", b.r.host, l.Digest)
			if out, err := exec.Command("sh", "-c", "curl -sf "+url+" | gunzip > /dev/null").CombinedOutput(); err != nil {
				b.t.Errorf("curl: %v: %s", err, out)
			}
		})
	}
	wg.Wait()
}
