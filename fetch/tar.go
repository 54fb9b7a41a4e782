package fetch

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/imgfs/imgfs/unionfs"
)

// The layer archive: https://github.com/opencontainers/image-spec/blob/main/layer.md

const tarBlock = 512

// paxXattr begins the PAX records that hold extended attributes.
const paxXattr = "SCHILY.xattr."

// tarEntry translates a header. ok is false for what is no file (a volume label).
func tarEntry(h *tar.Header) (e *unionfs.Entry, ok bool, err error) {
	e = &unionfs.Entry{
		Name: h.Name, Type: h.Typeflag, Mode: uint32(h.Mode & 0o7777), UID: int64(h.Uid), GID: int64(h.Gid),
		Mtime: h.ModTime.Unix(), MtimeNsec: uint32(h.ModTime.Nanosecond()), Linkname: h.Linkname,
	}
	switch h.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		e.Type, e.Size = tar.TypeReg, h.Size
	case tar.TypeChar, tar.TypeBlock:
		e.Major, e.Minor = h.Devmajor, h.Devminor
	case tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeFifo:
	case tar.TypeXGlobalHeader, 'V':
		return nil, false, nil
	default:
		return nil, false, fmt.Errorf("%q is of unknown type %q: %w", h.Name, h.Typeflag, ErrNotImage)
	}
	for k, v := range h.PAXRecords {
		if name, found := strings.CutPrefix(k, paxXattr); found {
			if e.Xattrs == nil {
				e.Xattrs = make(map[string]string)
			}
			e.Xattrs[name] = v
		}
	}
	return e, true, nil
}

// isSparse reports whether the archive has only parts of the file, so that its
// bytes are not one range of the stream.
func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// isAdded reports whether a regular file is what eStargz adds to a layer: one of
// its landmarks, a file of one byte, or the table of contents. A file of such a
// name that is none of these is an ordinary one. The reader returned has all
// bytes of the file.
func isAdded(h *tar.Header, r io.Reader) (bool, io.Reader, error) {
	if !isTOCName(h.Name) || h.Typeflag != tar.TypeReg {
		return false, r, nil
	}
	head := make([]byte, min(h.Size, 64))
	if _, err := io.ReadFull(r, head); err != nil {
		return false, nil, noEOF(err)
	}
	all := io.MultiReader(bytes.NewReader(head), r)
	if h.Size == 1 {
		return head[0] == 0xf, all, nil
	}
	rest, ok := bytes.CutPrefix(head, []byte("{"))
	return ok && bytes.HasPrefix(bytes.TrimSpace(rest), []byte(`"version"`)), all, nil
}

// isTar reports whether head, the first block of a blob, begins an archive: a
// header's checksum is right, or the archive is empty.
func isTar(head []byte) bool {
	if len(head) == 0 {
		return true
	}
	if len(head) < tarBlock {
		return false
	}
	var sum int64
	zero := true
	for i, c := range head[:tarBlock] {
		if c != 0 {
			zero = false
		}
		if i >= 148 && i < 156 { // the checksum itself counts as blanks
			c = ' '
		}
		sum += int64(c)
	}
	if zero {
		return true
	}
	var stored int64
	for _, c := range bytes.Trim(head[148:156], " \x00") {
		if c < '0' || c > '7' {
			return false
		}
		stored = stored<<3 | int64(c-'0')
	}
	return stored == sum
}

// noEOF turns the end of a stream into an unexpected one.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
