package registrytest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// welcome reports whether the request has the right credentials, and answers it
// if not.
func (s *Server) welcome(w http.ResponseWriter, r *http.Request) bool {
	switch s.o.Auth {
	case Basic:
		if user, pass, _ := r.BasicAuth(); user == s.o.User && pass == s.o.Password {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
	case Bearer:
		scope := scopeOf(r.URL.Path)
		s.mu.Lock()
		has, known := s.tokens[strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")]
		s.mu.Unlock()
		if known && (scope == "" || slices.Contains(strings.Fields(has), scope)) {
			return true
		}
		scheme := "http"
		if s.o.TLS != nil {
			scheme = "https"
		}
		w.Header().Set("WWW-Authenticate",
			fmt.Sprintf(`Bearer realm="%s://%s/token",service="test",scope="%s"`, scheme, s.Host(), scope))
	default:
		return true
	}
	w.WriteHeader(http.StatusUnauthorized)
	fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
	return false
}

// scopeOf is what a token must have for a path.
func scopeOf(path string) string {
	path = strings.TrimPrefix(path, "/v2/")
	for _, sep := range []string{"/manifests/", "/blobs/", "/tags/"} {
		if repo, _, ok := strings.Cut(path, sep); ok {
			return "repository:" + repo + ":pull"
		}
	}
	if path == "_catalog" {
		return "registry:catalog:*"
	}
	return ""
}

// giveToken is the token server.
func (s *Server) giveToken(w http.ResponseWriter, r *http.Request) {
	if user, pass, _ := r.BasicAuth(); s.o.User != "" && (user != s.o.User || pass != s.o.Password) {
		r.ParseForm()
		if r.PostForm.Get("refresh_token") != s.o.Password {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
	}
	r.ParseForm()
	s.mu.Lock()
	s.issued++
	tok := fmt.Sprintf("token-%d", s.issued)
	s.tokens[tok] = strings.Join(r.Form["scope"], " ")
	s.mu.Unlock()
	v := map[string]any{"token": tok}
	if s.o.TokenLife > 0 {
		v["expires_in"] = s.o.TokenLife
	}
	json.NewEncoder(w).Encode(v)
}
