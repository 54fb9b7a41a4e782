package fs

import (
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// rebuilt is the Dockerfile of a history without its first two lines. A command
// that begins with "+" has a layer.
func rebuilt(t *testing.T, commands ...string) string {
	t.Helper()
	var steps []step
	for _, c := range commands {
		s := step{EmptyLayer: true}
		if has := strings.HasPrefix(c, "+"); has {
			c, s.EmptyLayer, s.Layer = c[1:], false, "sha256:1"
		}
		s.CreatedBy = c
		steps = append(steps, s)
	}
	lines := strings.SplitN(dockerfile("sha256:0", steps), "\n", 3)
	if len(lines) != 3 || !strings.HasPrefix(lines[0], "# Rebuilt ") || lines[1] != "FROM scratch" {
		t.Fatalf("it begins with %q", lines)
	}
	return lines[2]
}

func TestDockerfile(t *testing.T) {
	for _, c := range []struct{ history, want string }{
		// buildkit
		{"RUN /bin/sh -c apt-get update && apt-get install -y x # buildkit", "RUN apt-get update && apt-get install -y x\n"},
		{"RUN |2 A=1 B=two words /bin/sh -c make # buildkit", "# with the build arguments A=1 B=two words\nRUN make\n"},
		{"RUN /bin/sh -c set -e\nmake\n # buildkit", "RUN <<EOF\nset -e\nmake\nEOF\n"},
		{"RUN /bin/sh -c cat >x <<EOF\nhello\nEOF\n # buildkit", "RUN <<EOF1\ncat >x <<EOF\nhello\nEOF\nEOF1\n"},
		{"RUN --mount=type=cache,target=/root/.cache /bin/sh -c make # buildkit", "RUN --mount=type=cache,target=/root/.cache make\n"},
		{"RUN ls -l # buildkit", "RUN ls -l\n"},
		{"COPY docker-entrypoint.sh / # buildkit", "COPY docker-entrypoint.sh /\n"},
		{"COPY --chown=1:2 a b c/ # buildkit", "COPY --chown=1:2 a b c/\n"},
		{"ENV PATH=/usr/local/bin:/usr/bin", "ENV PATH=/usr/local/bin:/usr/bin\n"},
		{"ENV A=1 B=two words C=$x\"y\\", "ENV A=1 B=\"two words\" C=\"\\$x\\\"y\\\\\"\n"},
		{`CMD ["nginx" "-g" "daemon off;"]`, `CMD ["nginx", "-g", "daemon off;"]` + "\n"},
		{`ENTRYPOINT ["/docker-entrypoint.sh"]`, `ENTRYPOINT ["/docker-entrypoint.sh"]` + "\n"},
		{"ENTRYPOINT []", "ENTRYPOINT []\n"},
		{"WORKDIR /data", "WORKDIR /data\n"},
		{"EXPOSE map[443/tcp:{} 80/tcp:{}]", "EXPOSE 443/tcp 80/tcp\n"},
		{"EXPOSE [6379/tcp]", "EXPOSE 6379/tcp\n"},
		{"VOLUME [/data /more]", `VOLUME ["/data", "/more"]` + "\n"},
		{"USER redis", "USER redis\n"},
		{"LABEL maintainer=NGINX Docker Maintainers <docker-maint@nginx.com>",
			`LABEL maintainer="NGINX Docker Maintainers <docker-maint@nginx.com>"` + "\n"},
		{"STOPSIGNAL SIGQUIT", "STOPSIGNAL SIGQUIT\n"},
		{"SHELL [/bin/bash -o pipefail -c]", `SHELL ["/bin/bash", "-o", "pipefail", "-c"]` + "\n"},
		{"ONBUILD RUN make", "ONBUILD RUN make\n"},
		{"ARG VERSION=1.2", "ARG VERSION=1.2\n"},
		{"MAINTAINER A B <a@b.example>", "MAINTAINER A B <a@b.example>\n"},
		{`HEALTHCHECK &{["CMD-SHELL" "curl -f http://localhost/ || exit 1"] "30s" "3s" "0s" "0s" '\x03'}`,
			"HEALTHCHECK --interval=30s --timeout=3s --retries=3 CMD curl -f http://localhost/ || exit 1\n"},
		{`HEALTHCHECK &{["CMD" "/check" "x y"] "1m0s" "0s" "5s" '\x00'}`,
			`HEALTHCHECK --interval=1m0s --start-period=5s CMD ["/check", "x y"]` + "\n"},
		{`HEALTHCHECK &{["NONE"] "0s" "0s" "0s" '\x00'}`, "HEALTHCHECK NONE\n"},
		// classic
		{`/bin/sh -c #(nop)  CMD ["bash"]`, `CMD ["bash"]` + "\n"},
		{"/bin/sh -c #(nop) COPY file:1a2b in /usr/local/bin/ ", "COPY file:1a2b /usr/local/bin/\n"},
		{"/bin/sh -c #(nop) COPY --from=b dir:1a2b in / ", "COPY --from=b dir:1a2b /\n"},
		{"/bin/sh -c #(nop)  ENV LANG=C.UTF-8", "ENV LANG=C.UTF-8\n"},
		{"/bin/sh -c apt-get update", "RUN apt-get update\n"},
		{"|1 FOO=bar /bin/sh -c make $FOO", "# with the build arguments FOO=bar\nRUN make $FOO\n"},
		{"/bin/sh -c #(nop)  EXPOSE 80", "EXPOSE 80\n"},
		// what the history does not say
		{"bash", "# bash\n"},
		{"bazel build ...", "# bazel build ...\n"},
		{"# debian.sh --arch 'amd64' out/ 'bookworm'", "# debian.sh --arch 'amd64' out/ 'bookworm'\n"},
		{"", ""},
		{"FROM evil", "# FROM evil\n"},
		{"COPY", "# COPY\n"},
		{"ONBUILD ONBUILD RUN x", "# ONBUILD ONBUILD RUN x\n"},
		// hostile
		{"ENV A=b\nRUN evil", `# "ENV A=b\nRUN evil"` + "\n"},
		{"bash\nRUN evil", `# "bash\nRUN evil"` + "\n"},
		{"USER a\\", "# USER a\\\n"},
		{"USER a\\  ", "# USER a\\\n"},
		{"COPY <<EOF /x", "# COPY <<EOF /x\n"},
		{"ONBUILD COPY <<EOF /x", "# ONBUILD COPY <<EOF /x\n"},
		{"RUN /bin/sh -c cat <<EOF", "RUN <<EOF\ncat <<EOF\nEOF\n"},
		{"RUN /bin/sh -c true \\", "RUN <<EOF\ntrue \\\nEOF\n"},
		{"RUN /bin/sh -c --mount=type=bind,from=evil true", "RUN <<EOF\n--mount=type=bind,from=evil true\nEOF\n"},
		{"RUN /bin/sh -c [\"a\"]", "RUN <<EOF\n[\"a\"]\nEOF\n"},
		{"RUN /bin/sh -c a\nEOF\nUSER evil", "RUN <<EOF1\na\nEOF\nUSER evil\nEOF1\n"},
		{"RUN /bin/sh -c a\nEOF\r\nUSER evil", `# "RUN a\nEOF\r\nUSER evil"` + "\n"},
		{"RUN /bin/sh -c echo \x1b]0;evil\x07", `# "RUN echo \x1b]0;evil\a"` + "\n"},
		{"escape=`", "# escape=`\n"},
	} {
		if diff := cmp.Diff(c.want, rebuilt(t, c.history)); diff != "" {
			t.Errorf("rebuilt(%q):\n%s", c.history, diff)
		}
	}
	// The layer below all others is the base, which FROM scratch does not have.
	got := rebuilt(t, "ARG RELEASE", "+/bin/sh -c #(nop) ADD file:1a2b in / ", `CMD ["bash"]`, "+SHELL [/bin/bash -c]", "+RUN /bin/bash -c a # buildkit", "+")
	want := `ARG RELEASE
# ADD layer sha256:1 /: ADD file:1a2b in /
CMD ["bash"]
SHELL ["/bin/bash", "-c"]
RUN a
# layer sha256:1: the history does not say what made it
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// parseDockerfile reads a Dockerfile as buildkit's parser does, as far as that
// decides where an instruction ends: comments, continued lines, here-documents.
func parseDockerfile(text string) (instructions []string) {
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		line := strings.TrimLeft(lines[i], " \t")
		if strings.TrimSpace(line) == "" || strings.HasPrefix(line, "#") {
			continue
		}
		for continuedRE.MatchString(line) && i+1 < len(lines) {
			i++
			line = continuedRE.ReplaceAllString(line, "$1") + lines[i]
		}
		instructions = append(instructions, line)
		if word, _, _ := strings.Cut(strings.TrimPrefix(line, "ONBUILD "), " "); word != "RUN" && word != "COPY" && word != "ADD" {
			continue
		}
		for _, m := range heredocRE.FindAllStringSubmatch(line, -1) {
			for i++; i < len(lines) && strings.TrimRight(lines[i], "\r") != m[1]; i++ {
			}
		}
	}
	return instructions
}

var (
	continuedRE = regexp.MustCompile(`(^|[^\\])\\[ \t]*$`)
	heredocRE   = regexp.MustCompile(`<<-?['"]?([^<'"\s]+)['"]?`)
)

// Whatever a history says, a step is one instruction at most, and the ones after
// it stay what they are.
func FuzzDockerfile(f *testing.F) {
	for _, s := range []string{"", "RUN a", "RUN /bin/sh -c a\nb", "ENV A=b\\", "COPY <<A <<B /", "|1 A=b /bin/sh -c x", "ONBUILD RUN <<X\nX",
		"LABEL a=\"b", "CMD [\"a\\\\", "RUN --mount=a x", "/bin/sh -c #(nop) ADD file:x in /", "SHELL [a]", "HEALTHCHECK &{[\"CMD-SHELL\" \"\\n\"] '\\x03'}"} {
		f.Add(s, s)
	}
	words := regexp.MustCompile(`^(FROM scratch$|(ADD|ARG|CMD|COPY|ENTRYPOINT|ENV|EXPOSE|HEALTHCHECK|LABEL|MAINTAINER|ONBUILD|RUN|SHELL|STOPSIGNAL|USER|VOLUME|WORKDIR) )`)
	f.Fuzz(func(t *testing.T, command, comment string) {
		for _, empty := range []bool{true, false} {
			text := dockerfile("sha256:0", []step{
				{CreatedBy: "USER first", EmptyLayer: true},
				{CreatedBy: command, Comment: comment, EmptyLayer: empty, Layer: "sha256:1"},
				{CreatedBy: "USER last", EmptyLayer: true}})
			got := parseDockerfile(text)
			if len(got) < 3 || len(got) > 4 || got[1] != "USER first" || got[len(got)-1] != "USER last" {
				t.Fatalf("the Dockerfile\n%s\nhas the instructions %q", text, got)
			}
			for _, g := range got {
				if !words.MatchString(g) {
					t.Errorf("the Dockerfile\n%s\nhas the instruction %q", text, g)
				}
			}
			for _, r := range text {
				if r < ' ' && r != '\n' && r != '\t' || r == 0x7f {
					t.Errorf("the Dockerfile has the character %q", r)
				}
			}
		}
	})
}
