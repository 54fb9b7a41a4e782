package fetch

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"unicode/utf8"
)

// A table of contents is JSON of some hundred bytes an entry, and the first thing
// that a cold start waits for. What its writers write is read here without
// reflection and in one scan; an entry with anything unusual in it (escapes,
// attributes, letters in another case) is left to encoding/json, which is also
// what decides what is an entry: FuzzTOCEntry compares the two.

// decodeTOC calls add for each entry of the JSON document in r, holding one of
// them at a time. A malformed document, or one beyond the limits, is an errStream.
// add must not keep the entry.
func decodeTOC(r io.Reader, add func(*tocEntry) error) error {
	l := &tocLexer{r: r, left: maxTOC, buf: make([]byte, 0, 64<<10)}
	if err := l.expect('{'); err != nil {
		return err
	}
	seen := false
	for first := true; ; first = false {
		more, err := l.more(first, '}')
		if err != nil {
			return err
		}
		if !more {
			break
		}
		raw, err := l.value()
		if err != nil {
			return err
		}
		var key string
		if err := json.Unmarshal(raw, &key); err != nil {
			return streamf("table of contents: %v", err)
		}
		if err := l.expect(':'); err != nil {
			return err
		}
		if !strings.EqualFold(key, "entries") {
			if raw, err = l.value(); err != nil {
				return err
			}
			if !json.Valid(raw) {
				return streamf("table of contents: %.20q is not valid", key)
			}
			continue
		}
		if seen {
			return streamf("table of contents: entries twice")
		}
		seen = true
		if err := l.entries(add); err != nil {
			return err
		}
	}
	if !seen {
		return streamf("table of contents: no entries")
	}
	return nil
}

// entries reads the array of entries.
func (l *tocLexer) entries(add func(*tocEntry) error) error {
	if err := l.expect('['); err != nil {
		return err
	}
	var e tocEntry
	for first := true; ; first = false {
		more, err := l.more(first, ']')
		if err != nil || !more {
			return err
		}
		raw, err := l.value()
		if err != nil {
			return err
		}
		e = tocEntry{}
		if !e.parse(raw) {
			e = tocEntry{}
			if err := json.Unmarshal(raw, &e); err != nil {
				return streamf("table of contents: %v", err)
			}
		}
		if err := add(&e); err != nil {
			return err
		}
	}
}

// tocLexer splits a document into its values.
type tocLexer struct {
	r    io.Reader
	left int64  // bytes that may still be read
	buf  []byte // what was read
	pos  int    // in buf, of what comes next
	eof  bool
}

// fill reads more; what is before keep is not needed any more, and moves. It
// returns how far it moved.
func (l *tocLexer) fill(keep int) (moved int, err error) {
	if l.eof {
		return 0, streamf("table of contents: %v", io.ErrUnexpectedEOF)
	}
	if keep > 0 {
		l.buf = l.buf[:copy(l.buf, l.buf[keep:])]
		l.pos -= keep
	}
	if len(l.buf) == cap(l.buf) {
		if len(l.buf) >= maxTOCEntry {
			return 0, streamf("table of contents: an entry of more than %d bytes", maxTOCEntry)
		}
		l.buf = append(make([]byte, 0, min(2*cap(l.buf), maxTOCEntry)), l.buf...)
	}
	room := l.buf[len(l.buf):cap(l.buf)]
	room = room[:min(int64(len(room)), l.left)]
	if len(room) == 0 {
		return 0, streamf("table of contents: more than %d bytes", maxTOC)
	}
	n, err := l.r.Read(room)
	l.buf = l.buf[:len(l.buf)+n]
	l.left -= int64(n)
	switch {
	case err == io.EOF:
		l.eof = true
	case err != nil:
		return 0, streamf("table of contents: %v", err)
	}
	return keep, nil
}

// next returns the next byte that is no blank, without taking it.
func (l *tocLexer) next() (byte, error) {
	for {
		for ; l.pos < len(l.buf); l.pos++ {
			switch c := l.buf[l.pos]; c {
			case ' ', '\t', '\r', '\n':
			default:
				return c, nil
			}
		}
		if _, err := l.fill(l.pos); err != nil {
			return 0, err
		}
	}
}

func (l *tocLexer) expect(want byte) error {
	c, err := l.next()
	if err != nil {
		return err
	}
	if c != want {
		return streamf("table of contents: %q where %q should be", c, want)
	}
	l.pos++
	return nil
}

// more reports whether an object or an array goes on, which end ends. It takes
// the end, or the comma between two elements.
func (l *tocLexer) more(first bool, end byte) (bool, error) {
	c, err := l.next()
	if err != nil {
		return false, err
	}
	switch {
	case c == end:
		l.pos++
		return false, nil
	case first:
		return true, nil
	}
	return true, l.expect(',')
}

