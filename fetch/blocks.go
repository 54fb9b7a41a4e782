package fetch

import (
	"context"
	"io"
	"sync/atomic"
)

// The streaming pass moves bytes between its goroutines in blocks. Their number
// is bounded, so that a goroutine that is ahead of the next one waits for it.
const (
	blockSize = 64 << 10
	maxBlocks = 12 // on each side of the decompressor: 768 KiB
)

// block is a piece of a stream. It goes back to its pool when everyone who was
// given it has released it.
type block struct {
	pool *blockPool
	refs atomic.Int32
	n    int
	buf  [blockSize]byte
}

type blockPool struct {
	free chan *block
	made int // by the only goroutine that takes
}

func newBlockPool() *blockPool { return &blockPool{free: make(chan *block, maxBlocks)} }

// take returns a block for users users; only one goroutine may call it.
func (p *blockPool) take(ctx context.Context, users int32) (*block, error) {
	var b *block
	select {
	case b = <-p.free:
	default:
		if p.made < maxBlocks {
			p.made++
			b = &block{pool: p}
			break
		}
		select {
		case b = <-p.free:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	b.refs.Store(users)
	b.n = 0
	return b, nil
}

func (b *block) release() {
	if b.refs.Add(-1) == 0 {
		b.pool.free <- b // never blocks: it has room for all
	}
}

// send gives b to the goroutine that reads c.
func send(ctx context.Context, c chan<- *block, b *block) error {
	select {
	case c <- b:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// blockReader reads the blocks of a channel until it is closed.
type blockReader struct {
	ctx context.Context
	c   <-chan *block
	cur *block
	at  int
	pos int64 // bytes read so far
}

func (r *blockReader) Read(p []byte) (int, error) {
	for r.cur == nil || r.at == r.cur.n {
		if r.cur != nil {
			r.cur.release()
			r.cur = nil
		}
		select {
		case b, ok := <-r.c:
			if !ok {
				return 0, io.EOF
			}
			r.cur, r.at = b, 0
		case <-r.ctx.Done():
			return 0, r.ctx.Err()
		}
	}
	n := copy(p, r.cur.buf[r.at:r.cur.n])
	r.at += n
	r.pos += int64(n)
	return n, nil
}
