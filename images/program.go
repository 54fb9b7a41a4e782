package images

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"io"
	"path"
	"slices"
	"strings"
)

// What a program may ask to have ready. A file that says more is not a program
// that anybody runs, or names more than is worth fetching.
const (
	maxSegments  = 128      // program headers
	maxDynamic   = 32 << 10 // bytes of the dynamic section
	maxLibraries = 128      // names of libraries
	maxLibName   = 256      // bytes of one, and of the interpreter's path
	maxRunpath   = 16       // directories to look in
)

// program is what the kernel and the dynamic linker will look for when a program
// is run.
type program struct {
	interp    string   // path of the dynamic linker, or of a script's interpreter
	libraries []string // names or paths (DT_NEEDED)
	runpath   []string // directories to look in first; $ORIGIN is the file's own
	triplet   string   // of the machine, as Debian's directories of libraries have it
}

// isProgram reports whether a file that begins with head may be a program.
func isProgram(head []byte) bool {
	return bytes.HasPrefix(head, []byte(elf.ELFMAG)) || bytes.HasPrefix(head, []byte("#!"))
}

// triplets name the directories of libraries by machine.
var triplets = map[elf.Machine]string{
	elf.EM_X86_64: "x86_64-linux-gnu", elf.EM_AARCH64: "aarch64-linux-gnu", elf.EM_RISCV: "riscv64-linux-gnu",
	elf.EM_PPC64: "powerpc64le-linux-gnu", elf.EM_LOONGARCH: "loongarch64-linux-gnu",
}

// parseProgram reads what a program needs; ok is false when the file is none that
// it knows (64 bits, little-endian, or a script). Only what the kernel and the
// linker will read too is read.
func parseProgram(r io.ReaderAt) (p program, ok bool) {
	var head [64]byte
	if n, _ := r.ReadAt(head[:], 0); n < 4 {
		return p, false
	}
	if bytes.HasPrefix(head[:], []byte("#!")) {
		return parseScript(r)
	}
	var h elf.Header64
	if head[elf.EI_CLASS] != byte(elf.ELFCLASS64) || head[elf.EI_DATA] != byte(elf.ELFDATA2LSB) || !decodeLE(head[:], &h) ||
		h.Phentsize != 56 || h.Phnum > maxSegments {
		return p, false
	}
	p.triplet = triplets[elf.Machine(h.Machine)]
	segments := make([]elf.Prog64, h.Phnum)
	if !readInto(r, int64(h.Phoff), segments) {
		return p, false
	}
	first := func(typ elf.ProgType) int {
		return slices.IndexFunc(segments, func(s elf.Prog64) bool { return elf.ProgType(s.Type) == typ })
	}
	if i := first(elf.PT_INTERP); i >= 0 {
		p.interp = readText(r, int64(segments[i].Off))
	}
	if i := first(elf.PT_DYNAMIC); i >= 0 && segments[i].Filesz <= maxDynamic && !p.dynamic(r, segments[i], segments) {
		return p, false
	}
	return p, p.interp != "" || len(p.libraries) > 0
}

// parseScript reads the first line of a script.
func parseScript(r io.ReaderAt) (p program, ok bool) {
	var line [maxLibName]byte
	n, _ := r.ReadAt(line[:], 0)
	text, _, ok := strings.Cut(string(line[2:max(n, 2)]), "\n")
	if words := strings.Fields(text); ok && len(words) > 0 {
		p.interp = words[0]
		if path.Base(p.interp) == "env" && len(words) > 1 && !strings.HasPrefix(words[1], "-") {
			p.libraries = []string{"/usr/bin/" + words[1]} // most often; if not, nothing is lost
		}
	}
	return p, p.interp != ""
}

// dynamic reads the dynamic section.
func (p *program) dynamic(r io.ReaderAt, s elf.Prog64, segments []elf.Prog64) bool {
	list := make([]elf.Dyn64, s.Filesz/16)
	if !readInto(r, int64(s.Off), list) {
		return false
	}
	strtab := int64(-1)
	for _, d := range list {
		if elf.DynTag(d.Tag) == elf.DT_STRTAB {
			for _, l := range segments {
				if elf.ProgType(l.Type) == elf.PT_LOAD && d.Val >= l.Vaddr && d.Val-l.Vaddr < l.Filesz {
					strtab = int64(l.Off + (d.Val - l.Vaddr))
				}
			}
		}
	}
	if strtab < 0 {
		return true // static, or nothing that we can follow
	}
	names := 0
	for _, d := range list {
		tag := elf.DynTag(d.Tag)
		if tag != elf.DT_NEEDED && tag != elf.DT_RUNPATH && tag != elf.DT_RPATH || d.Val > 1<<31 {
			continue
		}
		if names++; names > maxLibraries {
			break
		}
		text := readText(r, strtab+int64(d.Val))
		switch {
		case text == "":
		case tag == elf.DT_NEEDED:
			p.libraries = append(p.libraries, text)
		case p.runpath == nil:
			p.runpath = strings.SplitN(text, ":", maxRunpath+1)
			p.runpath = p.runpath[:min(len(p.runpath), maxRunpath)]
		}
	}
	return true
}

// candidates are the paths below the root at which what the program needs may be,
// those of each thing in the order in which they are tried. dir is the directory of
// the program's own file, "" if it is not known.
func (p *program) candidates(dir string) (all [][]string) {
	if p.interp != "" {
		all = append(all, []string{p.interp})
	}
	var dirs []string
	for _, d := range p.runpath {
		if dir == "" && strings.Contains(d, "ORIGIN") {
			continue
		}
		d = strings.ReplaceAll(strings.ReplaceAll(d, "${ORIGIN}", "$ORIGIN"), "$ORIGIN", dir)
		if d != "" && !strings.Contains(d, "$") {
			dirs = append(dirs, d)
		}
	}
	dirs = append(dirs, "/usr/local/lib")
	if p.triplet != "" {
		dirs = append(dirs, "/lib/"+p.triplet, "/usr/lib/"+p.triplet)
	}
	dirs = append(dirs, "/lib64", "/usr/lib64", "/lib", "/usr/lib")
	for _, name := range p.libraries {
		if strings.Contains(name, "/") {
			all = append(all, []string{name})
			continue
		}
		var places []string
		for _, d := range dirs {
			places = append(places, d+"/"+name)
		}
		all = append(all, places)
	}
	return all
}

func decodeLE(b []byte, to any) bool {
	_, err := binary.Decode(b, binary.LittleEndian, to)
	return err == nil
}

// readInto fills to, whose size the caller has bounded, from off.
func readInto(r io.ReaderAt, off int64, to any) bool {
	b := make([]byte, binary.Size(to))
	if off < 0 {
		return false
	}
	if n, _ := r.ReadAt(b, off); n < len(b) {
		return false
	}
	return decodeLE(b, to)
}

// readText reads a string that a zero ends; "" when there is none of that length.
func readText(r io.ReaderAt, off int64) string {
	var b [maxLibName]byte
	if off < 0 {
		return ""
	}
	n, _ := r.ReadAt(b[:], off)
	text, _, ok := bytes.Cut(b[:n], []byte{0})
	if !ok {
		return ""
	}
	return string(text)
}
