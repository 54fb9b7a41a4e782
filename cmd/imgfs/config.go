package main

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/fs"
)

// config is what mount is told, by flags and by imgfs.toml.
type config struct {
	dir    string // where to mount; absolute
	cwd    string // what relative paths are relative to; "": the working directory
	fsName string // the source in the mount table

	cacheDir  string
	cacheSize size
	pull      string
	platform  string
	verify    string
	du        string
	modes     string
	allow     []string
	deny      []string
	certsDir  string
	insecure  []string
	timeout   time.Duration
	prefetch  string

	allowOther   bool
	pullByOthers bool
	dev          bool
	suid         bool

	http       string
	logLevel   string
	logFile    string
	demo       bool
	foreground bool
}

// keys are the flags of mount that imgfs.toml may set, under the same names.
func (c *config) keys() *pflag.FlagSet {
	f := pflag.NewFlagSet("mount", pflag.ContinueOnError)
	f.StringVar(&c.cacheDir, "cache-dir", defaultCacheDir(), "keep what was fetched in `DIR`; one server at a time")
	f.Var(&c.cacheSize, "cache-size", "keep at most this much: 20GiB, or 30% of the file system (default: a fifth of what is free)")
	f.StringVar(&c.pull, "pull", "missing", "when to pull an image: `missing|never` (as soon as its path is walked, or only by mkdir and imgfs pull)")
	f.StringVar(&c.platform, "platform", "", "show images for `OS/ARCH[/VARIANT]` (default: this machine's)")
	f.StringVar(&c.verify, "verify", "on", "when to check content against its digest: `on|strict` (when it is fetched, or at every read too)")
	f.StringVar(&c.du, "du", "expanded", "what du counts: `expanded|cached` (the size of files, or what of them is on this disk)")
	f.StringSliceVar(&c.allow, "registry-allow", nil, "ask only registries that match `GLOB`; may be repeated")
	f.StringSliceVar(&c.deny, "registry-deny", nil, "never ask registries that match `GLOB`; may be repeated")
	f.StringVar(&c.certsDir, "certs-dir", "/etc/containerd/certs.d", "mirrors and certificates, laid out as containerd's certs.d, in `DIR`")
	f.StringSliceVar(&c.insecure, "insecure-registry", nil, "talk plain HTTP, or TLS unchecked, to `HOST`; may be repeated (loopback is plain HTTP by itself)")
	f.BoolVar(&c.allowOther, "allow-other", false, "let other users in")
	f.BoolVar(&c.pullByOthers, "pull-by-others", false, "with --allow-other, other users pull too, by your credentials")
	f.StringVar(&c.modes, "modes", "safe", "with --allow-other, modes of files: `safe|exact` (without write bits, or as they are)")
	f.BoolVar(&c.dev, "dev", false, "let device files work")
	f.BoolVar(&c.suid, "suid", false, "let set-user-ID programs work")
	f.DurationVar(&c.timeout, "timeout", time.Minute, "the longest that a read waits for a registry without progress")
	f.StringVar(&c.prefetch, "prefetch", "on", "have ready what an image's last start read: `on|off|DIR` (DIR: with profiles from elsewhere, too)")
	f.StringVar(&c.http, "http", "", "answer GET /metrics, /status and /healthz on `ADDR`, as localhost:9469 (default: nowhere)")
	f.StringVar(&c.logLevel, "log-level", "info", "what to log: `debug|info|warn|error`")
	f.StringVar(&c.logFile, "log-file", "", "write the log to `FILE` (default: imgfs.log in the cache directory; stderr with -f)")
	f.BoolVar(&c.demo, "demo", false, "serve a small image from a registry inside the process: no Internet needed")
	return f
}

// check looks for values that no mount can be made with.
func (c *config) check() error {
	for _, choice := range []struct {
		flag, value string
		words       []string
	}{
		{"pull", c.pull, []string{"missing", "never"}},
		{"verify", c.verify, []string{"on", "strict"}},
		{"du", c.du, []string{"expanded", "cached"}},
		{"modes", c.modes, []string{"safe", "exact"}},
		{"log-level", c.logLevel, []string{"debug", "info", "warn", "error"}},
	} {
		if !slices.Contains(choice.words, choice.value) {
			return usagef("--%s %q: must be %s", choice.flag, choice.value, strings.Join(choice.words, " or "))
		}
	}
	if c.prefetch == "" {
		return usagef("--prefetch: must be on, off or a directory")
	}
	if c.timeout <= 0 {
		return usagef("--timeout %v: must be more than nothing", c.timeout)
	}
	if err := checkPlatform(c.platform); err != nil {
		return err
	}
	if c.http != "" {
		if _, port, err := net.SplitHostPort(c.http); err != nil || port == "" {
			return usagef("--http %q: must be HOST:PORT, as localhost:9469, or :PORT for all addresses", c.http)
		}
	}
	for _, glob := range slices.Concat(c.allow, c.deny) {
		if _, err := filepath.Match(glob, ""); err != nil {
			return usagef("registry pattern %q: %v", glob, err)
		}
	}
	return nil
}

// checkPlatform says what is wrong with --platform; nothing is when it is empty.
func checkPlatform(platform string) error {
	parts := strings.Split(platform, "/")
	if platform != "" && (len(parts) < 2 || len(parts) > 3 || slices.Contains(parts, "")) {
		return usagef("--platform %q: must be os/arch or os/arch/variant, as linux/arm64/v8", platform)
	}
	return nil
}

