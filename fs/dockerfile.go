package fs

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// A Dockerfile rebuilt from an image's history.
//
// Builders write into the history what they ran: buildkit the instruction, with
// "# buildkit" behind it; the classic builder and buildah `/bin/sh -c #(nop)` and
// the instruction, or the shell and the command of a RUN. Some of it is Go's way
// to print a list. What can be turned back is; the rest is a comment. A history is
// whatever who pushed the image wants it to be: each step becomes one instruction
// at most, and never ends another one, opens a here-document that takes the next
// ones in, or speaks to a terminal.

// dockerfile rebuilds the Dockerfile of an image, steps lowest first.
func dockerfile(id string, steps []step) string {
	b := &dockerfileWriter{shell: "/bin/sh -c"}
	// The first line is no parser directive, which would have a "=" behind a word,
	// so that nothing after it can be one.
	b.comment("Rebuilt from the history of " + id + ", which does not say everything.")
	b.WriteString("FROM scratch\n")
	base := true
	for _, s := range steps {
		if s.Comment != "" && !strings.HasPrefix(s.Comment, "buildkit.") {
			b.comment(s.Comment)
		}
		b.step(s, base)
		base = base && s.EmptyLayer
	}
	return b.String()
}

type dockerfileWriter struct {
	strings.Builder
	shell string // of the RUNs from here on
}

// comment writes one line.
func (b *dockerfileWriter) comment(text string) {
	b.WriteString("# " + strings.TrimSpace(oneLine(text)) + "\n")
}

// unclear writes a step that cannot be an instruction.
func (b *dockerfileWriter) unclear(text string) {
	if clean(text) {
		b.comment(strings.TrimPrefix(text, "# "))
	} else {
		b.comment(strconv.Quote(text))
	}
}

// clean reports whether text is one line of characters that can be written.
func clean(text string) bool {
	return utf8.ValidString(text) && !strings.ContainsFunc(text, func(r rune) bool {
		return r != '\t' && misleads(r)
	})
}

