package images

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/imgfs/imgfs/fetch/registrytest"
)

// TestParseProgram compares what is read of this machine's programs with debug/elf.
func TestParseProgram(t *testing.T) {
	seen := 0
	for _, path := range []string{"/bin/ls", "/bin/bash", "/usr/bin/git", "/lib64/ld-linux-x86-64.so.2", "/usr/bin/env"} {
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		f, err := elf.NewFile(bytes.NewReader(data))
		if err != nil {
			continue
		}
		want, err := f.ImportedLibraries()
		if err != nil {
			t.Fatal(err)
		}
		p, _ := parseProgram(bytes.NewReader(data))
		if f.Class == elf.ELFCLASS64 && f.Data == elf.ELFDATA2LSB {
			seen++
			if !slices.Equal(p.libraries, want) {
				t.Errorf("%s needs %q, want %q", path, p.libraries, want)
			}
		}
	}
	if seen == 0 {
		t.Skip("no program that is known here")
	}
}

func TestParseScript(t *testing.T) {
	for text, want := range map[string]string{
		"#!/bin/sh\nexit": "/bin/sh []", "#! /usr/bin/python3 -u\n": "/usr/bin/python3 []", "#!/usr/bin/env perl\n": "/usr/bin/env [/usr/bin/perl]",
		"#!": " []", "#!\n": " []", "#!/bin/sh": " []", "echo": " []", "": " []", "\x7fELF": " []",
	} {
		p, ok := parseProgram(bytes.NewReader([]byte(text)))
		if !ok {
			p = program{}
		}
		if got := fmt.Sprint(p.interp, " ", p.libraries); got != want {
			t.Errorf("parseProgram(%q) = %s, want %s", text, got, want)
		}
	}
}

func TestCandidates(t *testing.T) {
	p := program{interp: "/lib/ld.so", libraries: []string{"libx.so", "/opt/liby.so"}, runpath: []string{"$ORIGIN/../lib", "/opt/lib", "$LIB/x"}, triplet: "x86_64-linux-gnu"}
	all := p.candidates("/opt/bin")
	if len(all) != 3 || all[0][0] != "/lib/ld.so" || !slices.Equal(all[1][:2], []string{"/opt/bin/../lib/libx.so", "/opt/lib/libx.so"}) ||
		!slices.Contains(all[1], "/usr/lib/x86_64-linux-gnu/libx.so") || !slices.Equal(all[2], []string{"/opt/liby.so"}) {
		t.Errorf("candidates = %q", all)
	}
}

// elfProgram makes the smallest program that names libraries.
func elfProgram(interp string, libraries ...string) []byte {
	strtab := []byte{0}
	var dyn []elf.Dyn64
	for _, l := range libraries {
		dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_NEEDED), Val: uint64(len(strtab))})
		strtab = append(append(strtab, l...), 0)
	}
	const base = 0x10000
	at := uint64(64 + 3*56)
	interpAt := at
	at += uint64(len(interp)) + 1
	strAt := at
	at += uint64(len(strtab))
	dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_STRTAB), Val: base + strAt}, elf.Dyn64{})
	h := elf.Header64{Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Phoff: 64, Phentsize: 56, Phnum: 3, Ehsize: 64}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB)
	var b bytes.Buffer
	for _, part := range []any{h,
		elf.Prog64{Type: uint32(elf.PT_LOAD), Vaddr: base, Filesz: 1 << 20},
		elf.Prog64{Type: uint32(elf.PT_INTERP), Off: interpAt, Filesz: uint64(len(interp)) + 1},
		elf.Prog64{Type: uint32(elf.PT_DYNAMIC), Off: at, Filesz: uint64(16 * len(dyn))},
		append([]byte(interp), 0), strtab, dyn} {
		binary.Write(&b, binary.LittleEndian, part)
	}
	return b.Bytes()
}

// FuzzProgram reads programs that nobody would run.
func FuzzProgram(f *testing.F) {
	f.Add(elfProgram("/lib64/ld.so", "liba.so", "libb.so"))
	f.Add([]byte("#!/bin/sh\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, ok := parseProgram(bytes.NewReader(data))
		if !ok {
			return
		}
		if len(p.libraries) > maxLibraries || len(p.interp) > maxLibName {
			t.Errorf("%d libraries, an interpreter of %d bytes", len(p.libraries), len(p.interp))
		}
		p.candidates("/x")
	})
}

// TestProgramNeeds: when the beginning of a program is read, its libraries, and
// what they need, are fetched before they are read.
func TestProgramNeeds(t *testing.T) {
	reg := registrytest.New(t, registrytest.Options{})
	pad := func(b []byte, seed string) string { return string(b) + seed + noise(300<<10) }
	img := stargzImage(t,
		file("bin/", ""), file("bin/prog", pad(elfProgram("/lib64/ld.so", "liba.so", "libgone.so"), "1")),
		file("between/", ""), file("between/much", noise(2<<20)),
		file("lib64/", ""), file("lib64/ld.so", pad(nil, "2")), file("lib64/liba.so", pad(elfProgram("", "libb.so"), "3")),
		file("lib64/other", pad(nil, "5")+noise(600<<10)),
		file("opt/", ""), file("usr/", ""), file("usr/lib/", ""), file("usr/lib/libb.so", pad(nil, "4")))
	reg.Push(t, "prog/app:v1", img)
	n := Name{Repo: reg.Host() + "/prog/app", Tag: "v1"}
	s := openAt(t, t.TempDir(), "")
	defer s.Close()
	ctx := context.Background()
	if err := s.Pull(ctx, n); err != nil {
		t.Fatal(err)
	}
	root, err := s.Root(ctx, n)
	if err != nil {
		t.Fatal(err)
	}
	var a Attr
	find := func(path ...string) Ino {
		t.Helper()
		at := root
		for _, name := range path {
			if at, _, err = s.Lookup(ctx, at, name, &a); err != nil || at == 0 {
				t.Fatalf("Lookup(%q): %v", path, err)
			}
		}
		return at
	}
	buf := make([]byte, 4096)
	if _, err := s.ReadAt(ctx, find("bin", "prog"), buf, 0); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return s.cache.Usage().Used > 4*(300<<10) })
	s.tasks.Wait()
	reg.Reset()
	for _, path := range [][]string{{"lib64", "ld.so"}, {"lib64", "liba.so"}, {"usr", "lib", "libb.so"}} {
		if _, err := s.ReadAt(ctx, find(path...), buf, 0); err != nil {
			t.Fatal(err)
		}
	}
	if got := reg.Requests(""); got != 0 {
		t.Errorf("%d requests to read what the program needs: %v", got, requestsOf(reg))
	}
	if _, err := s.ReadAt(ctx, find("lib64", "other"), buf, 0); err != nil {
		t.Fatal(err)
	}
	if got := reg.Requests(""); got == 0 {
		t.Error("what no program needs was fetched too")
	}
}
