package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"text/template"
	"time"

	"github.com/spf13/cobra"
)

// description is an image as inspect prints it: docker's fields under docker's
// names, then ours.
type description struct {
	ID            string `json:"Id"`
	RepoTags      []string
	RepoDigests   []string
	Comment       string
	Created       time.Time
	DockerVersion string `json:",omitempty"`
	Author        string
	Config        json.RawMessage
	Architecture  string
	Variant       string `json:",omitempty"`
	Os            string
	OsVersion     string `json:",omitempty"`
	Size          int64
	RootFS        struct {
		Type   string
		Layers []string
	}

	Path           string // of its directory
	Digest         string // of what the registry answers for it
	Manifest       string // of the manifest for its platform
	Platform       string
	Pulled         time.Time
	CompressedSize int64
	SharedSize     int64
	UniqueSize     int64
	CachedSize     int64
	Usage          int64
	Layers         []layer
	ManifestJSON   json.RawMessage `json:"ManifestContent"`
}

// ociConfig are the fields of an image's configuration that inspect shows.
type ociConfig struct {
	Created       time.Time       `json:"created"`
	Author        string          `json:"author"`
	Comment       string          `json:"comment"`
	DockerVersion string          `json:"docker_version"`
	Architecture  string          `json:"architecture"`
	Variant       string          `json:"variant"`
	OS            string          `json:"os"`
	OSVersion     string          `json:"os.version"`
	Config        json.RawMessage `json:"config"`
	RootFS        struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
	History []struct {
		Comment string `json:"comment"`
	} `json:"history"`
}

func newInspect() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "inspect [flags] IMAGE…",
		Short: "Show everything that is known of images",
		Long: `Show everything that is known of images, as JSON: docker's fields under docker's
names, then where the image is, its digests, its sizes, its layers and its manifest.

--format takes a Go template, as docker's does, with the names of the JSON.`,
		Example: `  imgfs inspect debian:12
  imgfs inspect -f '{{join .Config.Env "\n"}}' debian:12
  imgfs inspect -f '{{json .RootFS.Layers}}' debian:12`,
		Args:              takes(1, math.MaxInt, "IMAGE"),
		ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			var text *template.Template
			if format != "" && format != "json" {
				var err error
				text, err = template.New("format").Funcs(templateFuncs).Option("missingkey=error").Parse(format + "\n")
				if err != nil {
					return usagef("--format %q: %v", format, err)
				}
			}
			mount, err := theMount(cmd)
			if err != nil {
				return err
			}
			var all []description
			var failed error
			for _, arg := range args {
				d, err := describe(mount, arg)
				if err == nil {
					all = append(all, d)
				}
				failed = errors.Join(failed, err)
			}
			return errors.Join(printDescriptions(cmd.OutOrStdout(), all, format, text), failed)
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", "print json in one line, or by a Go `TEMPLATE`")
	mountFlag(cmd)
	return cmd
}

// printDescriptions writes a JSON array; on one line for the format "json", else
// a line for each image by a template.
func printDescriptions(w io.Writer, all []description, format string, text *template.Template) error {
	if text == nil {
		e := json.NewEncoder(w)
		e.SetEscapeHTML(false)
		if format == "" {
			e.SetIndent("", "    ")
		}
		if all == nil {
			all = []description{}
		}
		return e.Encode(all)
	}
	for _, d := range all {
		// Templates use the names of the JSON, as those of docker do.
		raw, err := json.Marshal(d)
		if err != nil {
			return err
		}
		var fields map[string]any
		decoder := json.NewDecoder(bytes.NewReader(raw))
		decoder.UseNumber()
		if err := decoder.Decode(&fields); err != nil {
			return err
		}
		var line bytes.Buffer
		if err := text.Execute(&line, fields); err != nil {
			return fmt.Errorf("--format %q: %v", format, err)
		}
		if _, err := w.Write(line.Bytes()); err != nil {
			return err
		}
	}
	return nil
}

// describe collects what is known of the image that arg stands for.
func describe(mount, arg string) (description, error) {
	f, err := resolve(mount, arg)
	if err != nil {
		return description{}, err
	}
	var c ociConfig
	if err := readMeta(mount, f.name.path, "config.json", &c); err != nil {
		return description{}, gone(err, f.name)
	}
	d := description{
		ID: f.ID, Comment: c.Comment, Created: c.Created, DockerVersion: c.DockerVersion, Author: c.Author, Config: c.Config,
		Architecture: c.Architecture, Variant: c.Variant, Os: c.OS, OsVersion: c.OSVersion, Size: f.Size,
		Path: filepath.Join(mount, f.name.path), Digest: f.Digest, Manifest: f.Manifest, Platform: f.Platform, Pulled: f.Pulled,
		CompressedSize: f.Compressed, SharedSize: f.Shared, UniqueSize: f.Unique, CachedSize: f.Cached, Usage: f.Usage,
		RepoTags: []string{}, RepoDigests: []string{},
	}
	d.RootFS.Type, d.RootFS.Layers = c.RootFS.Type, c.RootFS.DiffIDs
	if n := len(c.History); d.Comment == "" && n > 0 {
		d.Comment = c.History[n-1].Comment
	}
	names, err := namesOf(mount, f.name.path)
	err = errors.Join(err,
		readMeta(mount, f.name.path, "layers.json", &d.Layers),
		readMeta(mount, f.name.path, "manifest.json", &d.ManifestJSON))
	if err != nil {
		return description{}, gone(err, f.name)
	}
	for _, n := range names {
		if strings.Contains(n.path, "/@") {
			d.addDigest(n.ref)
			continue
		}
		d.RepoTags = append(d.RepoTags, n.ref)
		if r, err := recordAt(mount, n.path); err == nil && r.ID == f.ID && r.Digest != "" {
			d.addDigest(r.Repository + "@" + r.Digest)
		}
	}
	return d, nil
}

func (d *description) addDigest(ref string) {
	if !slices.Contains(d.RepoDigests, ref) {
		d.RepoDigests = append(d.RepoDigests, ref)
	}
}