// plain reports whether text can stand behind an instruction as it is: on one
// line, which it neither continues nor opens a here-document on.
func plain(text string) bool {
	return clean(text) && text != "" && !strings.HasSuffix(strings.TrimRight(text, " \t"), `\`) && !strings.Contains(text, "<<")
}

var (
	instructionRE = regexp.MustCompile(`^(ADD|ARG|CMD|COPY|ENTRYPOINT|ENV|EXPOSE|HEALTHCHECK|LABEL|MAINTAINER|ONBUILD|RUN|SHELL|STOPSIGNAL|USER|VOLUME|WORKDIR)(?: +|$)`)
	buildArgsRE   = regexp.MustCompile(`^\|([0-9]{1,4}) `)
	sourceRE      = regexp.MustCompile(`^((?:--[a-z]+=\S+ +)*)((?:file|dir|multi|url):\S+) in +(\S.*)$`)
)

// nop begins what the classic builder did not run.
const nop = "/bin/sh -c #(nop)"

// step writes one step of the history. base says that no layer is below it.
func (b *dockerfileWriter) step(s step, base bool) {
	text := strings.TrimSpace(s.CreatedBy)
	text = strings.TrimSpace(strings.TrimSuffix(text, "# buildkit"))
	classic, isNop := strings.CutPrefix(text, nop)
	if isNop {
		text = strings.TrimSpace(classic)
	}
	word := strings.TrimSpace(instructionRE.FindString(text))
	args := strings.TrimSpace(strings.TrimPrefix(text, word))
	switch {
	case base && !s.EmptyLayer && word != "RUN" && (word == "" || word == "ADD" || sourceRE.MatchString(args)):
		b.baseLayer(s, text)
	case word == "RUN":
		b.run(args)
	case word != "":
		if line, ok := instruction(word, args); ok {
			if word == "SHELL" {
				b.shell = shellOf(args)
			}
			b.line(word, line)
		} else {
			b.unclear(text)
		}
	case !isNop && (buildArgsRE.MatchString(text) || b.isShell(text)):
		b.run(text)
	case text == "" && s.Layer != "":
		b.comment("layer " + s.Layer + ": the history does not say what made it")
	case text != "":
		b.unclear(text)
	}
}

// baseLayer says what is under everything.
func (b *dockerfileWriter) baseLayer(s step, text string) {
	if text == "" {
		text = "the history does not say what made it"
	}
	b.unclear("ADD layer " + s.Layer + " /: " + text)
}

func (b *dockerfileWriter) line(word, args string) { b.WriteString(word + " " + args + "\n") }

func (b *dockerfileWriter) isShell(text string) bool {
	return strings.HasPrefix(text, b.shell+" ") || strings.HasPrefix(text, "/bin/sh -c ")
}

// run writes a RUN: build arguments, the shell, and what it ran.
func (b *dockerfileWriter) run(text string) {
	text, flags := runFlags(text)
	if m := buildArgsRE.FindString(text); m != "" {
		rest := text[len(m)-1:]
		for _, shell := range []string{b.shell, "/bin/sh -c"} {
			if given, command, ok := strings.Cut(rest, " "+shell+" "); ok {
				if given != "" {
					b.unclear("with the build arguments" + given)
				}
				text = shell + " " + command
				break
			}
		}
	}
	shell := false
	for _, sh := range []string{b.shell, "/bin/sh -c"} {
		if command, ok := strings.CutPrefix(text, sh+" "); ok {
			text, shell = strings.TrimSpace(command), true
			break
		}
	}
	switch {
	case plain(text) && !strings.HasPrefix(text, "--") && !(shell && strings.HasPrefix(text, "[")):
		b.line("RUN", flags+text)
	case strings.Trim(text, " \t\r\n") != "" && writable(text):
		b.heredoc(flags, text)
	default:
		b.unclear("RUN " + text)
	}
}

// runFlags cuts the flags of a RUN off, which some builders keep in the history.
// Only those that cannot be mistaken for a command are flags.
func runFlags(text string) (rest, flags string) {
	for {
		m := runFlagRE.FindString(text)
		if m == "" {
			return text, flags
		}
		text, flags = text[len(m):], flags+strings.TrimSpace(m)+" "
	}
}

var runFlagRE = regexp.MustCompile(`^--(?:mount|network|security)=[A-Za-z0-9=,./_:-]+ +`)

// writable reports whether text has no characters but those of lines.
func writable(text string) bool {
	return utf8.ValidString(text) && !strings.ContainsFunc(text, func(r rune) bool {
		return r != '\n' && r != '\t' && misleads(r)
	})
}

// heredoc writes a RUN of several lines, or of one that the parser would take for
// more. The word that ends it is no line of it.
func (b *dockerfileWriter) heredoc(flags, text string) {
	lines := strings.Split(text, "\n")
	end := "EOF"
	for i := 1; slices.ContainsFunc(lines, func(l string) bool { return strings.TrimSpace(l) == end }); i++ {
		end = "EOF" + strconv.Itoa(i)
	}
	b.WriteString("RUN " + flags + "<<" + end + "\n" + strings.TrimSuffix(text, "\n") + "\n" + end + "\n")
}

// instruction turns the arguments of an instruction other than RUN back into what
// a Dockerfile has; ok is false when they cannot be.
func instruction(word, args string) (line string, ok bool) {
	switch word {
	case "CMD", "ENTRYPOINT":
		line = args
		if list, ok := goList(args); ok {
			line = jsonList(list)
		}
	case "SHELL":
		if list, ok := goList(args); ok {
			return jsonList(list), len(list) > 0
		}
		fields := strings.Fields(strings.Trim(args, "[]"))
		return jsonList(fields), len(fields) > 0 && clean(args)
	case "ENV", "LABEL":
		line, ok = pairs(args)
		return line, ok && plain(line)
	case "EXPOSE":
		line = ports(args)
	case "VOLUME":
		line = volumes(args)
	case "HEALTHCHECK":
		return healthcheck(args)
	case "ADD", "COPY":
		line = args
		if m := sourceRE.FindStringSubmatch(args); m != nil {
			line = m[1] + m[2] + " " + strings.TrimSpace(m[3]) // of the source only its digest is known
		}
		if len(strings.Fields(line)) < 2 {
			return "", false
		}
	case "ONBUILD":
		nested := strings.TrimSpace(instructionRE.FindString(args))
		if nested == "" || nested == "ONBUILD" || nested == "MAINTAINER" || len(nested) == len(args) {
			return "", false
		}
		line = args
	default:
		line = args
	}
	return line, plain(line)
}

// goList reads a list as Go prints one: ["a" "b"], or JSON's.
func goList(s string) ([]string, bool) {
	s, ok := strings.CutPrefix(s, "[")
	if !ok {
		return nil, false
	}
	list, rest, ok := quotedWords(s)
	return list, ok && rest == "]"
}

// quotedWords reads quoted words up to what is none.
func quotedWords(s string) (list []string, rest string, ok bool) {
	for s = strings.TrimLeft(s, " ,"); strings.HasPrefix(s, `"`); s = strings.TrimLeft(s, " ,") {
		q, err := strconv.QuotedPrefix(s)
		if err != nil {
			return nil, s, false
		}
		word, err := strconv.Unquote(q)
		if err != nil {
			return nil, s, false
		}
		list, s = append(list, word), s[len(q):]
	}
	return list, s, true
}

