package images

import (
	"regexp"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

// Name is one name of an image: a repository, as a path below the mount, and a
// tag in it. docker.io/library/ubuntu:18.04 is {"ubuntu", "18.04"}. A tag that
// begins with "@" is a digest: {"ubuntu", "@sha256:…"}. The image for another
// platform than the mount's is {".imgfs/platforms/linux-arm64/ubuntu", "18.04"}.
//
// Images without a name have directories too: {".imgfs/dangling", image ID} and
// {".imgfs/chains", chain ID}, both in hexadecimal. They can be opened, but are no
// names: neither Valid nor in the catalogue's names.
type Name struct {
	Repo string // "ubuntu", "bitnami/redis", "localhost:5000/team/app"
	Tag  string
}

// Directories of the mount with images that are not in the namespace proper.
const (
	PlatformsDir = ".imgfs/platforms"
	DanglingDir  = ".imgfs/dangling"
	ChainsDir    = ".imgfs/chains"

	hiddenDir = ".imgfs"
)

// splitPlatform splits the path of a repository into the platform it is for, as
// os-arch[-variant], and the path in its registry. The platform is "" for the
// mount's own.
func splitPlatform(path string) (platform, repo string) {
	rest, ok := strings.CutPrefix(path, PlatformsDir+"/")
	if !ok {
		return "", path
	}
	platform, repo, _ = strings.Cut(rest, "/")
	return platform, repo
}

// ValidPlatform reports whether s can be a platform: os-arch[-variant].
func ValidPlatform(s string) bool { return len(s) <= maxComponent && platformRE.MatchString(s) }

// Registry is n without the directory of its platform: what its registry knows.
func (n Name) Registry() Name {
	_, n.Repo = splitPlatform(n.Repo)
	return n
}

// String is the reference as docker writes it.
func (n Name) String() string {
	if n.IsDigest() {
		return n.Repo + n.Tag
	}
	return n.Repo + ":" + n.Tag
}

// IsDigest reports whether n names an image by its digest.
func (n Name) IsDigest() bool { return strings.HasPrefix(n.Tag, "@") }

// The grammars of https://github.com/distribution/reference: a component of a
// repository's path, a tag, a digest, a host with an optional port.
var (
	componentRE = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$`)
	tagRE       = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)
	platformRE  = regexp.MustCompile(`^[a-z0-9]+-[a-z0-9_]+(?:-[a-z0-9.]+)?$`)
	hexRE       = regexp.MustCompile(`^[0-9a-f]{64}$`)
	prefixRE    = regexp.MustCompile(`^[0-9a-f]{1,64}$`)
	digestRE    = regexp.MustCompile(`^@sha256:[0-9a-f]{64}$`)
	hostRE      = regexp.MustCompile(`^(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?$`)
)

const (
	maxRepo      = 255 // the longest repository path, distribution's limit for a name
	maxComponent = 128 // and one component of it; no registry is known to take more
)

// ValidComponent reports whether s can be a component of a repository's path.
func ValidComponent(s string) bool { return len(s) <= maxComponent && componentRE.MatchString(s) }

// ValidTag reports whether s can be a tag, or a digest written "@sha256:…".
func ValidTag(s string) bool { return tagRE.MatchString(s) || digestRE.MatchString(s) }

// ValidHost reports whether s, the first component of a path, is a registry: it
// has a dot or a port, or is "localhost".
//
// "redis:7" and "myhost:5000" look alike: behind a name without a dot a number
// from 1024 on is taken for a port, everything else for a tag.
func ValidHost(s string) bool {
	if len(s) > maxRepo || !hostRE.MatchString(s) {
		return false
	}
	if strings.HasPrefix(s, "[") {
		return true
	}
	host, port, hasPort := strings.Cut(s, ":")
	known := host == "localhost" || strings.Contains(host, ".")
	if !hasPort {
		return known
	}
	p, err := strconv.Atoi(port)
	return err == nil && p > 0 && p <= 65535 && (known || p >= 1024)
}

// SplitHost splits a path below the mount into its registry ("" for Docker Hub)
// and the rest.
func SplitHost(path string) (host, rest string) {
	first, rest, _ := strings.Cut(path, "/")
	if ValidHost(first) {
		return first, rest
	}
	return "", path
}

// repository is the field's name of a path: a ggcr repository.
func repository(path string) (name.Repository, error) {
	_, path = splitPlatform(path)
	return name.NewRepository(path)
}

// reference is the field's name of n.
func (n Name) reference() (name.Reference, error) {
	repo, err := repository(n.Repo)
	if err != nil {
		return nil, err
	}
	if n.IsDigest() {
		return repo.Digest(n.Tag[1:]), nil
	}
	return repo.Tag(n.Tag), nil
}

// Valid reports whether n can name an image at all.
func (n Name) Valid() bool { return ValidTag(n.Tag) && ValidRepo(n.Repo) }

// ValidRepo reports whether path can be a repository, of the mount's platform or
// below the directory of another. Docker Hub has none deeper than two components.
func ValidRepo(path string) bool {
	if platform, repo := splitPlatform(path); repo != path {
		if !ValidPlatform(platform) {
			return false
		}
		path = repo
	}
	host, rest := SplitHost(path)
	if rest == "" || len(path) > maxRepo {
		return false
	}
	comps := strings.Split(rest, "/")
	if host == "" && len(comps) > 2 {
		return false
	}
	for _, c := range comps {
		if !ValidComponent(c) {
			return false
		}
	}
	return true
}

// A key is a name as the catalogue sorts it: components joined by 0x01, then
// 0x00 and the tag. Both bytes sort below every character of a name, so that all
// that is below one path is contiguous.
const (
	keyComponent = "\x01"
	keyTag       = "\x00"
)

func pathKey(path string) string { return strings.ReplaceAll(path, "/", keyComponent) }

func (n Name) key() []byte { return []byte(pathKey(n.Repo) + keyTag + n.Tag) }

func parseKey(k []byte) Name {
	path, tag, _ := strings.Cut(string(k), keyTag)
	return Name{Repo: strings.ReplaceAll(path, keyComponent, "/"), Tag: tag}
}
