package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/fs"
	"github.com/imgfs/imgfs/images"
)

// serve mounts as c says and answers until the mount is gone. It calls ready
// once, when the mount answers, with lines for the user; if ready fails, nobody
// waits for the mount and it is taken away.
func serve(c *config, logTo io.Writer, ready func(lines []string) error) (err error) {
	log := newLog(c.logLevel, logTo)
	if err := os.MkdirAll(c.cacheDir, 0o700); err != nil {
		return fmt.Errorf("cache %q: %w", c.cacheDir, cause(err))
	}
	var lines []string
	first := ""
	if c.demo {
		registry, err := startDemo()
		if err != nil {
			return fmt.Errorf("demo: %w", err)
		}
		defer func() { err = errors.Join(err, registry.Close()) }()
		lines = registry.hints(c.dir)
		// Pulled at once, so that even the first listing shows something.
		first = registry.repository() + "/latest"
	}
	if dir := c.profiles(); dir != "" {
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			return fmt.Errorf("--prefetch %q: no directory of profiles", dir)
		}
	}
	store, err := openStore(c, log)
	if err != nil {
		return err
	}
	defer func() {
		if !errors.Is(err, errServing) { // what the kernel still asks for must not find it closed
			err = errors.Join(err, store.Close())
		}
	}()

	api, err := newAPI(c.dir, store, log)
	if err != nil {
		return err
	}
	defer api.Close()
	if err := api.listen(c); err != nil {
		return err
	}

	// Signals count from before the mount: one that comes while it is made takes
	// it away again.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM)
	defer signal.Stop(signals)

	server, err := fs.Mount(c.dir, store, fs.Options{
		Pull: c.pull, AllowOther: c.allowOther, Dev: c.dev, Suid: c.suid,
		ExactModes: c.modes == "exact",
		Du:         c.du, FsName: c.fsName, Log: log,
		Socket: api.socket, Metrics: api.metrics.write,
	})
	if err != nil {
		return explain(err)
	}
	api.server.Store(server)
	log.Info("mounted", "dir", c.dir, "cache", c.cacheDir, "version", version(), "pid", os.Getpid())
	if first != "" {
		if err := makeAll(c.dir, first); err != nil {
			log.Warn("demo: pull", "image", first, "err", err)
		}
	}
	if err := ready(lines); err != nil {
		if busy := server.Unmount(); busy != nil {
			return errors.Join(err, fmt.Errorf("%q: %w: %w", c.dir, errServing, busy))
		}
		return errors.Join(err, server.Serve())
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve() }()
	err = untilUnmounted(c.dir, server, served, signals, log)
	log.Info("unmounted", "dir", c.dir)
	return err
}

// errServing reports that the server ends while requests may still come. All
// that must outlive it is durable by then.
var errServing = errors.New("stopped while it was in use")

// untilUnmounted waits for the end of Serve. The first signal unmounts; a mount
// that is busy is detached, so that its path is free at once while those who are
// in it go on. A second signal ends the server under them.
func untilUnmounted(dir string, server *fs.Server, served <-chan error, signals <-chan os.Signal, log *slog.Logger) error {
	stopping := false
	for {
		select {
		case err := <-served:
			return err
		case sig := <-signals:
			log.Info("stopping", "signal", sig.String())
			if stopping {
				return fmt.Errorf("%q: %w", dir, errServing)
			}
			stopping = true
			err := server.Unmount()
			if err == nil {
				continue
			}
			log.Warn("unmount", "dir", dir, "err", err, "busy", busyText(dir))
			if err := detach(dir); err != nil {
				log.Error("detach", "dir", dir, "err", err)
				return fmt.Errorf("%q: %w: %w", dir, errServing, err)
			}
			log.Warn("detached; serving those who still use it, until they end or the next signal", "dir", dir)
		}
	}
}

// openStore opens the cache and what is in it.
func openStore(c *config, log *slog.Logger) (*images.Store, error) {
	limit, err := c.cacheBytes()
	if err != nil {
		return nil, err
	}
	store, err := images.Open(images.Options{
		Dir: c.cacheDir, CacheSize: limit, Platform: c.platform, CertsDir: c.certsDir,
		Insecure: c.insecure, Allow: c.allow, Deny: c.deny,
		Timeout: c.timeout, Strict: c.verify == "strict",
		Prefetch: c.prefetch != "off", Profiles: c.profiles(),
		UserAgent: "imgfs/" + release, Log: log,
	})
	if errors.Is(err, images.ErrInUse) {
		return nil, fmt.Errorf("%w by another imgfs; unmount that, or choose another --cache-dir", err)
	}
	return store, err
}

// newLog writes lines of text to w, from the level named.
func newLog(level string, w io.Writer) *slog.Logger {
	var from slog.Level
	if err := from.UnmarshalText([]byte(level)); err != nil {
		from = slog.LevelInfo
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: from}))
}

// maxLog is the size in bytes from which a log is put aside, as NAME.old, when a
// server starts.
const maxLog = 16 << 20

// openLog opens the log file for appending.
func openLog(file string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return nil, fmt.Errorf("log %q: %w", file, cause(err))
	}
	if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Size() > maxLog {
		if err := os.Rename(file, file+".old"); err != nil {
			return nil, fmt.Errorf("log %q: %w", file, err)
		}
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("log %q: %w", file, cause(err))
	}
	return f, nil
}

// serveForeground serves in this process, and tells systemd when it is ready.
func serveForeground(cmd *cobra.Command, c *config) error {
	logTo := cmd.ErrOrStderr()
	if c.logFile != "" {
		f, err := openLog(c.logFile)
		if err != nil {
			return err
		}
		defer f.Close()
		logTo = f
	}
	return serve(c, logTo, func(lines []string) error {
		for _, line := range lines {
			fmt.Fprintln(cmd.OutOrStdout(), line)
		}
		// Without systemd this does nothing, and a systemd that does not listen
		// is no reason to give up a mount that works.
		_, _ = daemon.SdNotify(true, daemon.SdNotifyReady)
		return nil
	})
}
