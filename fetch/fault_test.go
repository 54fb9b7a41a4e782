package fetch

import (
	"context"
	"errors"
	"io"
	iofs "io/fs"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/imgfs/imgfs/fetch/registrytest"
)

// kinds are all that an error can be; a fault names the ones that it must be.
var kinds = map[string]error{
	"not exist": iofs.ErrNotExist, "permission": iofs.ErrPermission, "invalid": iofs.ErrInvalid,
	"rate limit": ErrRateLimit, "unreachable": ErrUnreachable, "unavailable": ErrUnavailable,
	"not image": ErrNotImage, "digest": ErrDigest, "platform": ErrPlatform,
	"deadline": context.DeadlineExceeded, "canceled": context.Canceled,
}

// wantKind checks that err is of the kinds that want lists, and of no other.
func wantKind(t testing.TB, err error, want string) {
	t.Helper()
	if want == "" {
		if err != nil {
			t.Errorf("error %v, want none", err)
		}
		return
	}
	var e *Error
	if !errors.As(err, &e) || !strings.HasPrefix(err.Error(), "fetch: ") || e.Op == "" {
		t.Errorf("error %v is no complete *Error", err)
		return
	}
	for name, kind := range kinds {
		if is, should := errors.Is(err, kind), strings.Contains(want, name); is != should {
			t.Errorf("error %v: is %q = %v, want %v", err, name, is, should)
		}
	}
}

type faultRow struct {
	name     string
	fault    *registrytest.Fault
	kind     string // of the error, "" for none
	requests int
	least    time.Duration // that it takes
	most     time.Duration // 0: a minute and a bit
}

func retryAfterDate(d time.Duration) map[string]string {
	// In a bubble time begins at midnight UTC 2000-01-01.
	return map[string]string{"Retry-After": time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).Add(d).Format(http.TimeFormat)}
}

// common are the faults that a manifest and a blob share.
func common() []faultRow {
	type F = registrytest.Fault
	type H = map[string]string
	return []faultRow{
		{"none", &F{Times: 1, Skip: 99}, "", 1, 0, time.Second},
		{"404", &F{Status: 404}, "not exist", 1, 0, time.Second},
		{"410", &F{Status: 410}, "not exist", 1, 0, time.Second},
		{"400", &F{Status: 400}, "unavailable", 1, 0, time.Second},
		{"400 name invalid", &F{Status: 400, Body: `{"errors":[{"code":"NAME_INVALID"}]}`}, "not exist", 1, 0, time.Second},
		{"401", &F{Status: 401}, "permission", 1, 0, time.Second},
		{"403", &F{Status: 403}, "permission", 1, 0, time.Second},
		{"429 once, seconds", &F{Status: 429, Times: 1, With: H{"Retry-After": "7"}}, "", 2, 7 * time.Second, 8 * time.Second},
		{"429 once, date", &F{Status: 429, Times: 1, With: retryAfterDate(9 * time.Second)}, "", 2, 8 * time.Second, 10 * time.Second},
		{"429 once, past", &F{Status: 429, Times: 1, With: retryAfterDate(-time.Hour)}, "", 2, 0, time.Second},
		{"429 once, nonsense", &F{Status: 429, Times: 1, With: H{"Retry-After": "soon"}}, "", 2, 0, time.Second},
		{"429 for a day", &F{Status: 429, With: H{"Retry-After": "86400"}}, "rate limit", 1, 0, time.Second},
		{"429 for ever", &F{Status: 429, With: H{"Retry-After": "99999999999999999999"}}, "rate limit", 1, 0, time.Second},
		{"429 always", &F{Status: 429}, "rate limit", 5, time.Second, 10 * time.Second},
		{"500 twice", &F{Status: 500, Times: 2}, "", 3, 0, 5 * time.Second},
		{"503 always", &F{Status: 503}, "unavailable", 5, time.Second, 10 * time.Second},
		{"503 with a pause", &F{Status: 503, Times: 1, With: H{"Retry-After": "11"}}, "", 2, 11 * time.Second, 12 * time.Second},
		{"501", &F{Status: 501}, "unavailable", 1, 0, time.Second},
		{"418", &F{Status: 418}, "unavailable", 1, 0, time.Second},
		{"204", &F{Status: 204}, "unavailable", 1, 0, time.Second},
		{"304", &F{Status: 304}, "unavailable", 1, 0, time.Second},
		{"302 to nowhere", &F{Status: 302}, "unavailable", 1, 0, time.Second},
		{"302 to itself", &F{Status: 302, With: H{"Location": "?again"}}, "unavailable", 6, 0, time.Second},
		{"302 to a file", &F{Status: 302, With: H{"Location": "file:///etc/passwd"}}, "unavailable", 1, 0, time.Second},
		{"302 to nonsense", &F{Status: 302, With: H{"Location": "http://[::1"}}, "unavailable", 1, 0, time.Second},
		{"302 to too much", &F{Status: 302, With: H{"Location": "/" + strings.Repeat("x", 20<<10)}}, "unavailable", 1, 0, time.Second},
		{"headers too large", &F{Status: 200, With: H{"X": strings.Repeat("x", 300<<10)}}, "unreachable", 5, 0, 10 * time.Second},
		{"reset twice", &F{Reset: true, Times: 2}, "", 3, 0, 5 * time.Second},
		{"reset always", &F{Reset: true}, "unreachable", 5, time.Second, 10 * time.Second},
		{"truncated twice", &F{Cut: 100, Times: 2}, "", 3, 0, 5 * time.Second},
		{"truncated always", &F{Cut: 1}, "unreachable", 5, 0, 10 * time.Second},
		{"delay", &F{Delay: 15 * time.Second}, "", 1, 15 * time.Second, 16 * time.Second},
		{"hanging once", &F{Hang: true, Times: 1}, "", 2, 20 * time.Second, 21 * time.Second},
		{"hanging", &F{Hang: true}, "deadline", 3, time.Minute, time.Minute + time.Second},
		{"stalled once", &F{Stall: 10, Times: 1}, "", 2, 20 * time.Second, 21 * time.Second},
		{"slow", &F{Slow: time.Second}, "", 1, 0, 20 * time.Second},
	}
}

