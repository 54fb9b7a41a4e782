package integration

import (
	"archive/tar"
	"bytes"
	"io"
	"strings"
	"testing"
	"time"
)

// An entry of a tar archive. Layers that are odd on purpose are written entry by
// entry, because no file system and no build tool would make them.
type entry struct {
	head tar.Header
	body string
}

// epoch is the modification time of every entry that has none of its own.
var epoch = time.Date(2024, 2, 29, 12, 30, 45, 0, time.UTC)

type option func(*tar.Header)

func mode(m int64) option          { return func(h *tar.Header) { h.Mode = m } }
func owner(uid, gid int) option    { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }
func mtime(sec, nsec int64) option { return func(h *tar.Header) { h.ModTime = time.Unix(sec, nsec) } }
func device(major, minor int64) option {
	return func(h *tar.Header) { h.Devmajor, h.Devminor = major, minor }
}
func gnu() option         { return func(h *tar.Header) { h.Format = tar.FormatGNU } }
func size(n int64) option { return func(h *tar.Header) { h.Size = n } }
func newEntry(typ byte, name string, perm int64, opts []option) entry {
	e := entry{head: tar.Header{Typeflag: typ, Name: name, Mode: perm, ModTime: epoch, Format: tar.FormatPAX}}
	for _, o := range opts {
		o(&e.head)
	}
	return e
}

func xattr(name, value string) option {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
}

func dir(name string, opts ...option) entry {
	return newEntry(tar.TypeDir, strings.TrimSuffix(name, "/")+"/", 0o755, opts)
}

func file(name, body string, opts ...option) entry {
	e := newEntry(tar.TypeReg, name, 0o644, append([]option{size(int64(len(body)))}, opts...))
	e.body = body
	return e
}

func symlink(name, target string, opts ...option) entry {
	e := newEntry(tar.TypeSymlink, name, 0o777, opts)
	e.head.Linkname = target
	return e
}

func hardlink(name, target string, opts ...option) entry {
	e := newEntry(tar.TypeLink, name, 0o644, opts)
	e.head.Linkname = target
	return e
}

func special(typ byte, name string, opts ...option) entry {
	return newEntry(typ, name, 0o600, opts)
}

// whiteout hides the lower name; opaque hides all that lower layers have in dir.
func whiteout(name string) entry {
	i := strings.LastIndexByte(name, '/') + 1
	return file(name[:i]+".wh."+name[i:], "", mode(0))
}
func opaque(dir string) entry { return file(strings.TrimSuffix(dir, "/")+"/.wh..wh..opq", "", mode(0)) }

// writeTar writes entries into w, with the two blocks that end an archive.
func writeTar(w io.Writer, entries []entry) error {
	tw := tar.NewWriter(w)
	for i := range entries {
		h := entries[i].head
		if err := tw.WriteHeader(&h); err != nil {
			return err
		}
		if _, err := io.WriteString(tw, entries[i].body); err != nil {
			return err
		}
	}
	return tw.Close()
}

// tarball is writeTar into memory.
func tarball(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := writeTar(&b, entries); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// aclAccess is a POSIX ACL in the form of its xattr: entries of {tag, permissions,
// id}, little-endian, after a version (linux/posix_acl_xattr.h).
func aclAccess(entries ...[3]uint32) string {
	b := []byte{2, 0, 0, 0}
	for _, e := range entries {
		b = append(b, byte(e[0]), byte(e[0]>>8), byte(e[1]), byte(e[1]>>8), byte(e[2]), byte(e[2]>>8), byte(e[2]>>16), byte(e[2]>>24))
	}
	return string(b)
}

const noID = 1<<32 - 1

// capNetBind is CAP_NET_BIND_SERVICE, permitted and effective, as security.capability
// has it: revision 2 with the effective bit, then two words permitted and inheritable.
var capNetBind = string([]byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})

// oddLower is a layer full of what images rarely have. What oddUpper changes
// stands below odd/change.
func oddLower() []entry {
	long := strings.Repeat("n", 255)
	deep := "odd/" + strings.Repeat(strings.Repeat("d", 200)+"/", 15)
	acl := aclAccess([3]uint32{1, 6, noID}, [3]uint32{2, 4, 33}, [3]uint32{4, 4, noID}, [3]uint32{16, 4, noID}, [3]uint32{32, 4, noID})
	list := []entry{
		dir("odd", mtime(1700000000, 123456789)),
		file("odd/empty", ""),
		file("odd/nanoseconds", "n", mtime(1700000001, 999999999)),
		file("odd/before-1970", "b", mtime(-86400, 0)),
		file("odd/after-2038", "a", mtime(4102444800, 5)),
		file("odd/setuid", "#!/bin/true\n", mode(0o4755)),
		file("odd/setgid", "#!/bin/true\n", mode(0o2755), owner(0, 42)),
		file("odd/nobody", "x", mode(0), owner(65534, 65534)),
		file("odd/big-ids", "x", owner(1<<31-7, 1<<31-8)),
		dir("odd/sticky", mode(0o1777)),
		dir("odd/empty-dir", mode(0o500), owner(33, 33)),
		file("odd/capability", "binary", mode(0o755), xattr("security.capability", capNetBind)),
		file("odd/xattrs", "x", xattr("user.one", "1"), xattr("user.empty", ""), xattr("user.bin", "\x00\xff\n"), xattr("trusted.t", "t")),
		dir("odd/xattr-dir", xattr("user.dir", "d")),
		file("odd/acl", "x", mode(0o644), xattr("system.posix_acl_access", acl)),
		dir("odd/acl-dir", xattr("system.posix_acl_default", acl)),
		special(tar.TypeChar, "odd/char", device(1, 3), mode(0o666)),
		special(tar.TypeBlock, "odd/block", device(259, 70000), owner(0, 6)),
		special(tar.TypeFifo, "odd/fifo", mode(0o640)),
		symlink("odd/link-relative", "sticky/../nanoseconds"),
		symlink("odd/link-absolute", "/etc/os-release", owner(7, 8), mtime(1600000000, 7)),
		symlink("odd/link-dangling", "nowhere/at/all"),
		symlink("odd/link-long", strings.Repeat("t/", 500)+"t"),
		file("odd/hard-1", "hard", xattr("user.hard", "h")),
		hardlink("odd/hard-2", "odd/hard-1"),
		hardlink("odd/hard-3", "./odd/hard-2"),
		special(tar.TypeFifo, "odd/hard-fifo-1"),
		hardlink("odd/hard-fifo-2", "odd/hard-fifo-1"),
		file("odd/"+long, "long component"),
		file(deep+"file", "long path"),
		file("odd/gnu-"+strings.Repeat("g", 150), "a GNU long name", gnu()),
		file("odd/new\nline \t\\ \" and spaces ", "s"),
		file("odd/Ünïcödé-\u65e5\u672c", "u"),
		file("odd/missing/parents/of/this", "implicit"),
		file("./odd/dot-slash", "d"),
		file("odd//double//slash", "d"),
		file("odd/twice", "first"),
		file("odd/twice", "second, longer", mode(0o600)),
		file("odd/.whiteout-not", "a name that only begins like one"),
	}
	return append(list, oddBeforeChange()...)
}

