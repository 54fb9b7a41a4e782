package fetch

import (
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
)

// TestTOCLexer reads documents in pieces of a byte, and what is not one.
func TestTOCLexer(t *testing.T) {
	for _, tc := range []struct {
		doc  string
		want string // names and sizes, or part of an error
	}{
		{`{"version":1,"entries":[]}`, ""},
		{` { "version" : 1 , "x": {"a":["}",{"b":"]\""}]}, "entries" : [ {"name":"a","type":"reg","size":12} , {"name":"b"} ] , "z":null } rest`, "a 12, b 0"},
		{`{"ENTRIES":[{"Name":"a","SIZE":3,"xattrs":{"user.x":"eA=="}}]}`, "a 3"},
		{`{"entries":[{"name":"\u0061\"","size":1},{"name":"é","size":2,"other":[1,2]}]}`, `a" 1, é 2`},
		{`{"entries":[{"name":"a","size":1,"name":"b"}]}`, "b 1"},
		{`{"entries":[{"name":"a","size":1e2}]}`, "cannot unmarshal"},
		{`{"entries":[{"name":"a","size":01}]}`, "invalid character"},
		{`{"entries":[{"name":"a"} {"name":"b"}]}`, "where ',' should be"},
		{`{"entries":[{"name":"a"},]}`, "unexpected end"},
		{`{"entries":[{"name":"a"`, "unexpected EOF"},
		{`{"entries":[{"name":"a"}]`, "unexpected EOF"},
		{`{"entries":[{"name":"a"]}`, ""},
		{`{"version":01,"entries":[]}`, "not valid"},
		{`{"entries":[],"entries":[]}`, "twice"},
		{`{"version":1}`, "no entries"},
		{`{"entries":{}}`, "where '[' should be"},
		{`[]`, "where '{' should be"},
		{``, "unexpected EOF"},
		{`{"entries":[{"name":"` + strings.Repeat("x", maxTOCEntry) + `"}]}`, "an entry of more than"},
	} {
		for name, r := range map[string]io.Reader{"whole": strings.NewReader(tc.doc), "bytes": iotest.OneByteReader(strings.NewReader(tc.doc))} {
			if len(tc.doc) > 1000 && name == "bytes" {
				continue
			}
			var got []string
			err := decodeTOC(r, func(e *tocEntry) error {
				got = append(got, fmt.Sprintf("%s %d", e.Name, e.Size))
				return nil
			})
			text := strings.Join(got, ", ")
			if err != nil {
				text = err.Error()
			}
			if err == nil && text != tc.want || !strings.Contains(text, tc.want) {
				t.Errorf("%.100s (%s): %.100s, want %s", tc.doc, name, text, tc.want)
			}
		}
	}
}

// FuzzTOCEntry compares the reader of usual entries with encoding/json.
func FuzzTOCEntry(f *testing.F) {
	for _, s := range []string{
		`{"name":"a/b","type":"reg","size":12,"modtime":"2024-01-02T03:04:05Z","mode":420,"uid":-1,"digest":"sha256:00","offset":7,"chunkDigest":"x"}`,
		`{}`, ` { "name" : "é" } `, `{"name":"a","name":"b","mode":-0,"size":00}`, `{"name":"\u0061"}`, `{"NAME":"a"}`, `{"size":1234567890123456789}`, `{"userName":"x"}`,
		`{"name":"a",}`, `{"name":null}`, `{"a":1}`, "{\"name\":\"a\tb\"}", "{\"name\":\"\xff\"}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var got, want tocEntry
		if !got.parse(raw) {
			return
		}
		if err := json.Unmarshal(raw, &want); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q = %+v, encoding/json: %+v, %v", raw, got, want, err)
		}
	})
}
