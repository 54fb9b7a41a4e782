package main

import (
	"strings"
	"testing"
	"time"
)

var testRecords = []record{
	{Repository: "debian", Tag: "12", ID: "sha256:" + strings.Repeat("a", 64), Digest: "sha256:" + strings.Repeat("b", 64), Size: 116_800_000, Created: time.Now().Add(-75 * time.Hour)},
	{Repository: "localhost:5000/team/app", Tag: "v1", ID: "sha256:" + strings.Repeat("c", 64), Size: 10},
	{Repository: "nginx", Tag: "<none>", ID: "sha256:" + strings.Repeat("d", 64), Digest: "sha256:" + strings.Repeat("e", 64), Size: -1},
}

func print(t *testing.T, f imagesFlags, pattern string) string {
	t.Helper()
	if pattern != "" {
		f.filters = append(f.filters, "reference="+pattern)
	}
	return printRecords(t, f, testRecords)
}

func printRecords(t *testing.T, f imagesFlags, records []record) string {
	t.Helper()
	wanted, err := parseFilters(f.filters)
	if err != nil {
		t.Fatal(err)
	}
	show, err := f.printer()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := show(&out, f.rows(records, wanted.keep, time.Now())); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestImagesTable(t *testing.T) {
	want := `REPOSITORY                TAG       IMAGE ID       CREATED      SIZE
debian                    12        aaaaaaaaaaaa   3 days ago   117MB
localhost:5000/team/app   v1        cccccccccccc   N/A          10B
nginx                     <none>    dddddddddddd   N/A          N/A
`
	if got := print(t, imagesFlags{}, ""); got != want {
		t.Errorf("images:\n%s\nwant\n%s", got, want)
	}
}

func TestImagesFormats(t *testing.T) {
	for _, tt := range []struct {
		f       imagesFlags
		pattern string
		want    string
	}{
		{imagesFlags{quiet: true}, "", "aaaaaaaaaaaa\ncccccccccccc\ndddddddddddd\n"},
		{imagesFlags{quiet: true, noTrunc: true}, "debian", "sha256:" + strings.Repeat("a", 64) + "\n"},
		{imagesFlags{quiet: true}, "debian:13", ""},
		{imagesFlags{quiet: true}, "docker.io/library/debian:12", "aaaaaaaaaaaa\n"},
		{imagesFlags{quiet: true}, "localhost:5000/team/*", "cccccccccccc\n"},
		{imagesFlags{format: `{{.Repository}}:{{.Tag}} {{.Bytes}}`}, "debian", "debian:12 116800000\n"},
		{imagesFlags{format: `table {{.Tag}}\t{{.ID}}`}, "debian", "TAG       IMAGE ID\n12        aaaaaaaaaaaa\n"},
		{imagesFlags{format: `{{json .Tag}}`}, "debian", "\"12\"\n"},
		{imagesFlags{digests: true, format: `{{.Digest}}`}, "localhost:5000/team/app:v1", "<none>\n"},
	} {
		if got := print(t, tt.f, tt.pattern); got != tt.want {
			t.Errorf("images %+v %q = %q, want %q", tt.f, tt.pattern, got, tt.want)
		}
	}
	if got := print(t, imagesFlags{format: "json"}, "debian"); !strings.HasPrefix(got, `{"Repository":"debian","Tag":"12",`) {
		t.Errorf("json: %s", got)
	}
	for _, f := range []imagesFlags{{quiet: true, format: "json"}, {format: "{{.Nope}}"}, {format: "{{"}} {
		if _, err := f.printer(); err == nil {
			t.Errorf("printer(%+v): no error", f)
		}
	}
	for _, text := range []string{"reference=[a", "dangling=maybe", "label=x", "dangling", "before="} {
		if _, err := parseFilters([]string{text}); err == nil {
			t.Errorf("parseFilters(%s): no error", text)
		}
	}
}

func TestParseImage(t *testing.T) {
	digest := "sha256:" + strings.Repeat("1", 64)
	for _, tt := range []struct{ text, ref, path string }{
		{"debian", "debian:latest", "debian/latest"},
		{"debian:12", "debian:12", "debian/12"},
		{"library/debian:12", "debian:12", "debian/12"},
		{"docker.io/library/debian:12", "debian:12", "debian/12"},
		{"index.docker.io/bitnami/redis:7.2", "bitnami/redis:7.2", "bitnami/redis/7.2"},
		{"localhost:5000/team/app", "localhost:5000/team/app:latest", "localhost:5000/team/app/latest"},
		{"ghcr.io/org/app:v1", "ghcr.io/org/app:v1", "ghcr.io/org/app/v1"},
		{"debian@" + digest, "debian@" + digest, "debian/@" + digest},
		{"/mnt/images/debian/12", "debian:12", "debian/12"},
		{"/mnt/images/debian/@" + digest, "debian@" + digest, "debian/@" + digest},
		{"/mnt/images/localhost:5000/team/app/v1/", "localhost:5000/team/app:v1", "localhost:5000/team/app/v1"},
		{"/mnt/images/debian:12", "debian:12", "debian/12"},
		{"/mnt/images/localhost:5000/team/app:v1", "localhost:5000/team/app:v1", "localhost:5000/team/app/v1"},
		{"/mnt/images/debian@" + digest, "debian@" + digest, "debian/@" + digest},
		{"/mnt/images/debian", "", ""},
		{"/mnt/images", "", ""},
		{"/mnt/other/debian/12", "", ""},
		{"/mnt/images/.imgfs/ids/5", "", ""},
		{"Debian:12", "", ""},
		{"debian:", "", ""},
		{"debian@sha256:12", "", ""},
		{"", "", ""},
		{"a b", "", ""},
	} {
		got, err := parseImage("/mnt/images", tt.text)
		if got.ref != tt.ref || got.path != tt.path || (err == nil) != (tt.ref != "") {
			t.Errorf("parseImage(%q) = %+v, %v, want %q, %q", tt.text, got, err, tt.ref, tt.path)
		}
	}
}