// oddBeforeChange is what oddUpper changes.
func oddBeforeChange() []entry {
	return []entry{
		dir("odd/change"),
		file("odd/change/removed", "r"),
		dir("odd/change/removed-dir"), file("odd/change/removed-dir/a", "a"), dir("odd/change/removed-dir/b"), file("odd/change/removed-dir/b/c", "c"),
		dir("odd/change/opaque", mode(0o711)), file("odd/change/opaque/hidden", "h"), file("odd/change/opaque/replaced", "lower"), dir("odd/change/opaque/sub"), file("odd/change/opaque/sub/hidden", "h"),
		dir("odd/change/remade"), file("odd/change/remade/old", "o"),
		dir("odd/change/dir-to-file"), file("odd/change/dir-to-file/x", "x"),
		file("odd/change/file-to-dir", "f"),
		symlink("odd/change/link-to-dir", "target-dir"),
		dir("odd/change/target-dir"), file("odd/change/target-dir/lower", "l"),
		symlink("odd/change/link-followed", "target-dir"),
		dir("odd/change/dir-to-link"), file("odd/change/dir-to-link/x", "x"),
		file("odd/change/file-to-fifo", "f"),
		special(tar.TypeChar, "odd/change/char-to-file", device(5, 0)),
		dir("odd/change/merged", mode(0o750), owner(1, 1)), file("odd/change/merged/lower", "l"), file("odd/change/merged/both", "lower"),
		dir("odd/change/attributes", mode(0o700), xattr("user.gone", "g")),
		file("odd/change/linked", "linked from above", xattr("user.kept", "k")),
		file("odd/change/linked-and-replaced", "old content"),
		file("odd/change/pair-1", "pair"), hardlink("odd/change/pair-2", "odd/change/pair-1"),
		dir("odd/change/implicit", mode(0o701), owner(9, 9), mtime(1500000000, 1)),
	}
}

// oddUpper is the layer above oddLower.
func oddUpper() []entry {
	return []entry{
		whiteout("odd/change/removed"),
		whiteout("odd/change/removed-dir"),
		dir("odd/change/opaque"), opaque("odd/change/opaque"), file("odd/change/opaque/replaced", "upper"), file("odd/change/opaque/new", "n"),
		whiteout("odd/change/remade"), dir("odd/change/remade"), file("odd/change/remade/new", "n"),
		file("odd/change/dir-to-file", "a file now"),
		dir("odd/change/file-to-dir", mode(0o711)), file("odd/change/file-to-dir/y", "y"),
		dir("odd/change/link-to-dir"), file("odd/change/link-to-dir/z", "z"),
		file("odd/change/link-followed/through", "lands in target-dir"),
		symlink("odd/change/dir-to-link", "merged"),
		special(tar.TypeFifo, "odd/change/file-to-fifo"),
		file("odd/change/char-to-file", "c"),
		dir("odd/change/merged", mode(0o705), owner(2, 2), mtime(1650000000, 3)), file("odd/change/merged/upper", "u"), file("odd/change/merged/both", "upper"),
		dir("odd/change/attributes", mode(0o755), owner(3, 4), xattr("user.new", "n")),
		hardlink("odd/change/link-across", "odd/change/linked"),
		hardlink("odd/change/link-to-old", "odd/change/linked-and-replaced"), file("odd/change/linked-and-replaced", "new content"),
		file("odd/change/pair-1", "no longer a pair"),
		file("odd/change/implicit/child", "the directory keeps its attributes"),
		hardlink("odd/change/hostname", "etc/hostname"),
	}
}

// oddNames is a layer with names that are not UTF-8. JSON cannot hold them, so
// that a layer that has them is read whole, whatever its format.
func oddNames() []entry {
	return []entry{
		dir("odd"),
		dir("odd/latin1-\xe9t\xe9"), file("odd/latin1-\xe9t\xe9/\xff\xfe", "bytes", gnu(), mtime(1700000002, 0)),
		symlink("odd/latin1-link", "latin1-\xe9t\xe9", gnu()),
		special(tar.TypeFifo, "odd/\x80fifo", gnu()),
	}
}