func TestResolveFaults(t *testing.T) {
	type F = registrytest.Fault
	type H = map[string]string
	rows := append(common(),
		faultRow{"wrong bytes", &F{Corrupt: true}, "digest", 1, 0, time.Second},
		faultRow{"too large", &F{Status: 200, Body: strings.Repeat(" ", maxManifest+1)}, "not image invalid", 1, 0, time.Second},
		faultRow{"no JSON", &F{Status: 200, Body: "<html>"}, "not image invalid", 1, 0, time.Second},
		faultRow{"no image", &F{Status: 200, Body: "{}"}, "not image invalid", 1, 0, time.Second},
		faultRow{"longer than it says", &F{Replace: H{"Content-Length": "10"}}, "unreachable", 5, 0, 10 * time.Second},
	)
	img := image(t, 1)
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
				ref := s.Push(t, "a/b:v1", img)
				r.fault.Path = "/manifests/"
				s.Add(r.fault)
				start := time.Now()
				got, err := c.Resolve(t.Context(), ref, v1.Platform{})
				judge(t, s, r, err, time.Since(start), "/manifests/")
				if want, _ := img.Digest(); err == nil && got.Desc.Digest != want {
					t.Errorf("resolved %v, want %v", got.Desc.Digest, want)
				}
			})
		})
	}
}

func judge(t *testing.T, s *registrytest.Server, r faultRow, err error, took time.Duration, path string) {
	t.Helper()
	wantKind(t, err, r.kind)
	if n := s.Requests(path); n != r.requests {
		t.Errorf("%d requests, want %d", n, r.requests)
	}
	if took < r.least || took > r.most {
		t.Errorf("took %v, want between %v and %v", took, r.least, r.most)
	}
}

