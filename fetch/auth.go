package fetch

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	iofs "io/fs"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"golang.org/x/sync/singleflight"
)

const (
	maxTokenBody  = 1 << 20          // bytes of a token server's answer
	maxToken      = 64 << 10         // bytes of a token
	maxChallenge  = 16 << 10         // bytes of WWW-Authenticate that are read
	maxChallenges = 16               // of one answer
	maxParams     = 16               // of one challenge
	minLife       = 60 * time.Second // a token's life when its server does not say, as the token specification has it
	tokenTimeout  = 30 * time.Second // of getting one
)

// token is what a host is shown for one scope.
type token struct {
	header    string    // value of Authorization, "" for none
	scope     string    // that it was asked for; what the host wanted may differ from what we would ask
	expires   time.Time // zero: not known to expire
	anonymous bool      // got without a user's credentials
}

func (t *token) valid(now time.Time) bool {
	return t != nil && (t.expires.IsZero() || now.Before(t.expires))
}

// anonymous reports whether a request with t (nil: none) was nobody's.
func anonymous(t *token) bool { return t == nil || t.anonymous }

// tokenKey says what a token is good for. user is the keychain's name, so that
// credentials for one repository are not used for another.
type tokenKey struct{ host, scope, user string }

// credentials are the tokens of all hosts: one for each (host, scope), got by
// one flight however many wait for it.
type credentials struct {
	flight     singleflight.Group
	mu         sync.Mutex // guards what follows
	tokens     map[tokenKey]*token
	challenges map[string]challenge // by host: what it asked for last
	closed     bool
	flights    sync.WaitGroup     // flights that have begun
	life       context.Context    // of all flights: they outlive the caller who began them, not the Client
	stop       context.CancelFunc // ends it
}

func (a *credentials) init() {
	a.tokens, a.challenges = map[tokenKey]*token{}, map[string]challenge{}
	a.life, a.stop = context.WithCancel(context.Background())
}

// close ends the flights and waits for them.
func (a *credentials) close() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.stop()
	a.flights.Wait()
}

// begin counts a flight, unless the Client is closed.
func (a *credentials) begin() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.closed {
		a.flights.Add(1)
	}
	return !a.closed
}

func (a *credentials) find(k tokenKey) (t *token, ch challenge, asked bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	ch, asked = a.challenges[k.host]
	ch = ch.copy() // whoever asks adds its scope
	return a.tokens[k], ch, asked
}

func (a *credentials) keep(k tokenKey, t *token) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.tokens) >= maxHosts {
		clear(a.tokens)
	}
	a.tokens[k] = t
}

func (a *credentials) challenged(host string, ch challenge) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.challenges) >= maxHosts {
		clear(a.challenges)
	}
	a.challenges[host] = ch
}

func keyOf(ep *endpoint, cl *call) tokenKey {
	return tokenKey{host: ep.key() + ep.path, scope: cl.scope, user: ep.resource(cl.repo).String()}
}

// credential is what the request should show: nil as long as the host has not
// asked for anything. It gets a token when the one there was has expired.
func (c *Client) credential(ctx context.Context, ep *endpoint, cl *call) (*token, *Error) {
	t, ch, asked := c.auth.find(keyOf(ep, cl))
	if !asked || t.valid(time.Now()) {
		return t, nil
	}
	if t != nil && t.scope != "" {
		ch.params["scope"] = t.scope
	}
	return c.renew(ctx, ep, cl, ch, t)
}

// refresh is called when a host refused what it was shown. again is false if
// there is nothing else to show.
func (c *Client) refresh(ctx context.Context, ep *endpoint, cl *call, h http.Header, used *token) (t *token, again bool, err *Error) {
	key := keyOf(ep, cl)
	ch, ok := pick(parseChallenges(h.Values("WWW-Authenticate")))
	if ok {
		bare := ch.copy()
		delete(bare.params, "scope") // of this repository, the rest is every repository's
		c.auth.challenged(key.host, bare)
	} else if _, ch, ok = c.auth.find(key); !ok || used == nil {
		return nil, false, nil
	}
	t, err = c.renew(ctx, ep, cl, ch, used)
	if err != nil {
		return nil, false, err
	}
	return t, t.header != "" && (used == nil || used.header != t.header), nil
}

