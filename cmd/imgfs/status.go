package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// mountStatus is what status tells of a mount.
type mountStatus struct {
	Mount   string `json:"mount"`
	Health  string `json:"health"`            // "healthy", "dead", "not answering", or what is wrong
	Alive   bool   `json:"alive"`             // it answers
	Version string `json:"version,omitempty"` // of its server
	Uptime  int64  `json:"uptime"`            // seconds
	mountStats
	Images    mountTotals `json:"images"`
	CacheDir  string      `json:"cacheDir,omitempty"`
	LastError *problem    `json:"lastError,omitempty"`
}

// mountStats are what of .imgfs/stats.json is shown.
type mountStats struct {
	PID        int              `json:"pid"`
	Supervisor int              `json:"supervisor"`
	Restarts   int              `json:"restarts"`
	LastEnd    string           `json:"lastEnd,omitempty"` // of the server before
	Started    time.Time        `json:"started"`
	Fuse       map[string]int64 `json:"fuse"`
	Registry   struct {
		Requests int64 `json:"requests"`
		Bytes    int64 `json:"bytes"`
		Retries  int64 `json:"retries"`
	} `json:"registry"`
	Cache struct {
		Limit int64 `json:"limit"`
		Used  int64 `json:"used"`
		Free  int64 `json:"free"`
	} `json:"cache"`
	Errors int64 `json:"errors"`
}

// mountTotals are what of .imgfs/df.json is shown.
type mountTotals struct {
	Tagged   int64 `json:"tagged"`
	Dangling int64 `json:"dangling"`
	Layers   int64 `json:"layers"`
	Idle     int64 `json:"idle"`
	Arriving int64 `json:"arriving"`
	Expanded int64 `json:"expanded"`
}

func newStatus() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "status [flags]",
		Short: "Show the mounts, their health and their traffic",
		Long: `Show each mount: whether it answers, its server, what is here, what the cache has,
what came from registries, what the kernel asked, and the last error. The exit
status is 1 when a mount is dead, does not answer or is not healthy, and when there
is none.

--format takes json, or a Go template with the fields .Mount .Health .Alive .PID
.Supervisor .Restarts .LastEnd .Version .Uptime .Started .Images .Cache .Registry .Fuse .Errors .CacheDir
.LastError.`,
		Example: `  imgfs status
  imgfs status --format '{{.Mount}} {{.Health}} {{.PID}}'`,
		Args:              takes(0, 0, ""),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			print, err := linePrinter(format, printStatus)
			if err != nil {
				return err
			}
			dirs, err := chosenMounts(cmd)
			if err != nil {
				return err
			}
			var failed error
			for _, dir := range dirs {
				s := statusOf(dir)
				if err := print(cmd.OutOrStdout(), s); err != nil {
					return err
				}
				if s.Health != healthy {
					hint := ""
					switch s.Health {
					case deadHealth:
						hint = fmt.Sprintf("; 'imgfs umount %s', then mount it again", dir)
					case crashedHealth, silentHealth:
						hint = fmt.Sprintf("; see its log, and try 'imgfs restart %s'", dir)
					}
					failed = errors.Join(failed, fmt.Errorf("mount %q: %s%s", dir, s.Health, hint))
				}
			}
			return failed
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "print each mount as json, or by a Go `TEMPLATE`")
	mountFlag(cmd)
	return cmd
}

// chosenMounts are the mount that cmd was told to use, or all.
func chosenMounts(cmd *cobra.Command) ([]string, error) {
	if chosen, err := cmd.Flags().GetString("mount"); err != nil || chosen != "" || os.Getenv("IMGFS_MOUNT") != "" {
		dir, err := theMount(cmd)
		return []string{dir}, err
	}
	mounts, err := allMounts()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, m := range mounts {
		if !slices.Contains(dirs, m.Mountpoint) {
			dirs = append(dirs, m.Mountpoint)
		}
	}
	if len(dirs) == 0 {
		return nil, errNoMount
	}
	return dirs, nil
}

// What status says of a mount's health when it cannot say for itself.
const (
	deadHealth    = "dead"
	crashedHealth = "its servers crash one after the other"
	silentHealth  = "not answering"
)

// statusOf asks the mount on dir. It waits for an answer for askTimeout at most:
// a server may hang.
func statusOf(dir string) mountStatus {
	answer := make(chan mountStatus, 1)
	// Left behind if the server hangs: this process ends soon, and it with it.
	go func() { answer <- askStatus(dir) }()
	select {
	case s := <-answer:
		return s
	case <-time.After(askTimeout):
		return mountStatus{Mount: dir, Health: silentHealth}
	}
}

