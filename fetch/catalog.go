package fetch

import (
	"context"
	"encoding/json"
	"errors"
	iofs "io/fs"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

const (
	maxListing  = 1 << 20 // bytes of a list of tags or repositories
	catalogPage = 200     // repositories asked for: more than one, because not every registry begins where it is told
)

// HasRepository reports whether the registry has the repository, by one request
// for the first of its tags. Docker Hub's 401 for an unknown one is false.
// Errors are those of Resolve.
func (c *Client) HasRepository(ctx context.Context, repo name.Repository) (bool, error) {
	ctx, cancel := c.bound(ctx)
	defer cancel()
	cl := &call{
		repo:  repo.RepositoryStr(),
		path:  "tags/list",
		query: url.Values{"n": {"1"}},
		scope: pullScope(repo.RepositoryStr()),
		tag:   true,
	}
	_, err := c.document(ctx, repo.Registry, cl, maxListing, func([]byte, http.Header) *Error { return nil })
	switch {
	case err == nil, errors.Is(err, ErrNotImage): // a long list, whatever n was
		return true, nil
	case errors.Is(err, iofs.ErrNotExist):
		return false, nil
	}
	return false, err.named("find repository", repo.Name())
}

// HasNamespace reports whether the registry has a repository whose name starts
// with prefix and a slash. known is false if the registry does not tell: it has
// no catalogue, shows it to nobody, or cannot begin it in the middle and it is
// long. Errors are ErrUnreachable and the like.
func (c *Client) HasNamespace(ctx context.Context, reg name.Registry, prefix string) (has, known bool, err error) {
	if reg.RegistryStr() == name.DefaultRegistry {
		return false, false, nil // Docker Hub has none
	}
	ctx, cancel := c.bound(ctx)
	defer cancel()
	prefix = strings.Trim(prefix, "/") + "/"
	// After "a/" comes "a/b", whether a registry sorts by bytes or by components.
	list, e := c.catalog(ctx, reg, catalogPage, prefix)
	if e == nil && !within(list, prefix) && len(list) >= catalogPage && misled(list, prefix) {
		return false, false, nil
	}
	switch {
	case e == nil:
		return within(list, prefix), true, nil
	case e.Status != 0 && e.Status < 500 && e.Status != http.StatusTooManyRequests,
		e.Status == http.StatusNotImplemented, errors.Is(e, ErrNotImage):
		return false, false, nil
	}
	return false, false, e.named("find namespace", reg.Name()+"/"+prefix)
}

// catalog lists n repositories after last.
func (c *Client) catalog(ctx context.Context, reg name.Registry, n int, last string) ([]string, *Error) {
	q := url.Values{"n": {strconv.Itoa(n)}, "last": {last}}
	cl := &call{path: "_catalog", query: q, scope: "registry:catalog:*", unasked: true}
	raw, err := c.document(ctx, reg, cl, maxListing, func([]byte, http.Header) *Error { return nil })
	if err != nil {
		return nil, err
	}
	var v struct {
		Repositories []string `json:"repositories"`
	}
	if json.Unmarshal(raw, &v) != nil {
		return nil, fail(ErrNotImage, "the catalogue is no JSON that we know")
	}
	return v.Repositories, nil
}

// misled reports whether a list that was to begin after prefix does not: the
// registry begins at its beginning, or has no order.
func misled(names []string, prefix string) bool {
	p := strings.ReplaceAll(prefix, "/", "\x00")
	for _, n := range names {
		if n < prefix || strings.ReplaceAll(n, "/", "\x00") < p {
			return true
		}
	}
	return false
}

// within reports whether a name starts with prefix.
func within(names []string, prefix string) bool {
	for _, n := range names {
		if strings.HasPrefix(n, prefix) {
			return true
		}
	}
	return false
}
