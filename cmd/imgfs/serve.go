package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/fs"
	"github.com/imgfs/imgfs/images"
)

// serve answers on the mount that h hands over, as c says, until it is gone. It
// calls ready once, when the mount answers, with its verdict and the files
// with the cache's locks; if ready fails, nobody waits for the mount and it is
// taken away.
func serve(c *config, h *handover, logTo io.Writer, ready func(verdict, []*os.File) error) (err error) {
	log := newLog(c.logLevel, logTo)
	if err := os.MkdirAll(c.cacheDir, 0o700); err != nil {
		return fmt.Errorf("cache %q: %w", c.cacheDir, cause(err))
	}
	var lines []string
	first, port := "", 0
	if c.demo {
		registry, err := startDemo(h.Port)
		switch {
		case err != nil && h.Again: // a server that cannot die yet has the port still
			log.Warn("demo: no registry", "err", err)
			port = h.Port
		case err != nil:
			return fmt.Errorf("demo: %w", err)
		default:
			defer func() { err = errors.Join(err, registry.Close()) }()
			lines, port = registry.hints(c.dir), registry.port
		}
		if !h.Again {
			// Pulled at once, so that even the first listing shows something.
			first = registry.repository() + "/latest"
		}
	}
	if dir := c.profiles(); dir != "" {
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			return fmt.Errorf("--prefetch %q: no directory of profiles", dir)
		}
	}
	store, err := openStore(c, images.Options{Resume: h.Store}, log)
	if err != nil {
		return err
	}
	defer func() {
		if !errors.Is(err, errServing) { // what the kernel still asks for must not find it closed
			err = errors.Join(err, store.Close())
		}
	}()

	api, err := newAPI(c.dir, h, store, log)
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

	o := c.mountOptions()
	o.AllowOther, o.ExactModes = h.AllowOther, h.ExactModes
	o.Pull, o.PullByOthers, o.Du, o.Log = c.pull, c.pullByOthers, c.du, log
	o.Socket, o.Metrics = api.socket, api.metrics.write
	o.Device, o.Supervisor, o.Restarts, o.LastEnd = h.device, h.Supervisor, h.Restarts, h.LastEnd
	server, err := fs.Mount(c.dir, store, o)
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
	if err := ready(verdict{Lines: lines, Port: port, Store: store.ID()}, store.Locks()); err != nil {
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

// sameSignal is how long after a signal another one means the same: systemd sends
// it to supervisor and server, and the supervisor passes it on.
const sameSignal = 500 * time.Millisecond

// errServing reports that the server ends while requests may still come. All
// that must outlive it is durable by then.
var errServing = errors.New("stopped while it was in use")

// untilUnmounted waits for the end of Serve. The first signal unmounts; a mount
// that is busy is detached, so that its path is free at once while those who are
// in it go on. A second signal ends the server under them.
func untilUnmounted(dir string, server *fs.Server, served <-chan error, signals <-chan os.Signal, log *slog.Logger) error {
	var stopping time.Time
	for {
		select {
		case err := <-served:
			return err
		case sig := <-signals:
			log.Info("stopping", "signal", sig.String())
			switch {
			case stopping.IsZero():
			case time.Since(stopping) < sameSignal:
				continue
			default:
				return fmt.Errorf("%q: %w", dir, errServing)
			}
			stopping = time.Now()
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

// lockTime is how long a server waits for the cache's lock that has died before it.
const lockTime = 5 * time.Second

// openStore opens the cache and what is in it. A server that follows another waits
// until the kernel has given back that one's lock.
func openStore(c *config, o images.Options, log *slog.Logger) (*images.Store, error) {
	limit, err := c.cacheBytes()
	if err != nil {
		return nil, err
	}
	o = images.Options{
		Dir: c.cacheDir, CacheSize: limit, Platform: c.platform, CertsDir: c.certsDir,
		Insecure: c.insecure, Allow: c.allow, Deny: c.deny,
		Timeout: c.timeout, Strict: c.verify == "strict",
		Prefetch: c.prefetch != "off", Profiles: c.profiles(),
		UserAgent: "imgfs/" + release, Log: log, Resume: o.Resume, Keep: o.Keep,
	}
	store, err := images.Open(o)
	for end := time.Now().Add(lockTime); o.Resume != "" && errors.Is(err, images.ErrInUse) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		store, err = images.Open(o)
	}
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
