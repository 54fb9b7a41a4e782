package main

import (
	"path"
	"strconv"
	"strings"
	"time"
)

// imageFilters are the filters of images. Several references are alternatives;
// everything else must hold together.
type imageFilters struct {
	references    []string
	dangling      *bool
	before, since []string // images, as they were given
	until         []string // whole filters
	oldest        time.Time
	newest        time.Time
}

// parseFilters reads KEY=VALUE filters.
func parseFilters(texts []string) (*imageFilters, error) {
	f := &imageFilters{}
	for _, text := range texts {
		key, value, ok := strings.Cut(text, "=")
		if !ok || value == "" {
			return nil, usagef("--filter %q: must be KEY=VALUE, as dangling=true is", text)
		}
		switch key {
		case "reference":
			if _, err := path.Match(value, ""); err != nil {
				return nil, usagef("pattern %q: %v", value, err)
			}
			value = strings.TrimPrefix(value, "docker.io/")
			f.references = append(f.references, strings.TrimPrefix(value, "library/"))
		case "dangling":
			yes, err := strconv.ParseBool(value)
			if err != nil {
				return nil, usagef("--filter %q: must be dangling=true or dangling=false", text)
			}
			f.dangling = &yes
		case "before":
			f.before = append(f.before, value)
		case "since":
			f.since = append(f.since, value)
		case "until":
			if _, err := parseUntil([]string{text}, time.Now()); err != nil {
				return nil, err
			}
			f.until = append(f.until, text)
		default:
			return nil, usagef("--filter %q: unknown key; known are dangling, reference, before, since, until", text)
		}
	}
	return f, nil
}

// resolve looks the images up that the filters name.
func (f *imageFilters) resolve(mount string) (err error) {
	if f.newest, err = parseUntil(f.until, time.Now()); err != nil {
		return err
	}
	for _, arg := range f.before {
		img, err := resolve(mount, arg)
		if err != nil {
			return err
		}
		if f.newest.IsZero() || img.Created.Before(f.newest) {
			f.newest = img.Created
		}
	}
	for _, arg := range f.since {
		img, err := resolve(mount, arg)
		if err != nil {
			return err
		}
		if img.Created.After(f.oldest) {
			f.oldest = img.Created
		}
	}
	return nil
}

// keep reports whether r is to be shown.
func (f *imageFilters) keep(r record) bool {
	switch {
	case f.dangling != nil && r.Dangling != *f.dangling,
		(f.before != nil || f.until != nil) && !r.Created.Before(f.newest),
		f.since != nil && !r.Created.After(f.oldest):
		return false
	case f.references == nil:
		return true
	case r.Repository == noTag:
		return false
	}
	for _, pattern := range f.references {
		repo, _ := path.Match(pattern, r.Repository)
		tagged, _ := path.Match(pattern, r.ref())
		if repo || tagged {
			return true
		}
	}
	return false
}
