package fetch

import (
	"context"

	"golang.org/x/sync/semaphore"
)

// Chunks and tables of contents are held in memory while they are checked. How
// many at once is bounded by the slots of each host, which is enough for those
// of usual size (eStargz cuts at 4 MiB): 16 × 8 MiB. Larger ones share
// maxLarge, whatever layer, registry or reader they are for, so that a hostile
// image cannot have a chunk of maxChunk in every slot.
const (
	largeSize = 8 << 20
	maxLarge  = 256 << 20
)

// largeMemory is a variable of the package because the process has one memory.
//
// Who waits for it may hold a slot. Who has it waits for the bytes of a request
// that is under way, which has a deadline; a request that breaks and is made again
// may wait for a slot within that.
var largeMemory = semaphore.NewWeighted(maxLarge)

// holdMemory waits until n bytes may be held, until release is called. The error
// is ctx's.
func holdMemory(ctx context.Context, n int64) (release func(), err error) {
	if n <= largeSize {
		return func() {}, nil
	}
	n = min(n, maxLarge)
	if err := largeMemory.Acquire(ctx, n); err != nil {
		return nil, err
	}
	return func() { largeMemory.Release(n) }, nil
}