func askStatus(dir string) mountStatus {
	s := mountStatus{Mount: dir}
	if err := readJSON(filepath.Join(dir, control, "stats.json"), &s.mountStats); err != nil {
		s.Health = cause(err).Error()
		if errors.Is(err, unix.ENOTCONN) {
			s.Health = deadHealth
		}
		if errors.Is(err, unix.EIO) {
			s.Health = crashedHealth
		}
		return s
	}
	s.Alive, s.Health = true, healthy
	s.Uptime = int64(time.Since(s.Started).Seconds())
	if err := readJSON(filepath.Join(dir, control, "df.json"), &s.Images); err != nil {
		s.Health = fmt.Sprintf("the sizes cannot be read: %v", cause(err))
	}
	if problems, err := readProblems(dir); err == nil && len(problems) > 0 {
		s.LastError = &problems[len(problems)-1]
	}
	if socket, err := os.Readlink(filepath.Join(dir, control, "socket")); err == nil {
		s.CacheDir = filepath.Dir(socket)
	}
	// Only the server's user may ask more.
	if said, err := askServer(dir); err == nil {
		s.Health, s.Version = said.Health, said.Version
	}
	return s
}

func askServer(dir string) (serverStatus, error) {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout/2)
	defer cancel()
	answer, err := ask(ctx, dir, http.MethodGet, "/status")
	if err != nil {
		return serverStatus{}, err
	}
	defer answer.Body.Close()
	var said serverStatus
	if err := json.NewDecoder(answer.Body).Decode(&said); err != nil {
		return serverStatus{}, err
	}
	if said.Health == "" {
		return serverStatus{}, errors.New("no answer")
	}
	return said, nil
}

func printStatus(w io.Writer, s mountStatus) error {
	out := tabwriter.NewWriter(w, 0, 0, 1, ' ', 0)
	fmt.Fprintf(out, "%s: %s\n", s.Mount, s.Health)
	if !s.Alive {
		return out.Flush()
	}
	server := fmt.Sprintf("pid %d, up %s", s.PID, humanAge(time.Duration(s.Uptime)*time.Second))
	if s.Version != "" {
		server += ", imgfs " + s.Version
	}
	fmt.Fprintf(out, "  Server:\t%s\n", server)
	if s.Restarts > 0 {
		fmt.Fprintf(out, "  Restarts:\t%d, the last one after: %s\n", s.Restarts, oneLine(s.LastEnd))
	}
	images := fmt.Sprintf("%d tagged, %d dangling, %s", s.Images.Tagged, s.Images.Dangling, humanSize(s.Images.Expanded))
	fmt.Fprintf(out, "  Images:\t%s\n", images)
	layers := fmt.Sprintf("%d in use, %d idle", s.Images.Layers, s.Images.Idle)
	if s.Images.Arriving > 0 {
		layers += fmt.Sprintf(", %d arriving", s.Images.Arriving)
	}
	fmt.Fprintf(out, "  Layers:\t%s\n", layers)
	cache := fmt.Sprintf("%s of %s, %s free on its disk", humanSize(s.Cache.Used), humanSize(s.Cache.Limit), humanSize(s.Cache.Free))
	if s.CacheDir != "" {
		cache += ", in " + s.CacheDir
	}
	fmt.Fprintf(out, "  Cache:\t%s\n", cache)
	traffic := fmt.Sprintf("%s, %s", count(int(s.Registry.Requests), "request"), humanSize(s.Registry.Bytes))
	if s.Registry.Retries > 0 {
		traffic += ", " + count(int(s.Registry.Retries), "retry", "retries")
	}
	fmt.Fprintf(out, "  Registries:\t%s\n", traffic)
	fmt.Fprintf(out, "  Kernel:\t%s\n", kernelText(s.Fuse))
	fmt.Fprintf(out, "  Errors:\t%s\n", errorsText(s))
	return out.Flush()
}

// kernelText names how many messages came from the kernel, and the most frequent.
func kernelText(byOp map[string]int64) string {
	var total int64
	for _, n := range byOp {
		total += n
	}
	ops := slices.SortedFunc(maps.Keys(byOp), func(a, b string) int {
		return cmp.Or(cmp.Compare(byOp[b], byOp[a]), cmp.Compare(a, b))
	})
	var most []string
	for _, op := range ops[:min(4, len(ops))] {
		if byOp[op] > 0 {
			most = append(most, fmt.Sprintf("%s %d", op, byOp[op]))
		}
	}
	text := count(int(total), "message")
	if len(most) > 0 {
		text += " (" + strings.Join(most, ", ") + ")"
	}
	return text
}

func errorsText(s mountStatus) string {
	if s.LastError == nil {
		return "none"
	}
	times := max(s.Errors, 1)
	return fmt.Sprintf("%d, the last %s ago: %s %s: %s", times, humanAge(time.Since(s.LastError.Time)),
		s.LastError.Errno, oneLine(s.LastError.Name), oneLine(s.LastError.Reason))
}
