package images

import (
	"context"
	"errors"
	iofs "io/fs"
	"time"
)

// PathKind is what a registry has at a path.
type PathKind int

// What a registry has at a path.
const (
	PathNothing    PathKind = iota
	PathRepository          // a repository
	PathNamespace           // no repository, but there are some below it
	PathUnknown             // no repository; the registry does not list what is below
)

// probe is a remembered answer about a path.
type probe struct {
	until time.Time
	kind  PathKind
}

// Probe asks the registry what it has at path, which must be a ValidRepo. The
// answer is remembered as long as a negative one for a tag; again asks anew. A
// registry that refuses to say has nothing there, as far as this user can see.
func (s *Store) Probe(ctx context.Context, path string, again bool) (PathKind, error) {
	s.mu.Lock()
	p, ok := s.probes[path]
	s.mu.Unlock()
	if ok && !again && time.Now().Before(p.until) {
		return p.kind, nil
	}
	kind, err := flight(ctx, s, "probe "+path, func(ctx context.Context) (PathKind, error) { return s.probe(ctx, path) })
	if err != nil {
		return PathNothing, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	shrink(s.probes, func(p probe) time.Time { return p.until })
	s.probes[path] = probe{until: time.Now().Add(negativeTTL), kind: kind}
	return kind, nil
}

func (s *Store) probe(ctx context.Context, path string) (PathKind, error) {
	_, path = splitPlatform(path)
	repo, err := repository(path)
	if err != nil {
		return PathNothing, err
	}
	has, err := s.client.HasRepository(ctx, repo)
	if has {
		return PathRepository, nil
	}
	if err != nil && !errors.Is(err, iofs.ErrPermission) {
		return PathNothing, err
	}
	if host, _ := SplitHost(path); host == "" {
		return PathNothing, nil // Docker Hub has repositories of two components at most
	}
	has, known, err := s.client.HasNamespace(ctx, repo.Registry, repo.RepositoryStr())
	switch {
	case err != nil && !errors.Is(err, iofs.ErrPermission):
		return PathNothing, err
	case has:
		return PathNamespace, nil
	case known:
		return PathNothing, nil
	}
	return PathUnknown, nil
}

// shrink makes room in a map of remembered answers: for one more, when it is
// full, by dropping what has expired, or anything.
func shrink[K comparable, V any](m map[K]V, until func(V) time.Time) {
	if len(m) < maxNegative {
		return
	}
	now := time.Now()
	for k, v := range m {
		if now.After(until(v)) || len(m) >= maxNegative {
			delete(m, k)
		}
	}
}
