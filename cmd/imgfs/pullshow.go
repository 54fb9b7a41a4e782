package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// pullPoll is the time between two looks at .imgfs/pulls.json.
const pullPoll = 40 * time.Millisecond

// pullState is an element of .imgfs/pulls.json.
type pullState struct {
	Name    string      `json:"name"` // as docker writes it
	Started time.Time   `json:"started"`
	Layers  []pullLayer `json:"layers"`
}

// pullLayer is a layer of a pull.
type pullLayer struct {
	Key     string `json:"key"`
	Digest  string `json:"digest"`
	Size    int64  `json:"size"`   // compressed bytes
	Method  string `json:"method"` // methodHere, …; "" while it is not known
	Format  string `json:"format"` // "eStargz", "gzip", …
	Arrived int64  `json:"arrived"`
	Done    bool   `json:"done"`
	Err     string `json:"err"`
}

// The values of pullLayer.Method.
const (
	methodHere      = "here already"
	methodLazy      = "lazy"
	methodStreaming = "streaming"
)

// short is the layer's digest as docker shortens it.
func (l pullLayer) short() string {
	hex := strings.TrimPrefix(l.Digest, "sha256:")
	return hex[:min(12, len(hex))]
}

// how says how the layer comes.
func (l pullLayer) how() string {
	format := ""
	if l.Format != "" {
		format = " (" + l.Format + ")"
	}
	switch l.Method {
	case methodLazy:
		return fmt.Sprintf("%s%s, %s stay in the registry", l.Method, format, humanSize(l.Size))
	case methodStreaming:
		return fmt.Sprintf("%s%s, %s", l.Method, format, humanSize(l.Size))
	}
	return l.Method
}

// pullShow shows how the layers of a pull come: a bar for each on a terminal, else
// a line when its method is known, and one when it has arrived.
type pullShow struct {
	mount string
	want  image
	since time.Time // of the pull
	out   io.Writer // nil: nothing is shown

	bars  *mpb.Progress // nil: lines
	layer map[string]*shownLayer
	order []string // keys
}

// shownLayer is a layer as it was shown last.
type shownLayer struct {
	pullLayer
	said, arrived bool     // its method was printed, that it has arrived was
	bar           *mpb.Bar // nil until its method is known
}

func newPullShow(cmd *cobra.Command, mount string, want image, quiet bool) *pullShow {
	s := &pullShow{mount: mount, want: want, layer: map[string]*shownLayer{}}
	if quiet {
		return s
	}
	s.out = cmd.OutOrStdout()
	if f, ok := s.out.(*os.File); ok && isTerminal(f) {
		s.bars = mpb.New(mpb.WithOutput(f))
	}
	return s
}

// until shows until the call has ended, with its error, or ctx has; waited is
// false then.
func (s *pullShow) until(ctx context.Context, called <-chan error) (err error, waited bool) {
	tick := time.NewTicker(pullPoll)
	defer tick.Stop()
	for {
		select {
		case err := <-called:
			s.look()
			return err, true
		case <-ctx.Done():
			return nil, false
		case <-tick.C:
			s.look()
		}
	}
}

// arrive shows until all layers have arrived or failed, or ctx has ended. It
// returns how many arrive still, and what failed.
func (s *pullShow) arrive(ctx context.Context) (arriving int, failures string) {
	tick := time.NewTicker(pullPoll)
	defer tick.Stop()
	for {
		arriving, failures = 0, ""
		for _, key := range s.order {
			switch l := s.layer[key]; {
			case l.Err != "":
				failures = fmt.Sprintf("layer %s: %s", l.short(), oneLine(l.Err))
			case !l.Done:
				arriving++
			}
		}
		if arriving == 0 {
			return 0, failures
		}
		select {
		case <-ctx.Done():
			return arriving, ""
		case <-tick.C:
			if !s.look() { // it has been forgotten
				return 0, failures
			}
		}
	}
}

// look reads the state of the pull and shows what has changed. It returns false
// when there is none.
func (s *pullShow) look() bool {
	var pulls []pullState
	if readJSON(filepath.Join(s.mount, control, "pulls.json"), &pulls) != nil {
		return false
	}
	var ours *pullState
	for i, p := range pulls {
		if !p.Started.Before(s.since) && s.want.is(s.mount, p.Name) {
			ours = &pulls[i]
		}
	}
	if ours == nil {
		return false
	}
	for _, l := range ours.Layers {
		shown := s.layer[l.Key]
		if shown == nil {
			shown = &shownLayer{}
			s.layer[l.Key] = shown
			s.order = append(s.order, l.Key)
		}
		shown.pullLayer = l
		if s.out != nil && l.Method != "" {
			s.show(shown)
		}
	}
	return true
}

// is reports whether name, as the server writes it, is the image's.
func (i image) is(mount, name string) bool {
	if name == i.ref || name == i.path {
		return true
	}
	got, err := parseImage(mount, name)
	if err == nil && got.path == i.path {
		return true
	}
	// Those of other platforms are below a directory of .imgfs.
	dir, ok := strings.CutSuffix(i.path, i.plain())
	return ok && dir != "" && (name == dir+i.ref)
}

// plain is the image's path without its platform.
func (i image) plain() string {
	rest, ok := strings.CutPrefix(i.path, control+"/platforms/")
	if !ok {
		return i.path
	}
	_, rest, _ = strings.Cut(rest, "/")
	return rest
}

// show brings a layer's line or bar up to date.
func (s *pullShow) show(l *shownLayer) {
	if s.bars == nil {
		if !l.said {
			fmt.Fprintf(s.out, "%s: %s\n", l.short(), l.how())
		}
		if !l.arrived && l.Method == methodStreaming && l.Done && l.Err == "" {
			fmt.Fprintf(s.out, "%s: arrived\n", l.short())
			l.arrived = true
		}
		l.said = true
		return
	}
	if l.bar == nil {
		l.bar = s.addBar(l.pullLayer)
	}
	l.said = true
	switch {
	case l.Err != "":
		l.bar.Abort(false)
	case l.Done:
		l.bar.SetCurrent(l.Size)
		l.bar.SetTotal(-1, true)
	default:
		l.bar.SetCurrent(min(l.Arrived, max(l.Size-1, 0)))
	}
}

// addBar makes the bar of a layer: one that moves for bytes that arrive, and words
// for those that need not.
func (s *pullShow) addBar(l pullLayer) *mpb.Bar {
	moves := l.Method == methodStreaming
	options := []mpb.BarOption{
		mpb.PrependDecorators(decor.Name(l.short() + ": " + l.how() + " ")),
		mpb.BarFillerClearOnComplete(),
	}
	if moves {
		options = append(options, mpb.AppendDecorators(
			decor.OnComplete(decor.CountersKiloByte("% .1f / % .1f"), "arrived")))
	}
	return s.bars.AddBar(max(l.Size, 1), options...)
}

// end leaves the bars as they are.
func (s *pullShow) end() {
	if s.bars == nil {
		return
	}
	for _, l := range s.layer {
		if l.bar != nil && !l.bar.Completed() {
			l.bar.Abort(false)
		}
	}
	s.bars.Wait()
}

// reused says what of the image was here before; "" when its layers are not known.
func (s *pullShow) reused() string {
	here, bytes := 0, int64(0)
	for _, l := range s.layer {
		if l.Method == methodHere {
			here++
			bytes += l.Size
		}
	}
	if len(s.order) == 0 {
		return ""
	}
	return fmt.Sprintf("Reused: %d of %s, %s", here, count(len(s.order), "layer"), humanSize(bytes))
}
