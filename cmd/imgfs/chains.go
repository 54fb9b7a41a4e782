package main

import (
	"path/filepath"
	"slices"
	"time"
)

// chain is one entry of .imgfs/chains.json: an image as it was after one of its
// layers.
type chain struct {
	ID      string    `json:"id"`
	Layers  int       `json:"layers"`
	Created time.Time `json:"created"`
	Images  []string  `json:"images"` // manifest digests of those that depend on it
	Whole   bool      `json:"whole"`  // it is the whole of one of them
}

func readChains(mount string) ([]chain, error) {
	var chains []chain
	err := readJSON(filepath.Join(mount, control, "chains.json"), &chains)
	return chains, err
}

// layer is one entry of .imgfs/layers.json, or of the layers of an image.
type layer struct {
	Key        string `json:"key"` // what the layer is known by: .imgfs/layers/<hex of it>
	Digest     string `json:"digest"`
	DiffID     string `json:"diffID"`
	MediaType  string `json:"mediaType"`
	Images     int    `json:"images"` // that use it
	Compressed int64  `json:"compressed"`
	Expanded   int64  `json:"expanded"` // -1 while it is not known
	Usage      int64  `json:"usage"`
	Cached     int64  `json:"cached"`
	Method     string `json:"method"`
	Lazy       bool   `json:"lazy"`
	Why        string `json:"why"`
	State      string `json:"state"`
	Command    string `json:"command,omitempty"` // of the history; of an image's layers only
}

func readLayers(mount string) ([]layer, error) {
	var layers []layer
	err := readJSON(filepath.Join(mount, control, "layers.json"), &layers)
	return layers, err
}

// intermediates are the chains that are no image of their own, as images without
// a name. What is theirs alone, or on this disk, is not counted for them.
func intermediates(mount string, records []record) ([]record, error) {
	chains, err := readChains(mount)
	if err != nil {
		return nil, err
	}
	sizes := layerSizes{mount: mount, paths: map[string]string{}, known: map[string][]layer{}}
	for _, r := range records {
		if _, ok := sizes.paths[r.Manifest]; !ok {
			sizes.paths[r.Manifest] = r.path()
		}
	}
	var between []record
	for _, c := range chains {
		if c.Whole {
			continue
		}
		r := record{
			Repository: noTag, Tag: noTag, ID: c.ID, Created: c.Created, Layers: c.Layers,
			Size: -1, Compressed: -1, Usage: -1, Shared: -1, Unique: -1, Cached: -1,
		}
		sizes.fill(&r, c)
		between = append(between, r)
	}
	return between, nil
}

// layerSizes sums the layers of chains, and reads each image's once.
type layerSizes struct {
	mount string
	paths map[string]string  // by manifest
	known map[string][]layer // by manifest
}

func (s layerSizes) fill(r *record, c chain) {
	i := slices.IndexFunc(c.Images, func(m string) bool { return s.paths[m] != "" })
	if i < 0 {
		return
	}
	manifest := c.Images[i]
	layers, ok := s.known[manifest]
	if !ok {
		// An image that is removed meanwhile leaves its sizes unknown.
		if readMeta(s.mount, s.paths[manifest], "layers.json", &layers) != nil {
			layers = nil
		}
		s.known[manifest] = layers
	}
	if c.Layers > len(layers) {
		return
	}
	r.Size, r.Compressed = 0, 0
	for i, l := range layers[:c.Layers] {
		// A layer that the image has twice counts once.
		if slices.ContainsFunc(layers[:i], func(o layer) bool { return o.Key == l.Key }) {
			continue
		}
		r.Compressed += l.Compressed
		if l.Expanded < 0 || r.Size < 0 {
			r.Size = -1
			continue
		}
		r.Size += l.Expanded
	}
}