// renew gets a token that is not used, by one flight for all who want it. The
// flight outlives the caller that began it.
func (c *Client) renew(ctx context.Context, ep *endpoint, cl *call, ch challenge, used *token) (*token, *Error) {
	key := keyOf(ep, cl)
	if ch.params["scope"] == "" {
		ch.params["scope"] = cl.scope
	}
	res := c.auth.flight.DoChan(key.host+" "+key.scope+" "+key.user, func() (any, error) {
		t, err := c.fly(context.WithoutCancel(ctx), ep, cl, ch, used)
		if err != nil {
			return nil, err
		}
		return t, nil
	})
	select {
	case r := <-res:
		if r.Err != nil {
			return nil, r.Err.(*Error)
		}
		return r.Val.(*token), nil
	case <-ctx.Done():
		return nil, done(ctx)
	}
}

// fly is one flight of renew. It may come right after another, whose token is
// then as good as new.
func (c *Client) fly(ctx context.Context, ep *endpoint, cl *call, ch challenge, used *token) (t *token, err *Error) {
	key := keyOf(ep, cl)
	if t, _, _ := c.auth.find(key); t != used && t.valid(time.Now()) {
		return t, nil
	}
	if !c.auth.begin() {
		return nil, fail(ErrUnavailable, "the client is closed")
	}
	defer c.auth.flights.Done()
	defer func() {
		if r := recover(); r != nil { // a keychain's or a helper's; its words may be secret
			t, err = nil, fail(iofs.ErrPermission, "reading the credentials for %s: panic", ep.host)
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, min(tokenTimeout, c.o.Timeout))
	defer cancel()
	defer context.AfterFunc(c.auth.life, cancel)()
	if t, err = c.token(ctx, ep, cl, ch); err == nil {
		c.auth.keep(key, t)
	}
	return t, err
}

// token asks the keychain, and the token server if the challenge names one.
func (c *Client) token(ctx context.Context, ep *endpoint, cl *call, ch challenge) (*token, *Error) {
	conf, err := c.login(ctx, ep.resource(cl.repo))
	if err != nil {
		text, _, _ := strings.Cut(err.Error(), "out:") // what a helper printed may be the secret
		return nil, fail(iofs.ErrPermission, "reading the credentials for %s: %s", ep.host, text)
	}
	t := &token{scope: ch.params["scope"], anonymous: conf == authn.AuthConfig{}}
	switch {
	case conf.RegistryToken != "":
		t.header = "Bearer " + conf.RegistryToken
	case ch.scheme == "bearer":
		if err := c.askToken(ctx, ep, ch, conf, t); err != nil {
			return nil, err
		}
	default:
		t.header = basic(conf)
	}
	if !headerOK(t.header) {
		return nil, fail(ErrUnavailable, "the credentials for %s are no header's value", ep.host)
	}
	return t, nil
}

// login asks the keychain.
func (c *Client) login(ctx context.Context, what authn.Resource) (authn.AuthConfig, error) {
	if what.RegistryStr() == "" {
		return authn.AuthConfig{}, nil // a mirror under a name that no registry can have
	}
	auth, err := authn.Resolve(ctx, c.o.Keychain, what)
	if err != nil {
		return authn.AuthConfig{}, err
	}
	conf, err := authn.Authorization(ctx, auth)
	if err != nil || conf == nil {
		return authn.AuthConfig{}, err
	}
	return *conf, nil
}

// askToken gets t from the server that the challenge names
// (https://distribution.github.io/distribution/spec/auth/token/).
func (c *Client) askToken(ctx context.Context, ep *endpoint, ch challenge, conf authn.AuthConfig, t *token) *Error {
	u, err := url.Parse(ch.params["realm"])
	if err != nil || u.Host == "" {
		return fail(ErrUnavailable, "the registry names no token server")
	}
	u.User = nil
	if err := c.mayGo(ep, u); err != nil {
		return err
	}
	req, e := tokenRequest(u, ch, conf, t.scope)
	if e != nil {
		return e
	}
	resp, e := c.walk(ctx, ep, req)
	if e != nil {
		return e
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenBody+1))
	c.state(resp.host).bytes.Add(int64(len(body)))
	switch {
	case err != nil:
		return netError(ctx, ctx, err)
	case resp.StatusCode != http.StatusOK:
		return statusError(resp.StatusCode, resp.Header, body)
	case len(body) > maxTokenBody:
		return fail(ErrUnavailable, "the token server's answer is too large")
	}
	var v struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"`
	}
	if json.Unmarshal(body, &v) != nil {
		return fail(ErrUnavailable, "the token server's answer is no JSON")
	}
	if v.Token == "" {
		v.Token = v.AccessToken
	}
	if v.Token == "" || len(v.Token) > maxToken {
		return fail(ErrUnavailable, "the token server gave no token")
	}
	t.header = "Bearer " + v.Token
	life := minLife
	if v.ExpiresIn > 0 {
		life = time.Duration(min(v.ExpiresIn, 24*3600)) * time.Second
	}
	t.expires = time.Now().Add(life - life/6)
	return nil
}

