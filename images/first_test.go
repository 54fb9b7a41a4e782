package images

import (
	"archive/tar"
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/imgfs/imgfs/fetch/registrytest"
)

// TestFirstListing counts what the first listing and the first path of a known
// image cost on a server that has just started: a few blocks of its indexes, however
// many files there are.
func TestFirstListing(t *testing.T) {
	const most = 512 << 10 // bytes
	for _, files := range []int{1000, 40_000} {
		t.Run(fmt.Sprint(files), func(t *testing.T) {
			reg := registrytest.New(t, registrytest.Options{})
			lower, upper := []*tar.Header{file("srv/", ""), file("usr/", "")}, []*tar.Header{file("srv/", ""), file("srv/upper/", "")}
			for i := range files {
				lower = append(lower, file(fmt.Sprintf("srv/%03d/file-with-a-longer-name-%d", i/100, i), fmt.Sprint(i)))
				if i%50 == 0 {
					upper = append(upper, file(fmt.Sprintf("srv/upper/%d", i), fmt.Sprint(i)))
				}
			}
			img, err := mutate.AppendLayers(empty.Image, gzipLayer(t, lower...), gzipLayer(t, upper...))
			if err != nil {
				t.Fatal(err)
			}
			reg.Push(t, "first/app:v1", img)
			n := Name{Repo: reg.Host() + "/first/app", Tag: "v1"}
			dir := t.TempDir()
			open := func() *Store {
				s, err := Open(Options{Dir: dir, CacheSize: 1 << 30, Timeout: 10 * time.Second, Prefetch: true, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
				if err != nil {
					t.Fatal(err)
				}
				return s
			}
			list := func(s *Store) (names int) {
				t.Helper()
				ctx := context.Background()
				root, err := s.Root(ctx, n)
				if err != nil {
					t.Fatal(err)
				}
				var a Attr
				at := root
				for _, name := range []string{"srv", "005"} {
					if at, _, err = s.Lookup(ctx, at, name, &a); err != nil || at == 0 {
						t.Fatalf("Lookup(%q) = %v, %v", name, at, err)
					}
				}
				for _, d := range []Ino{root, at} {
					if err := s.ReadDir(ctx, d, 0, func(int, Entry, *Attr) bool { names++; return true }); err != nil {
						t.Fatal(err)
					}
				}
				return names
			}
			s := open()
			if err := s.Pull(context.Background(), n); err != nil {
				t.Fatal(err)
			}
			want := list(s)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			reg.Reset()
			s = open()
			defer s.Close()
			if got := list(s); got != want || reg.Requests("") != 0 {
				t.Errorf("%d names by %d requests, want %d by none", got, reg.Requests(""), want)
			}
			im, err := s.image(s.onlyImage(t))
			if err != nil {
				t.Fatal(err)
			}
			read, size := im.state.Load().tree.Touched()
			for _, l := range im.layers {
				r, n := l.state.Load().idx.Touched()
				read, size = read+r, size+n
			}
			t.Logf("%d files: %d of %d bytes read", files, read, size)
			if read > most {
				t.Errorf("%d of %d bytes of the indexes were read, want at most %d", read, size, most)
			}
			if files > 10_000 && size < 4*most {
				t.Errorf("the indexes have %d bytes, too few to tell", size)
			}
		})
	}
}

// onlyImage is the key of the only image that is open.
func (s *Store) onlyImage(t *testing.T) imageKey {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.images) != 1 {
		t.Fatalf("%d images are open, want one", len(s.images))
	}
	for key := range s.images {
		return key
	}
	return imageKey{}
}
