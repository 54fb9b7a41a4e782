package main

import (
	"encoding/json"
	"strings"
	"testing"
	"text/template"
	"time"
)

func TestImagesOfSeed(t *testing.T) {
	records := seedRecords()
	got := printRecords(t, imagesFlags{format: `{{.Repository}}:{{.Tag}} {{.ID}} {{.Size}}`}, records)
	want := `mongo:3.2 fb885d89ea5c 300MB
redis:latest a4fe14ff1981 105MB
ubuntu:18.04 329ed837d508 63MB
ubuntu:latest 329ed837d508 63MB
<none>:<none> 0a4fe1111111 299MB
`
	if got != want {
		t.Errorf("images:\n%s\nwant\n%s", got, want)
	}
	for _, tt := range []struct {
		filters string
		want    string
	}{
		{"dangling=true", "0a4fe1111111"},
		{"dangling=false", "fb885d89ea5c a4fe14ff1981 329ed837d508 329ed837d508"},
		{"reference=ubuntu", "329ed837d508 329ed837d508"},
		{"reference=ubuntu:18.04", "329ed837d508"},
		{"reference=ubuntu:*", "329ed837d508 329ed837d508"},
		{"reference=*", "fb885d89ea5c a4fe14ff1981 329ed837d508 329ed837d508"},
		{"reference=mongo reference=redis", "fb885d89ea5c a4fe14ff1981"},
		{"reference=mongo dangling=true", ""},
	} {
		got := printRecords(t, imagesFlags{quiet: true, filters: strings.Fields(tt.filters)}, records)
		if strings.Join(strings.Fields(got), " ") != tt.want {
			t.Errorf("images --filter %s = %q, want %q", tt.filters, got, tt.want)
		}
	}
	// By its digest alone an image is a line of its own; beside its tag only when
	// that has another digest.
	got = printRecords(t, imagesFlags{quiet: true}, records[4:5])
	if got != "329ed837d508\n" {
		t.Errorf("images by digest = %q", got)
	}
	records[4].Digest = id("d9")
	if got := printRecords(t, imagesFlags{digests: true, filters: []string{"reference=ubuntu"}}, records); strings.Count(got, "\n") != 4 {
		t.Errorf("images --digests:\n%s", got)
	}
	verbose := printRecords(t, imagesFlags{verbose: true, filters: []string{"reference=mongo"}}, records)
	if !strings.Contains(verbose, "SIZE      COMPRESSED   SHARED    UNIQUE    CACHED\n") || !strings.HasSuffix(verbose, "300MB     90MB         100MB     200MB     1MB\n") {
		t.Errorf("images -v:\n%s", verbose)
	}
}

func TestBeforeSince(t *testing.T) {
	m := newFakeMount(t, seedRecords()...)
	for filter, want := range map[string]int{"before=ubuntu": 1, "since=ubuntu": 2, "before=329": 1, "since=0a4": 4, "since=mongo:3.2": 0, "until=2020-03-01T13:30:00Z": 3, "until=1h": 5} {
		f, err := parseFilters([]string{filter})
		if err != nil {
			t.Fatal(err)
		}
		if err := f.resolve(m.dir); err != nil {
			t.Fatal(err)
		}
		if got := len((imagesFlags{}).rows(m.records, f.keep, time.Now())); got != want {
			t.Errorf("%s: %d images, want %d", filter, got, want)
		}
	}
	f, err := parseFilters([]string{"before=none"})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.resolve(m.dir); err == nil {
		t.Error("before=none: no error")
	}
}

func TestIntermediates(t *testing.T) {
	m := newFakeMount(t, seedRecords()...)
	m.write(".imgfs/chains.json", []chain{
		{ID: id("c1"), Layers: 2, Created: fakeTime, Images: []string{id("e3"), id("e1")}},
		{ID: id("c2"), Layers: 3, Images: []string{id("e3")}, Whole: true},
		{ID: id("c3"), Layers: 1, Images: []string{id("ff")}},
	})
	twice := layer{Key: id("11"), Expanded: 30, Compressed: 3}
	m.write(".imgfs/meta/ubuntu/18.04/layers.json", []layer{twice, twice, {Key: id("22"), Expanded: 40}})
	got, err := intermediates(m.dir, m.records)
	if err != nil || len(got) != 2 || got[0].Size != 30 || got[0].Compressed != 3 || got[1].Size != -1 {
		t.Errorf("intermediates = %+v, %v, want two, of 30 and -1 bytes", got, err)
	}
}

func TestHistoryRows(t *testing.T) {
	steps := []step{
		{Created: fakeTime, CreatedBy: "ADD file:" + strings.Repeat("0", 60), Size: 63_000_000},
		{Created: time.Unix(0, 0), CreatedBy: "CMD\t[\"bash\"]", EmptyLayer: true, Comment: "buildkit"},
		{Created: fakeTime.Add(time.Hour), CreatedBy: "RUN x", Size: -1},
	}
	show, err := historyFlags{human: true}.printer()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := show(&out, historyFlags{human: true}.rows(id("329ed837d508"), steps, fakeTime.Add(3*time.Hour))); err != nil {
		t.Fatal(err)
	}
	want := `IMAGE          CREATED       CREATED BY                                      SIZE      COMMENT
329ed837d508   2 hours ago   RUN x                                           N/A       
<missing>                    CMD ["bash"]                                    0B        buildkit
<missing>      3 hours ago   ADD file:00000000000000000000000000000000000…   63MB      
`
	if out.String() != want {
		t.Errorf("history:\n%s\nwant\n%s", &out, want)
	}
	rows := historyFlags{noTrunc: true}.rows(id("32"), steps[:1], fakeTime)
	if rows[0].ID != id("32") || rows[0].Size != "63000000" || len(rows[0].CreatedBy) != 69 || !strings.HasPrefix(rows[0].CreatedSince, "2020-03-01T") {
		t.Errorf("history --no-trunc --human=false: %+v", rows[0])
	}
}

