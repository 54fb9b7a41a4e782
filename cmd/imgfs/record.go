package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/imgfs/imgfs/images"
)

const recordLong = `Write the access profile of an image: which parts of its layers are read in the
first seconds of its use, and in which order. At the next cold start the server
has them ready before they are asked for.

A profile is kept for each image that is read, without this command. With it the
profile is begun anew, COMMAND is run in the image's root directory (by chroot, as
root), and what it read is the profile from then on. Without COMMAND the profile
is printed as it is.

-o writes it to a file too, or into a directory under the name by which 'imgfs
mount --prefetch DIR' finds it on another machine; a profile that the machine has
itself goes before that. Of layers of plain gzip and zstd nothing is recorded: they
are fetched whole.`

func newRecord() *cobra.Command {
	output := ""
	cmd := &cobra.Command{
		Use:   "record [flags] IMAGE [-- COMMAND [ARG...]]",
		Short: "Write what an image's start reads, for the next one",
		Long:  recordLong,
		Example: `  imgfs record python:3.12 -- python3 -c 'import json, ssl'
  imgfs record -o /var/lib/profiles/ python:3.12`,
		Args: func(cmd *cobra.Command, args []string) error {
			names := args
			if at := cmd.ArgsLenAtDash(); at >= 0 {
				names = args[:at]
			}
			return takes(1, 1, "IMAGE")(cmd, names)
		},
		ValidArgsFunction: completeFirst,
		RunE: func(cmd *cobra.Command, args []string) error {
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			img, err := resolve(mount, args[0])
			if err != nil {
				return err
			}
			var data []byte
			if len(args) == 1 {
				data, err = profileOf(cmd.Context(), mount, img, http.MethodGet)
			} else {
				data, err = recordRun(cmd, mount, img, args[1:])
			}
			if err != nil {
				return err
			}
			return writeProfile(cmd, img, data, output, len(args) == 1)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "write the profile to `FILE`, or into this directory")
	mountFlag(cmd)
	return cmd
}

// recordRun runs a command in the root of an image, and returns the profile of that.
func recordRun(cmd *cobra.Command, mount string, img found, argv []string) ([]byte, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("to run a command in an image takes root (chroot); without a command its profile is printed")
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if _, err := profileOf(ctx, mount, img, http.MethodPost); err != nil {
		return nil, err
	}
	run := exec.CommandContext(ctx, "chroot", append([]string{filepath.Join(mount, img.name.path)}, argv...)...)
	run.Stdin, run.Stdout, run.Stderr = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
	failed := run.Run()
	if failed != nil && notRun(run.ProcessState) {
		// chroot could not run it: what was read is no start of anything.
		_, err := profileOf(cmd.Context(), mount, img, http.MethodPut)
		return nil, errors.Join(fmt.Errorf("%s: %w; the profile is what it was", strings.Join(argv, " "), failed), err)
	}
	data, err := profileOf(cmd.Context(), mount, img, http.MethodDelete)
	switch {
	case failed != nil && err == nil:
		return nil, fmt.Errorf("%s: %w; what it read until then is the profile", strings.Join(argv, " "), failed)
	case failed != nil:
		return nil, fmt.Errorf("%s: %w", strings.Join(argv, " "), failed)
	}
	return data, err
}

// profileOf asks the server for a profile (GET), to begin it anew (POST), to end
// it and keep it (DELETE), or to end it and keep the one before (PUT).
func profileOf(ctx context.Context, mount string, img found, method string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	answer, err := ask(ctx, mount, method, "/profile/"+img.Manifest)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(io.LimitReader(answer.Body, maxProfile))
	if err != nil {
		return nil, fmt.Errorf("mount %q: %w", mount, err)
	}
	switch answer.StatusCode {
	case http.StatusOK, http.StatusNoContent:
		return data, nil
	case http.StatusNotFound:
		return nil, fmt.Errorf("%q: no profile: nothing was read of a layer that is fetched by ranges", img.ref())
	}
	return nil, fmt.Errorf("mount %q: the server answers %s: %s", mount, answer.Status, oneLine(string(data)))
}

// maxProfile is the largest answer that is read, in bytes.
const maxProfile = 4 << 20

// writeProfile puts the profile where it is wanted, and says what it is.
func writeProfile(cmd *cobra.Command, img found, data []byte, output string, show bool) error {
	if output == "" && show {
		_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s\n", data)
		return err
	}
	if output != "" {
		digest, err := v1.NewHash(img.Manifest)
		if err != nil {
			return fmt.Errorf("%q: %w", img.ref(), err)
		}
		if strings.HasSuffix(output, "/") {
			if err := os.MkdirAll(output, 0o755); err != nil {
				return fmt.Errorf("profile %q: %w", output, cause(err))
			}
		}
		if info, err := os.Stat(output); err == nil && info.IsDir() {
			output = filepath.Join(output, images.ProfileName(digest))
		}
		if err := os.WriteFile(output, data, 0o644); err != nil {
			return fmt.Errorf("profile %q: %w", output, cause(err))
		}
	}
	var p struct{ Reads [][4]int64 }
	if err := json.Unmarshal(data, &p); err != nil {
		return fmt.Errorf("%q: %w", img.ref(), err)
	}
	var bytes int64
	for _, r := range p.Reads {
		bytes += r[2]
	}
	to := "beside the image"
	if output != "" {
		to = output
	}
	_, err := fmt.Fprintf(cmd.ErrOrStderr(), "Recorded %s: %s, %s, %s\n", img.ref(), count(len(p.Reads), "read"), shortSize(bytes), to)
	return err
}

// profile answers for one image, as profileOf asks.
func (a *api) profile(w http.ResponseWriter, r *http.Request) {
	digest, err := v1.NewHash(r.PathValue("digest"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var data []byte
	switch r.Method {
	case http.MethodGet:
		data, err = a.store.Profile(digest)
	case http.MethodPost:
		err = a.store.Record(r.Context(), digest)
	case http.MethodPut:
		err = a.store.GiveUpRecord(digest)
	default:
		data, err = a.store.Recorded(digest)
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		http.Error(w, err.Error(), http.StatusNotFound)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	case r.Method == http.MethodPost, r.Method == http.MethodPut:
		w.WriteHeader(http.StatusNoContent)
	default:
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(data) // who asked is gone, which is nobody's problem
	}
}

// notRun reports whether chroot(8) could not run its command: it says so by its exit
// status, as a shell does.
func notRun(st *os.ProcessState) bool {
	return st == nil || st.ExitCode() >= 125 && st.ExitCode() <= 127
}
