package fetch

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
)

// digester counts and hashes a stream.
type digester struct {
	h hash.Hash
	n int64
}

func (d *digester) add(p []byte) {
	if d.h == nil {
		d.h = sha256.New()
	}
	d.h.Write(p)
	d.n += int64(len(p))
}

func (d *digester) hex() string {
	d.add(nil)
	return hex.EncodeToString(d.h.Sum(nil))
}

// hash takes the blocks of c until it is closed.
func (d *digester) hash(ctx context.Context, c <-chan *block) error {
	for {
		select {
		case b, ok := <-c:
			if !ok {
				return nil
			}
			d.add(b.buf[:b.n])
			b.release()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// source sends the blob as it comes.
func (p *Pass) source(ctx context.Context, sum *digester, out chan<- *block) error {
	rc, err := p.l.Blob.Stream(ctx, Soon, 0)
	if err != nil {
		return err
	}
	defer rc.Close()
	pool := newBlockPool()
	for {
		b, err := pool.take(ctx, 1)
		if err != nil {
			return err
		}
		n, err := rc.Read(b.buf[:])
		if n > 0 {
			b.n = n
			sum.add(b.buf[:n])
			if sum.n > p.l.Blob.Size() {
				return fmt.Errorf("%w: more than the %d bytes that it should have", ErrDigest, p.l.Blob.Size())
			}
			if err := send(ctx, out, b); err != nil {
				return err
			}
			p.passed.Store(sum.n)
		} else {
			b.release()
		}
		switch err {
		case nil:
		case io.EOF:
			return nil
		default:
			return err
		}
	}
}

// inflate sends the layer decompressed, to both outs.
func (p *Pass) inflate(ctx context.Context, in *blockReader, outs ...chan<- *block) error {
	if _, err := in.Read(nil); err != nil && err != io.EOF { // no buffers before something came
		return err
	}
	f, r, closer, err := decompress(in)
	if err != nil {
		return ctxOr(ctx, err)
	}
	defer closer()
	p.format.Store(uint32(f))
	pool := newBlockPool()
	limit := min(max(expandsFreely, p.l.Blob.Size()*maxRatio), maxExpanded)
	for n := int64(0); ; {
		b, err := pool.take(ctx, int32(len(outs)))
		if err != nil {
			return err
		}
		b.n, err = r.Read(b.buf[:])
		if n += int64(b.n); n > limit {
			return fmt.Errorf("%w: %d bytes expand to more than %d", ErrNotImage, p.l.Blob.Size(), limit)
		}
		for _, out := range outs {
			if err := send(ctx, out, b); err != nil {
				return err
			}
		}
		switch err {
		case nil:
		case io.EOF:
			return nil
		default:
			return ctxOr(ctx, fmt.Errorf("%s: %w", f, err))
		}
	}
}

// decompress looks at the first bytes of a blob, which decide what it is, not
// its media type, and returns its uncompressed form. closer frees the decoder.
func decompress(src io.Reader) (f Format, r io.Reader, closer func(), err error) {
	br := bufio.NewReaderSize(src, blockSize)
	head, err := br.Peek(tarBlock)
	if err != nil && err != io.EOF {
		return 0, nil, nil, err
	}
	nothing := func() {}
	switch {
	case isGzip(head):
		zr, err := newGzip(br)
		return FormatGzip, zr, nothing, err
	case isZstd(head):
		zr, err := newZstd(br)
		if err != nil {
			return 0, nil, nil, err
		}
		return FormatZstd, zr, zr.Close, nil
	case isTar(head):
		return FormatTar, br, nothing, nil
	}
	return 0, nil, nil, fmt.Errorf("begins with %.8x: not gzip, zstd or tar", head)
}

// ctxOr is what is wrong: the end of ctx if that is what it was, else the bytes.
func ctxOr(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errMalformed{err}
}
