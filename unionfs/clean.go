package unionfs

import (
	iofs "io/fs"
	"strconv"
	"strings"
)

// Ceilings of a layer. An archive that passes one is refused by an [EntryError].
const (
	MaxEntries    = 1 << 24        // names, with whiteouts and implicit parents; so also inodes of each kind
	MaxName       = 255            // bytes of a path component: NAME_MAX
	MaxPath       = 4096           // bytes of a cleaned path: PATH_MAX
	MaxDepth      = 1024           // directories above an entry
	MaxTarget     = 4095           // bytes of a symbolic link's target: PATH_MAX less its NUL
	MaxHops       = 40             // symbolic links followed in one path, as Linux does
	maxFollowed   = 2 * MaxPath    // bytes of their targets, so that one entry's way is not 40 paths long
	MaxNameHeap   = 1 << 30        // bytes of all names and link targets
	MaxXattrValue = 1 << 16        // bytes of one attribute's value: XATTR_SIZE_MAX
	MaxXattrs     = 128            // attributes of one inode
	MaxXattrSet   = 1 << 20        // bytes of all attributes of one inode, with 6 for each
	MaxXattrHeap  = 256 << 20      // bytes of all sets of attributes, each distinct set once
	MaxXattrNames = 4096           // distinct attribute names
	MaxSize       = 1 << 62        // bytes of a file, of all files, of a blob
	MaxChunks     = 1 << 24        // chunks of all contents
	MaxChunkSize  = 1<<32 - 1      // bytes of a chunk
	maxID         = 1<<32 - 2      // largest user or group: 2^32-1 means "do not change" to chown
	maxNsec       = 999_999_999    // largest nanosecond
	maxMajor      = 1<<12 - 1      // new_encode_dev: 12 bits
	maxMinor      = 1<<20 - 1      // new_encode_dev: 20 bits
	whiteoutMark  = ".wh."         // prefix of a whiteout's name
	whiteoutMeta  = ".wh..wh."     // prefix of names that are not files in any layer
	opaqueName    = ".wh..wh..opq" // in a directory: it hides everything below
)

// EntryError reports an entry of an archive that is refused. It is
// [io/fs.ErrInvalid].
type EntryError struct {
	Name   string // as the archive has it, or "inode N" for a content
	Reason string
}

// Error says which entry and why, with the name quoted and cut to a readable length.
func (e *EntryError) Error() string {
	name := e.Name
	if len(name) > MaxName {
		name = name[:MaxName] + "…"
	}
	return "unionfs: entry " + strconv.Quote(name) + ": " + e.Reason
}

// Is makes the error io/fs.ErrInvalid.
func (e *EntryError) Is(target error) bool { return target == iofs.ErrInvalid }

// cleanPath makes an archive's name relative to the root, without empty and "."
// components; the root is "". The reason is not empty when the name is refused.
func cleanPath(name string) (clean, reason string) {
	if isClean(name) {
		return name, ""
	}
	if len(name) > 2*MaxPath {
		return "", "path too long"
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", "NUL in the name"
	}
	var b strings.Builder
	for c := range strings.SplitSeq(name, "/") {
		switch {
		case c == "" || c == ".":
			continue
		case c == "..":
			return "", `".." in the name`
		case len(c) > MaxName:
			return "", "component of the name too long"
		}
		if b.Len() > 0 {
			b.WriteByte('/')
		}
		b.WriteString(c)
	}
	if b.Len() > MaxPath {
		return "", "path too long"
	}
	return b.String(), ""
}

// isClean reports whether cleanPath would return name as it is.
func isClean(name string) bool {
	if len(name) > MaxPath {
		return false
	}
	start := 0
	for i := 0; i <= len(name); i++ {
		if i < len(name) && name[i] != '/' {
			if name[i] == 0 {
				return false
			}
			continue
		}
		c := name[start:i]
		if c == "" || c == "." || c == ".." || len(c) > MaxName {
			return false
		}
		start = i + 1
	}
	return true
}

// splitPath cuts the first component off a cleaned path.
func splitPath(p string) (first, rest string) {
	first, rest, _ = strings.Cut(p, "/")
	return first, rest
}

// splitBase cuts a cleaned path into directory and last component.
func splitBase(p string) (dir, base string) {
	i := strings.LastIndexByte(p, '/')
	if i < 0 {
		return "", p
	}
	return p[:i], p[i+1:]
}