// absolute makes the paths independent of the working directory, which the
// server leaves.
func (c *config) absolute() error {
	for _, p := range []*string{&c.dir, &c.cacheDir, &c.certsDir, &c.logFile, &c.prefetch} {
		if *p == "" || p == &c.prefetch && c.profiles() == "" {
			continue
		}
		if c.cwd != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(c.cwd, *p)
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			return fmt.Errorf("path %q: %w", *p, err)
		}
		*p = abs
	}
	return nil
}

// mountOptions are what the kernel is told of.
func (c *config) mountOptions() fs.Options {
	return fs.Options{AllowOther: c.allowOther, ExactModes: c.modes == "exact", Dev: c.dev, Suid: c.suid, FsName: c.fsName}
}

// profiles is the directory of profiles that --prefetch names, or "".
func (c *config) profiles() string {
	if c.prefetch == "on" || c.prefetch == "off" {
		return ""
	}
	return c.prefetch
}

// cacheBytes is the cache's limit; 0 is the cache's own default. A share is of
// the whole file system of the cache directory, so that it means the same at
// every start.
func (c *config) cacheBytes() (int64, error) {
	if c.cacheSize.percent == 0 {
		return c.cacheSize.bytes, nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(c.cacheDir, &st); err != nil {
		return 0, fmt.Errorf("cache %q: %w", c.cacheDir, err)
	}
	return c.cacheSize.of(int64(st.Blocks) * st.Bsize), nil
}

// defaultCacheDir is the system's cache for root, else the user's.
func defaultCacheDir() string {
	if os.Geteuid() == 0 {
		return "/var/lib/imgfs"
	}
	if dir := os.Getenv("XDG_CACHE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "imgfs")
	}
	return filepath.Join(os.Getenv("HOME"), ".cache", "imgfs")
}

// configFiles are the places of imgfs.toml; a later one wins over an earlier.
func configFiles() []string {
	files := []string{"/etc/imgfs/imgfs.toml"}
	if dir := os.Getenv("XDG_CONFIG_HOME"); filepath.IsAbs(dir) {
		files = append(files, filepath.Join(dir, "imgfs", "imgfs.toml"))
	} else if home := os.Getenv("HOME"); home != "" {
		files = append(files, filepath.Join(home, ".config", "imgfs", "imgfs.toml"))
	}
	return files
}

// pathKeys are the keys that hold paths.
var pathKeys = []string{"cache-dir", "certs-dir", "log-file", "prefetch"}

// maxConfig is the largest imgfs.toml that is read, in bytes.
const maxConfig = 1 << 20

// loadConfig sets the flags of keys that the files set and the command line
// (changed) did not. A missing file is an empty one.
func loadConfig(keys *pflag.FlagSet, changed func(name string) bool, files []string) error {
	fromFiles := map[string]any{}
	where := map[string]string{}
	for _, file := range files {
		settings, err := readConfig(file)
		if err != nil {
			return err
		}
		for key, value := range settings {
			if keys.Lookup(key) == nil {
				return fmt.Errorf("configuration %q: unknown key %q", file, key)
			}
			fromFiles[key], where[key] = value, file
		}
	}
	for key, value := range fromFiles {
		if changed(key) {
			continue
		}
		err := setFlag(keys.Lookup(key), value)
		path, ok := value.(string)
		if ok = ok && (path != "on" && path != "off" || key != "prefetch"); err == nil && ok && slices.Contains(pathKeys, key) && !filepath.IsAbs(path) {
			err = errors.New("must be an absolute path") // from which directory would it be?
		}
		if err != nil {
			return fmt.Errorf("configuration %q: key %q: %w", where[key], key, err)
		}
	}
	return nil
}

func readConfig(file string) (map[string]any, error) {
	info, err := os.Stat(file)
	if errors.Is(err, iofs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err == nil && info.Size() > maxConfig {
		err = fmt.Errorf("larger than %d bytes", maxConfig)
	}
	var text []byte
	if err == nil {
		text, err = os.ReadFile(file)
	}
	if err != nil {
		return nil, fmt.Errorf("configuration %q: %w", file, cause(err))
	}
	var settings map[string]any
	if err := toml.Unmarshal(text, &settings); err != nil {
		var at *toml.DecodeError
		if errors.As(err, &at) {
			row, col := at.Position()
			return nil, fmt.Errorf("configuration \"%s:%d:%d\": %v", file, row, col, err)
		}
		return nil, fmt.Errorf("configuration %q: %v", file, err)
	}
	return settings, nil
}

// setFlag gives a value of TOML to a flag; the TOML type must be the flag's.
func setFlag(flag *pflag.Flag, value any) error {
	if list, ok := flag.Value.(pflag.SliceValue); ok {
		items, ok := value.([]any)
		if !ok {
			return errors.New("must be a list of strings")
		}
		var words []string
		for _, item := range items {
			word, ok := item.(string)
			if !ok {
				return errors.New("must be a list of strings")
			}
			words = append(words, word)
		}
		return list.Replace(words)
	}
	switch v := value.(type) {
	case bool:
		if flag.Value.Type() != "bool" {
			return errors.New("must be a string")
		}
		return flag.Value.Set(fmt.Sprint(v))
	case string:
		if flag.Value.Type() == "bool" {
			return errors.New("must be true or false")
		}
		return flag.Value.Set(v)
	case int64:
		if flag.Value.Type() != "SIZE" {
			return errors.New("must be a string")
		}
		return flag.Value.Set(fmt.Sprint(v))
	}
	return errors.New("must be a string, true, false, or a list of strings")
}