func jsonList(list []string) string {
	parts := make([]string, 0, len(list))
	for _, w := range list {
		var b strings.Builder
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(strings.Contains(w, "<<"))
		if e.Encode(w) != nil {
			return ""
		}
		parts = append(parts, strings.TrimSpace(b.String()))
	}
	return "[" + strings.Join(parts, ", ") + "]"
}

// shellOf is how the history writes the shell of a SHELL instruction.
func shellOf(args string) string {
	if list, ok := goList(args); ok {
		return strings.Join(list, " ")
	}
	return strings.Join(strings.Fields(strings.Trim(args, "[]")), " ")
}

var keyRE = regexp.MustCompile(`^([A-Za-z_][A-Za-z0-9_./-]*)=`)

// pairs turns the KEY=VALUE … of the history, which has values without their
// quotes, back into quoted ones. A word that begins no pair belongs to the value
// before it.
func pairs(args string) (string, bool) {
	var out []string
	var key, value string
	flush := func() {
		if key != "" {
			out = append(out, key+"="+quoteValue(value))
		}
	}
	for i, w := range strings.Split(args, " ") {
		m := keyRE.FindStringSubmatch(w)
		switch {
		case m != nil:
			flush()
			key, value = m[1], w[len(m[0]):]
		case i == 0:
			return "", false
		default:
			value += " " + w
		}
	}
	flush()
	return strings.Join(out, " "), len(out) > 0
}

var bareRE = regexp.MustCompile(`^[A-Za-z0-9_./:@%+,=-]+$`)

func quoteValue(v string) string {
	if bareRE.MatchString(v) {
		return v
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`).Replace(v) + `"`
}

// ports turns Go's map[80/tcp:{}] and [80/tcp] into 80/tcp.
func ports(args string) string {
	inner, isMap := strings.CutPrefix(args, "map[")
	if !isMap {
		inner, isMap = strings.CutPrefix(args, "[")
	}
	if inner, ok := strings.CutSuffix(inner, "]"); ok && isMap {
		return strings.Join(strings.Fields(strings.ReplaceAll(inner, ":{}", " ")), " ")
	}
	return args
}

// volumes turns Go's [/a /b] into JSON.
func volumes(args string) string {
	if list, ok := goList(args); ok && len(list) > 0 {
		return jsonList(list)
	}
	if inner, ok := strings.CutPrefix(args, "["); ok && strings.HasSuffix(inner, "]") {
		if fields := strings.Fields(strings.TrimSuffix(inner, "]")); len(fields) > 0 {
			return jsonList(fields)
		}
	}
	return args
}

var healthRE = regexp.MustCompile(`^&\{\[(.*)\] ((?:"[0-9a-zµ.]+" ){0,4})('(?:[^'\\]|\\.[^']*)'|[0-9]+)\}$`)

// healthcheck turns Go's &{["CMD-SHELL" "curl …"] "30s" "3s" "0s" "0s" '\x03'},
// interval, timeout, start period, start interval and retries, into flags.
func healthcheck(args string) (string, bool) {
	m := healthRE.FindStringSubmatch(args)
	if m == nil {
		return args, plain(args) && (args == "NONE" || strings.HasPrefix(args, "CMD ") || strings.HasPrefix(args, "--"))
	}
	test, rest, ok := quotedWords(m[1])
	if !ok || rest != "" || len(test) == 0 {
		return "", false
	}
	line := ""
	flags := []string{"interval", "timeout", "start-period", "start-interval"}
	for i, d := range strings.Fields(m[2]) {
		if d = strings.Trim(d, `"`); d != "0s" {
			line += "--" + flags[i] + "=" + d + " "
		}
	}
	retries, _, _, err := strconv.UnquoteChar(strings.Trim(m[3], "'"), '\'')
	if n, nerr := strconv.Atoi(m[3]); nerr == nil {
		retries, err = rune(n), nil
	}
	if err != nil {
		return "", false
	}
	if retries > 0 {
		line += fmt.Sprintf("--retries=%d ", retries)
	}
	switch {
	case test[0] == "NONE" && len(test) == 1:
		line = "NONE"
	case test[0] == "CMD-SHELL" && len(test) == 2 && !strings.HasPrefix(test[1], "["):
		line += "CMD " + test[1]
	case test[0] == "CMD" && len(test) > 1:
		line += "CMD " + jsonList(test[1:])
	default:
		return "", false
	}
	return line, plain(line)
}