func TestRangeFaults(t *testing.T) {
	type F = registrytest.Fault
	type H = map[string]string
	rows := append(common(),
		faultRow{"range not satisfiable", &F{Status: 416}, "digest", 1, 0, time.Second},
		faultRow{"200, everything", &F{NoRange: true}, "", 1, 0, time.Second},
		faultRow{"200, other length", &F{NoRange: true, Longer: 10}, "digest", 1, 0, time.Second},
		faultRow{"200, no length", &F{NoRange: true, Replace: H{"Content-Length": ""}}, "", 1, 0, time.Second},
		faultRow{"206, no range", &F{Replace: H{"Content-Range": ""}}, "unavailable", 1, 0, time.Second},
		faultRow{"206, range of something else", &F{Replace: H{"Content-Range": "bytes 0-4999/20000"}}, "unavailable", 1, 0, time.Second},
		faultRow{"206, other total", &F{Replace: H{"Content-Range": "bytes 1000-5999/19999"}}, "unavailable", 1, 0, time.Second},
		faultRow{"206, unknown total", &F{Replace: H{"Content-Range": "bytes 1000-5999/*"}}, "", 1, 0, time.Second},
		faultRow{"206, too much", &F{Replace: H{"Content-Range": "bytes 1000-6000/20000", "Content-Length": "5001"}}, "unavailable", 1, 0, time.Second},
		faultRow{"206, other length", &F{Longer: 3}, "unavailable", 1, 0, time.Second},
		faultRow{"206, several ranges", &F{Replace: H{"Content-Range": "", "Content-Type": "multipart/byteranges; boundary=x"}}, "unavailable", 1, 0, time.Second},
		faultRow{"206, no length", &F{Replace: H{"Content-Length": ""}}, "", 1, 0, time.Second},
	)
	data := noise(20000)
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
				b := blob(t, s, c, data)
				r.fault.Path = "/blobs/"
				s.Add(r.fault)
				start := time.Now()
				got, err := wholeRange(t, b, 1000, 5000)
				judge(t, s, r, err, time.Since(start), "/blobs/")
				if err == nil {
					same(t, got, data, 1000, 5000)
				}
				if want := r.fault.NoRange && err == nil; b.NoRanges() != want {
					t.Errorf("NoRanges() = %v, want %v", b.NoRanges(), want)
				}
			})
		})
	}
}

// A resumed range asks for what is missing, not for everything again.
func TestResume(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		data := noise(20000)
		b := blob(t, s, c, data)
		s.Add(&registrytest.Fault{Path: "/blobs/", Cut: 2000, Times: 1})
		got, err := wholeRange(t, b, 1000, 5000)
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, data, 1000, 5000)
		log := s.Log()
		if len(log) != 2 || log[0].Range != "bytes=1000-5999" || log[1].Range != "bytes=3000-5999" {
			t.Errorf("requests %+v, want bytes=1000-5999 and bytes=3000-5999", log)
		}
		if st := c.Stats().Hosts["http://"+s.Host()]; st.Requests != 2 || st.Bytes != 5000 {
			t.Errorf("stats %+v, want 2 requests and 5000 bytes", st)
		}
	})
}

// A range that the registry cuts into smaller ones is put together.
func TestShorterRanges(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		data := noise(20000)
		b := blob(t, s, c, data)
		s.Add(&registrytest.Fault{Path: "/blobs/", Times: 1, Cut: 3000,
			Replace: map[string]string{"Content-Range": "bytes 1000-3999/20000", "Content-Length": "3000"}})
		got, err := wholeRange(t, b, 1000, 5000)
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, data, 1000, 5000)
		if n := s.Requests("/blobs/"); n != 2 {
			t.Errorf("%d requests, want 2", n)
		}
	})
}

// A host that gives a few bytes and breaks is not asked for ever.
func TestDribble(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		b := blob(t, s, c, noise(20000))
		s.Add(&registrytest.Fault{Path: "/blobs/", Cut: 10})
		r, err := b.Stream(t.Context(), Soon, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		buf, n := make([]byte, 4096), 0
		for err == nil {
			var m int
			m, err = r.Read(buf)
			n += m
		}
		wantKind(t, err, "unreachable")
		if q := s.Requests("/blobs/"); n != 10*maxAttempts || q != maxAttempts {
			t.Errorf("%d bytes with %d requests, want %d with %d", n, q, 10*maxAttempts, maxAttempts)
		}
	})
}