func TestTotalsRows(t *testing.T) {
	var out strings.Builder
	show, err := rowPrinter[dfRow]("", `{{.Type}}\t{{.TotalCount}}\t{{.Active}}\t{{.Size}}\t{{.Reclaimable}}`, dfHeadings)
	if err != nil {
		t.Fatal(err)
	}
	all := totals{Images: 6, Tagged: 5, Dangling: 1, Layers: 9, Idle: 2, Expanded: 1e9, Compressed: 4e8, Shared: 3e8, Unique: 7e8, Cached: 2e6, Reclaimable: 1e8, ReclaimableCached: 1e6}
	if err := show(&out, all.rows()); err != nil {
		t.Fatal(err)
	}
	want := `TYPE      TOTAL     ACTIVE    SIZE      RECLAIMABLE
Images    6         5         1GB       100MB (10%)
Layers    11        9         400MB     -
Cache     11        9         2MB       1MB (50%)
Shared                        300MB     
Unique                        700MB     
`
	if out.String() != want {
		t.Errorf("df:\n%s\nwant\n%s", &out, want)
	}
	if got := partOf(0, 0); got != "0B" {
		t.Errorf("partOf(0, 0) = %q, want 0B", got)
	}
}

func TestDescribe(t *testing.T) {
	m := newFakeMount(t, seedRecords()...)
	meta := ".imgfs/meta/ubuntu/18.04/"
	m.write(meta+"config.json", json.RawMessage(`{"architecture":"amd64","os":"linux","created":"2020-03-01T12:00:00Z",
		"config":{"Env":["PATH=/bin","A=<b>"],"Cmd":["bash"]},"rootfs":{"type":"layers","diff_ids":["sha256:1"]},
		"history":[{"comment":"first"},{"comment":"last"}]}`))
	m.write(meta+"manifest.json", json.RawMessage(`{"schemaVersion":2}`))
	m.write(meta+"layers.json", []layer{{Key: id("11"), Expanded: 63e6}})
	d, err := describe(m.dir, "329ed837d508")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ format, want string }{
		{`{{.Id}} {{.Os}}/{{.Architecture}} {{.Size}}`, id("329ed837d508") + " linux/amd64 63000000\n"},
		{`{{join .RepoTags " "}} {{.RepoDigests}}`, "ubuntu:18.04 ubuntu:latest [ubuntu@" + id("d3") + "]\n"},
		{`{{json .Config.Env}} {{index .Config.Cmd 0}} {{.Comment}}`, `["PATH=/bin","A=<b>"] bash last` + "\n"},
		{`{{json .RootFS}}`, `{"Layers":["sha256:1"],"Type":"layers"}` + "\n"},
		{`{{range .Layers}}{{.expanded}}{{end}} {{.ManifestContent.schemaVersion}}`, "63000000 2\n"},
	} {
		var out strings.Builder
		text := template.Must(template.New("").Funcs(templateFuncs).Option("missingkey=error").Parse(tt.format + "\n"))
		if err := printDescriptions(&out, []description{d}, tt.format, text); err != nil || out.String() != tt.want {
			t.Errorf("inspect -f %s = %q, %v, want %q", tt.format, &out, err, tt.want)
		}
	}
	text := template.Must(template.New("").Option("missingkey=error").Parse("{{.Nope}}"))
	if err := printDescriptions(&strings.Builder{}, []description{d}, "", text); err == nil {
		t.Error("inspect -f {{.Nope}}: no error")
	}
	var out strings.Builder
	if err := printDescriptions(&out, nil, "", nil); err != nil || out.String() != "[]\n" {
		t.Errorf("inspect of nothing = %q, %v, want []", &out, err)
	}
	if err := printDescriptions(&out, []description{d}, "", nil); err != nil || !strings.Contains(out.String(), "\n        \"Id\": \"sha256:329ed837d508") {
		t.Errorf("inspect: %v\n%s", err, &out)
	}
}

func TestLayerMatrix(t *testing.T) {
	m := newFakeMount(t, seedRecords()...)
	base := layer{Key: id("11"), Digest: id("abcdef"), Images: 2, Expanded: 60e6, Compressed: 20e6, Command: "ADD\trootfs"}
	m.write(".imgfs/meta/ubuntu/18.04/layers.json", []layer{base})
	m.write(".imgfs/meta/redis/latest/layers.json", []layer{base, {Key: id("22"), Digest: id("fedcba"), Images: 1, Expanded: 45e6, Compressed: 9e6, Cached: 1e6}})
	rows, err := sharings(m.dir, []string{"ubuntu:18.04", "redis", "329"})
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := printMatrix(&out, []string{"ubuntu:18.04", "redis", "329"}, rows, false); err != nil {
		t.Fatal(err)
	}
	want := `LAYER          SIZE      COMPRESSED   CACHED    IMAGES    ubuntu:18.04   redis     329       COMMAND
abcdef000000   60MB      20MB         0B        2         x              x         x         ADD rootfs
fedcba000000   45MB      9MB          1MB       1         -              x         -         

105MB in all, 60MB of it in several of these images
`
	if out.String() != want {
		t.Errorf("layers:\n%s\nwant\n%s", &out, want)
	}
	if _, err := sharings(m.dir, []string{"redis", "none"}); err == nil {
		t.Error("layers of an image that is not here: no error")
	}
}
