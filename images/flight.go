package images

import (
	"context"
	"fmt"
	"runtime/debug"
)

// flight runs f once for all who ask for key at the same time. f is detached
// from its callers: one that gives up does not fail the others.
func flight[T any](ctx context.Context, s *Store, key string, f func(context.Context) (T, error)) (T, error) {
	done := s.flights.DoChan(key, func() (v any, err error) {
		defer recovered(&err)
		return f(s.ctx)
	})
	var zero T
	select {
	case r := <-done:
		if r.Err != nil {
			return zero, r.Err
		}
		return r.Val.(T), nil
	case <-ctx.Done():
		s.tasks.Go(func() { <-done }) // Close waits for it
		return zero, ctx.Err()
	}
}

// recovered turns a panic into an error, with its stack: it fails the work that
// it is deferred in and nothing else.
func recovered(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("images: panic: %v\n%s", r, debug.Stack())
	}
}