// A Stream outlives Options.Timeout as long as bytes come.
func TestStreamLasts(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		data := noise(200 << 10)
		b := blob(t, s, c, data)
		s.Add(&registrytest.Fault{Path: "/blobs/", Slow: 2 * time.Second})
		start := time.Now()
		r, err := b.Stream(t.Context(), Soon, 0)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, data, 0, int64(len(data)))
		if d := time.Since(start); d < 2*time.Minute || s.Requests("/blobs/") != 1 {
			t.Errorf("%v, %d requests; want over two minutes and 1", d, s.Requests("/blobs/"))
		}
	})
}

// The reader's own deadline and its going away end a request.
func TestContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := registrytest.New(t, registrytest.Options{Pipe: true})
		c := client(t, s, Options{})
		defer c.Close()
		ref := s.Push(t, "a:b", image(t, 1))
		s.Add(&registrytest.Fault{Path: "/manifests/", Hang: true})
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		start := time.Now()
		_, err := c.Resolve(ctx, ref, v1.Platform{})
		wantKind(t, err, "deadline")
		if d := time.Since(start); d != 3*time.Second {
			t.Errorf("took %v, want 3s", d)
		}
		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		_, err = c.Resolve(ctx, ref, v1.Platform{})
		wantKind(t, err, "canceled")
	})
}

// While a host has asked for a pause, nobody else asks it either.
func TestPauseIsShared(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		data := noise(1000)
		b := blob(t, s, c, data)
		s.Add(&registrytest.Fault{Path: "/blobs/", Status: 429, Times: 1, With: map[string]string{"Retry-After": "10"}})
		errs := make(chan error)
		start := time.Now()
		for range 4 {
			go func() {
				_, err := wholeRange(t, b, 0, 10)
				errs <- err
			}()
			time.Sleep(time.Second)
		}
		for range 4 {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if n, d := s.Requests("/blobs/"), time.Since(start); n != 5 || d < 10*time.Second || d > 11*time.Second {
			t.Errorf("%d requests in %v, want 5 in 10s", n, d)
		}
	})
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-1/2", "bytes 5-9/*", "bytes */5", "bytes 9-5/10", "bytes 0-9223372036854775807/9223372036854775808"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, last, total, ok := parseContentRange(s)
		if ok && (first < 0 || last < first || last-first+1 <= 0 || total >= 0 && last >= total || total < -1) {
			t.Fatalf("parseContentRange(%q) = %d, %d, %d", s, first, last, total)
		}
	})
}

// Ranges that are not within the blob make no request.
func TestRangeBounds(t *testing.T) {
	s := registrytest.New(t, registrytest.Options{})
	c := client(t, s, Options{})
	b := blob(t, s, c, noise(100))
	for _, r := range [][2]int64{{-1, 1}, {0, 101}, {101, 0}, {1, 100}, {50, -1}, {1 << 62, 1 << 62}} {
		_, err := wholeRange(t, b, r[0], r[1])
		wantKind(t, err, "invalid")
	}
	for _, off := range []int64{0, 100} {
		if got, err := wholeRange(t, b, off, 0); len(got) != 0 || err != nil {
			t.Errorf("Range(%d, 0) = %d bytes, %v", off, len(got), err)
		}
	}
	if n := len(s.Log()); n != 0 {
		t.Errorf("%d requests, want 0", n)
	}
}

// A stream that breaks where there are no ranges begins again, and skips.
func TestStreamWithoutRanges(t *testing.T) {
	bubble(t, registrytest.Options{}, func(t *testing.T, s *registrytest.Server, c *Client) {
		data := noise(20000)
		b := blob(t, s, c, data)
		s.Add(&registrytest.Fault{Path: "/blobs/", NoRange: true, Cut: 7000, Times: 1},
			&registrytest.Fault{Path: "/blobs/", NoRange: true})
		r, err := b.Stream(t.Context(), Soon, 0)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, data, 0, 20000)
		if n := s.Requests("/blobs/"); n != 2 || !b.NoRanges() {
			t.Errorf("%d requests, NoRanges %v; want 2, true", n, b.NoRanges())
		}
	})
}
