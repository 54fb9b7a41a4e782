package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

var lastSides = []side{
	{"imgfs eStargz", nil, func(b *coldBench) (func(), func()) { return b.imgfsWhole("estargz") }},
	{"imgfs zstd:chunked", nil, func(b *coldBench) (func(), func()) { return b.imgfsWhole("zstdchunked") }},
	{"imgfs gzip", nil, func(b *coldBench) (func(), func()) { return b.imgfsWhole("gzip") }},
	{"imgfs gzip ls", nil, (*coldBench).imgfsPass},
	{"ctr pull + tar c", []string{"containerd", "ctr", "runc"}, (*coldBench).ctrWhole},
	{"crane export", nil, (*coldBench).crane},
	{"curl \\| gunzip", []string{"curl"}, (*coldBench).curl},
}

// TestBenchLast is from nothing to the last byte of the whole tree.
func TestBenchLast(t *testing.T) {
	overLinks(t, append(benchLinks, benchLink{"unlimited", &link{}}), lastSides, "ctr pull + tar c", table{
		title: "Last byte",
		text: "From nothing to the end of `tar c` of the whole tree: seconds, MB and requests of the registry; medians of %d. In brackets the speed-up over `ctr images pull` and `tar c`. " +
			"`curl | gunzip` of all layers at once into nothing is the limit. \"imgfs gzip ls\" lists the root directory, which is answered when every layer has come, was checked and compiled.",
	})
}

// imgfsWhole reads the whole tree right after the mount.
func (b *coldBench) imgfsWhole(format string) (func(), func()) {
	path := b.push(format)
	m := startMount(b.t)
	return func() { swallow(b.t, "tar", "-C", m.path(path), "-c", ".") }, func() {
		m.stop()
		os.RemoveAll(m.cache)
	}
}

// imgfsPass lists the root directory, which is answered when the streaming pass has
// brought, checked and compiled every layer.
func (b *coldBench) imgfsPass() (func(), func()) {
	path := b.push("gzip")
	m := startMount(b.t)
	return func() { mustRun(b.t, "ls", m.path(path)) }, func() {
		m.stop()
		os.RemoveAll(m.cache)
	}
}

// ctrWhole pulls by containerd, mounts what it has unpacked, and reads it.
func (b *coldBench) ctrWhole() (func(), func()) {
	b.push("gzip")
	ctr := startContainerd(b.t)
	ref := b.r.host + "/debian:" + benchPrefix + b.image.name
	dir := filepath.Join(b.work, fmt.Sprint("ctr-", b.runs))
	if err := os.Mkdir(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	return func() {
			ctr("images", "pull", "--plain-http", ref)
			ctr("images", "mount", ref, dir)
			swallow(b.t, "tar", "-C", dir, "-c", ".")
		}, func() {
			ctr("images", "unmount", "--rm", dir)
			ctr("images", "rm", "--sync", ref)
		}
}

// crane writes the merged tree of the image as one archive.
func (b *coldBench) crane() (func(), func()) {
	b.push("gzip")
	crane := craneBinary(b.t)
	return func() { swallow(b.t, crane, "export", b.r.host+"/debian:"+benchPrefix+b.image.name, "-") }, nil
}