// tokenRequest is a GET with the user's password, or a POST with an identity token.
func tokenRequest(u *url.URL, ch challenge, conf authn.AuthConfig, scope string) (*http.Request, *Error) {
	q := url.Values{}
	if s := ch.params["service"]; s != "" {
		q.Set("service", s)
	}
	if conf.IdentityToken != "" {
		q.Set("scope", scope)
		q.Set("grant_type", "refresh_token")
		q.Set("refresh_token", conf.IdentityToken)
		q.Set("client_id", "imgfs")
		req, err := http.NewRequest(http.MethodPost, u.String(), strings.NewReader(q.Encode()))
		if err != nil {
			return nil, fail(ErrUnavailable, "the token server's address: %v", err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		return req, nil
	}
	for k, v := range u.Query() {
		if k != "service" && k != "scope" {
			q[k] = v
		}
	}
	for _, s := range strings.Fields(scope) {
		q.Add("scope", s)
	}
	v := *u
	v.RawQuery = q.Encode()
	req, err := http.NewRequest(http.MethodGet, v.String(), nil)
	if err != nil {
		return nil, fail(ErrUnavailable, "the token server's address: %v", err)
	}
	if h := basic(conf); h != "" {
		req.Header.Set("Authorization", h)
	}
	return req, nil
}

// basic is the value of Authorization for a user and a password, "" without.
func basic(conf authn.AuthConfig) string {
	switch {
	case conf.Username != "" || conf.Password != "":
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(conf.Username+":"+conf.Password))
	case conf.Auth != "":
		return "Basic " + conf.Auth
	}
	return ""
}

// headerOK reports whether s can be sent as a header's value.
func headerOK(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] == 0x7f {
			return false
		}
	}
	return len(s) <= maxToken+16
}

// challenge is one way to authenticate that a host offers
// (https://www.rfc-editor.org/rfc/rfc9110#section-11.6.1).
type challenge struct {
	scheme string            // lower case
	params map[string]string // names in lower case
}

func (c challenge) copy() challenge {
	p := make(map[string]string, len(c.params)+1)
	for k, v := range c.params {
		p[k] = v
	}
	return challenge{c.scheme, p}
}

// pick takes the best of the challenges that we can answer.
func pick(all []challenge) (challenge, bool) {
	for _, scheme := range []string{"bearer", "basic"} {
		for _, ch := range all {
			if ch.scheme == scheme && (scheme != "bearer" || ch.params["realm"] != "") {
				return ch, true
			}
		}
	}
	return challenge{}, false
}

// parseChallenges reads WWW-Authenticate headers, as far as they can be read.
func parseChallenges(headers []string) []challenge {
	var all []challenge
	for _, h := range headers {
		if len(h) > maxChallenge {
			h = h[:maxChallenge]
		}
		for h != "" && len(all) < maxChallenges {
			var word string
			h = strings.TrimLeft(h, " \t,")
			if word, h = takeWord(h); word == "" {
				break
			}
			rest := strings.TrimLeft(h, " \t")
			if !strings.HasPrefix(rest, "=") || len(all) == 0 {
				all = append(all, challenge{strings.ToLower(word), map[string]string{}})
				continue
			}
			var val string
			val, h = takeValue(strings.TrimLeft(rest[1:], " \t"))
			if p := all[len(all)-1].params; len(p) < maxParams {
				p[strings.ToLower(word)] = val
			}
		}
	}
	return all
}

// takeWord cuts a token from the beginning of s.
func takeWord(s string) (word, rest string) {
	i := strings.IndexFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune(`()<>@,;:\"/[]?={}`, r)
	})
	if i < 0 {
		i = len(s)
	}
	return s[:i], s[i:]
}

// takeValue cuts a parameter's value, quoted or not, from the beginning of s.
func takeValue(s string) (val, rest string) {
	if !strings.HasPrefix(s, `"`) {
		i := strings.IndexAny(s, ", \t")
		if i < 0 {
			i = len(s)
		}
		return s[:i], s[i:]
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '"':
			return b.String(), s[i+1:]
		case '\\':
			if i++; i == len(s) {
				return b.String(), ""
			}
		}
		b.WriteByte(s[i])
	}
	return b.String(), ""
}