// value takes one value, as it stands: only its end is looked for. It is valid
// until the next call.
func (l *tocLexer) value() ([]byte, error) {
	if _, err := l.next(); err != nil {
		return nil, err
	}
	start, depth := l.pos, 0
	inString, escaped := false, false
	for i := start; ; i++ {
		if i == len(l.buf) {
			moved, err := l.fill(start)
			if err != nil {
				return nil, err
			}
			start, i = start-moved, i-moved
			if i == len(l.buf) {
				i-- // nothing came; look again
				continue
			}
		}
		c := l.buf[i]
		if inString {
			switch {
			case escaped:
				escaped = false
			case c == '\\':
				escaped = true
			case c == '"':
				inString = false
				if depth == 0 {
					return l.took(start, i+1), nil
				}
			}
			continue
		}
		switch c {
		case '"':
			inString = true
		case '{', '[':
			depth++
		case '}', ']', ',', ':', ' ', '\t', '\r', '\n':
			if depth == 0 { // the end of a number or a word
				return l.took(start, i), nil
			}
			if c != '}' && c != ']' {
				continue
			}
			if depth--; depth == 0 {
				return l.took(start, i+1), nil
			}
		}
	}
}

func (l *tocLexer) took(start, end int) []byte {
	l.pos = end
	return l.buf[start:end]
}

// parse fills e from an entry in the form that the usual writers give it. It
// reports false when there is anything else in it; e is worth nothing then.
func (e *tocEntry) parse(raw []byte) bool {
	p := fields{raw: raw}
	if !p.skip('{') {
		return false
	}
	for first := true; ; first = false {
		if p.skip('}') {
			return p.at == len(raw)
		}
		if !first && !p.skip(',') {
			return false
		}
		key, ok := p.text()
		if !ok || !p.skip(':') || !e.field(&p, key) {
			return false
		}
	}
}

// field reads the value of a key.
func (e *tocEntry) field(p *fields, key []byte) (ok bool) {
	switch string(key) {
	case "name":
		return p.setText(&e.Name)
	case "type":
		return p.setText(&e.Type)
	case "linkName":
		return p.setText(&e.LinkName)
	case "modtime":
		return p.setText(&e.ModTime)
	case "digest":
		return p.setText(&e.Digest)
	case "chunkDigest":
		return p.setText(&e.ChunkDigest)
	case "chunkType":
		return p.setText(&e.ChunkType)
	case "mode":
		return p.number(&e.Mode)
	case "size":
		return p.number(&e.Size)
	case "uid":
		return p.number(&e.UID)
	case "gid":
		return p.number(&e.GID)
	case "devMajor":
		return p.number(&e.DevMajor)
	case "devMinor":
		return p.number(&e.DevMinor)
	case "offset":
		return p.number(&e.Offset)
	case "endOffset":
		return p.number(&e.EndOffset)
	case "innerOffset":
		return p.number(&e.InnerOffset)
	case "chunkOffset":
		return p.number(&e.ChunkOffset)
	case "chunkSize":
		return p.number(&e.ChunkSize)
	case "userName", "groupName", "accesstime", "changetime":
		_, ok = p.text()
		return ok
	}
	return false
}

// fields reads the fields of one entry.
type fields struct {
	raw []byte
	at  int
}

// skip takes c, and the blanks before it.
func (p *fields) skip(c byte) bool {
	for ; p.at < len(p.raw); p.at++ {
		switch p.raw[p.at] {
		case ' ', '\t', '\r', '\n':
			continue
		case c:
			p.at++
			return true
		}
		return false
	}
	return false
}

// text takes a string that stands for itself: no escapes, valid UTF-8.
func (p *fields) text() ([]byte, bool) {
	if !p.skip('"') {
		return nil, false
	}
	n := bytes.IndexByte(p.raw[p.at:], '"')
	if n < 0 {
		return nil, false
	}
	s := p.raw[p.at : p.at+n]
	p.at += n + 1
	ascii := true
	for _, c := range s {
		if c < ' ' || c == '\\' {
			return nil, false
		}
		ascii = ascii && c < utf8.RuneSelf
	}
	return s, ascii || utf8.Valid(s)
}

func (p *fields) setText(to *string) bool {
	s, ok := p.text()
	if string(s) != *to {
		*to = string(s)
	}
	return ok
}

// number takes an integer of at most 18 digits.
func (p *fields) number(to *int64) bool {
	for p.at < len(p.raw) && (p.raw[p.at] == ' ' || p.raw[p.at] == '\t' || p.raw[p.at] == '\r' || p.raw[p.at] == '\n') {
		p.at++
	}
	negative := p.at < len(p.raw) && p.raw[p.at] == '-'
	if negative {
		p.at++
	}
	start, n := p.at, int64(0)
	for ; p.at < len(p.raw) && p.raw[p.at] >= '0' && p.raw[p.at] <= '9'; p.at++ {
		if p.at-start >= 18 {
			return false
		}
		n = 10*n + int64(p.raw[p.at]-'0')
	}
	if p.at == start || p.raw[start] == '0' && p.at > start+1 {
		return false
	}
	if negative {
		n = -n
	}
	*to = n
	return true
}
