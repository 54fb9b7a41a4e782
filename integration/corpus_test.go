package integration

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// corpusVersion is raised with every change of what the corpus is made of.
const corpusVersion = "1"

// The corpus: layers as tar archives, and each of them in every format, made once
// per machine and kept in a cache directory.
type corpus struct {
	dir string

	mu     sync.Mutex
	layers map[string]blob // by layer and format
}

// images says which layers make which image, lowest first.
var images = map[string][]string{
	"python": {"base", "common", "python", "odd-lower", "sparse", "odd-upper", "odd-names"},
	"nginx":  {"base", "common", "nginx"},
	"plain":  {"base", "common", "python"},
	"big":    {"base", "big"},
	"many":   {"many-1"},
	"many2":  {"many-2"},
}

const (
	bigSize   = 200 << 20 // bytes of srv/big.bin in the image big
	manyFiles = 100_000   // files of each of the layers many-1 and many-2
)

var theCorpus = sync.OnceValues(func() (*corpus, error) {
	top := os.Getenv("IMGFS_TEST_CACHE")
	if top == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			user = os.TempDir()
		}
		top = filepath.Join(user, "imgfs-test")
	}
	c := &corpus{dir: filepath.Join(top, "corpus-"+corpusVersion), layers: map[string]blob{}}
	for _, b := range benchImages {
		images[benchPrefix+b.name] = b.layerNames()
	}
	return c, os.MkdirAll(c.dir, 0o755)
})

func openCorpus(t testing.TB) *corpus {
	t.Helper()
	needRoot(t)
	c, err := theCorpus()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// tar returns the archive of a layer, made if it is not here.
func (c *corpus) tar(t testing.TB, layer string) string {
	t.Helper()
	path := filepath.Join(c.dir, layer+".tar")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	unlock, err := lockFile(filepath.Join(c.dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if err := c.makeTar(t, layer); err != nil {
		t.Fatalf("making layer %s: %v", layer, err)
	}
	return path
}

func (c *corpus) makeTar(t testing.TB, layer string) error {
	switch layer {
	case "base", "common", "python", "nginx":
		return c.makeDebian(t)
	case "odd-lower":
		return c.writeTar(layer, func(w io.Writer) error { return writeTar(w, oddLower()) })
	case "odd-upper":
		return c.writeTar(layer, func(w io.Writer) error { return writeTar(w, oddUpper()) })
	case "odd-names":
		return c.writeTar(layer, func(w io.Writer) error { return writeTar(w, oddNames()) })
	case "sparse":
		return c.writeTar(layer, writeSparse)
	case "unsparse":
		return c.writeTar(layer, writeUnsparse)
	case "big":
		return c.writeTar(layer, writeBig)
	case "many-1":
		return c.writeTar(layer, func(w io.Writer) error { return writeMany(w, 1) })
	case "many-2":
		return c.writeTar(layer, func(w io.Writer) error { return writeMany(w, 2) })
	}
	if strings.HasPrefix(layer, benchPrefix) {
		return c.makeBench(t, layer)
	}
	return errors.New("unknown layer")
}

// writeTar makes a file of the corpus visible only when it is complete.
func (c *corpus) writeTar(layer string, write func(io.Writer) error) error {
	return writeFile(filepath.Join(c.dir, layer+".tar"), write)
}

func writeFile(path string, write func(io.Writer) error) error {
	f, err := os.Create(path + ".part")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := write(f); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func lockFile(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
}

// writeSparse has tar write files with holes (Go's archive/tar reads them only).
func writeSparse(w io.Writer) error {
	tmp, err := os.MkdirTemp("", "imgfs-sparse-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	for name, f := range map[string]struct {
		size int64
		data map[int64]string
	}{
		"hole":   {64 << 20, nil},
		"head":   {1 << 20, map[int64]string{0: "head"}},
		"tail":   {1<<20 + 4, map[int64]string{1 << 20: "tail"}},
		"pieces": {40 << 20, map[int64]string{8192: "one", 5 << 20: "two", 39 << 20: "three"}},
	} {
		path := filepath.Join(tmp, "odd/sparse", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		file, err := os.Create(path)
		if err != nil {
			return err
		}
		for off, data := range f.data {
			_, werr := file.WriteAt([]byte(data), off)
			err = errors.Join(err, werr)
		}
		if err := errors.Join(err, file.Truncate(f.size), file.Close()); err != nil {
			return err
		}
	}
	cmd := exec.Command("tar", "-C", tmp, "--sparse", "--format=posix", "--sort=name", "--numeric-owner", "--owner=0", "--group=0",
		"--mtime=2024-01-02 03:04:05.678 UTC", "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime", "-cf", "-", "odd/sparse")
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = w, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("tar: %w: %s", err, stderr.Bytes())
	}
	return nil
}

// writeUnsparse writes the files of writeSparse with their zeros.
func writeUnsparse(w io.Writer) error {
	var archive bytes.Buffer
	if err := writeSparse(&archive); err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	for tr := tar.NewReader(&archive); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return tw.Close()
		} else if err != nil {
			return err
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(tw, tr); err != nil {
			return err
		}
	}
}

// bigContent is what srv/big.bin holds: the same on every machine, and it does
// not compress, so that the layer is as large in every format.
func bigContent() io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte([]byte("what the file srv/big.bin holds."))), bigSize)
}

// writeBig writes a small file, a large one, and another small one.
func writeBig(w io.Writer) error {
	tw := tar.NewWriter(w)
	for _, e := range []entry{dir("srv"), file("srv/early", "early\n"), file("srv/big.bin", "", size(bigSize)), file("srv/late", "late\n")} {
		if err := tw.WriteHeader(&e.head); err != nil {
			return err
		}
		body := io.Reader(strings.NewReader(e.body))
		if e.head.Size == bigSize {
			body = bigContent()
		}
		if _, err := io.Copy(tw, body); err != nil {
			return err
		}
	}
	return tw.Close()
}

// writeMany writes 100,000 small files in 1,000 directories.
func writeMany(w io.Writer, seed int) error {
	var list []entry
	for d := range manyFiles / 100 {
		name := fmt.Sprintf("srv/many/%02d/%02d", d/100, d%100)
		list = append(list, dir(name))
		for f := range 100 {
			list = append(list, file(fmt.Sprintf("%s/file-%d-%02d.txt", name, seed, f), fmt.Sprintf("%d %d %d\n", seed, d, f)))
		}
	}
	return writeTar(w, list)
}
