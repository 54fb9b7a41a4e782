package fetch

import (
	"runtime"
	"slices"
	"strconv"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// DefaultPlatform is the platform of images that this machine runs.
func DefaultPlatform() v1.Platform {
	return normalize(v1.Platform{OS: "linux", Architecture: runtime.GOARCH})
}

// architectures are other spellings, with the variant that they mean.
var architectures = map[string][2]string{
	"x86_64": {"amd64"}, "x86-64": {"amd64"}, "i386": {"386"}, "i686": {"386"},
	"aarch64": {"arm64"}, "armhf": {"arm", "v7"}, "armel": {"arm", "v6"},
}

// normalize fills in what a platform leaves out: Linux, this machine's
// architecture, the variant that the architecture means by itself.
func normalize(p v1.Platform) v1.Platform {
	n := v1.Platform{OS: strings.ToLower(p.OS), Architecture: strings.ToLower(p.Architecture), Variant: strings.ToLower(p.Variant)}
	if n.OS == "" {
		n.OS = "linux"
	}
	if n.Architecture == "" {
		n.Architecture = runtime.GOARCH
	}
	if a, ok := architectures[n.Architecture]; ok {
		n.Architecture = a[0]
		if n.Variant == "" {
			n.Variant = a[1]
		}
	}
	if n.Variant != "" && strings.Trim(n.Variant, "0123456789") == "" {
		n.Variant = "v" + n.Variant
	}
	if n.Variant == "" {
		n.Variant = map[string]string{"arm": "v7", "arm64": "v8", "amd64": "v1"}[n.Architecture]
	}
	return n
}

// suits says how well an image for have runs on want, 0 not at all. Both are
// normalized. A later variant runs what was made for an earlier one; the nearest
// is the best.
func suits(want, have v1.Platform) int {
	if want.OS != have.OS || want.Architecture != have.Architecture {
		return 0
	}
	if want.Variant == have.Variant {
		return 1000
	}
	w, ok1 := version(want.Variant)
	h, ok2 := version(have.Variant)
	if !ok1 || !ok2 || h > w {
		return 0
	}
	return 999 - (w - h)
}

// version is the number of a variant "v7" or "v8.1", ×10.
func version(variant string) (int, bool) {
	s, ok := strings.CutPrefix(variant, "v")
	major, minor, _ := strings.Cut(s, ".")
	n, err := strconv.ParseUint(major, 10, 5)
	if !ok || err != nil {
		return 0, false
	}
	m, _ := strconv.ParseUint(minor, 10, 3)
	return int(n)*10 + int(m), true
}

// attestation reports whether an index entry is no image: about another entry,
// or an artifact. (An image may have its config's type as the artifact's.)
func attestation(d v1.Descriptor) bool {
	switch types.MediaType(d.ArtifactType) {
	case "", types.OCIConfigJSON, types.DockerConfigJSON:
	default:
		return true
	}
	if d.Platform != nil && d.Platform.OS == "unknown" && d.Platform.Architecture == "unknown" {
		return true
	}
	return d.Annotations["vnd.docker.reference.type"] != ""
}

// anyPlatform reports whether an index does not say what an entry is for.
func anyPlatform(d v1.Descriptor) bool {
	return d.Platform == nil || d.Platform.OS == "" && d.Platform.Architecture == ""
}

// choose returns the index of the entry whose image suits best, the first of
// equals, or -1.
func choose(want v1.Platform, entries []v1.Descriptor) int {
	best, rank := -1, 0
	for i, d := range entries {
		if !isManifest(d.MediaType) || anyPlatform(d) || attestation(d) {
			continue
		}
		if r := suits(want, normalizeEntry(d.Platform)); r > rank {
			best, rank = i, r
		}
	}
	return best
}

// normalizeEntry is normalize for what an index says, where an empty field is
// not this machine's.
func normalizeEntry(p *v1.Platform) v1.Platform {
	if p.OS == "" || p.Architecture == "" {
		return v1.Platform{OS: "unknown"}
	}
	return normalize(*p)
}

// platforms lists what there is, for a message.
func platforms(entries []v1.Descriptor) string {
	var all []string
	for _, d := range entries {
		if anyPlatform(d) || attestation(d) {
			continue
		}
		s := d.Platform.OS + "/" + d.Platform.Architecture
		if d.Platform.Variant != "" {
			s += "/" + d.Platform.Variant
		}
		s = strings.Trim(strconv.QuoteToASCII(clip(s)), `"`)
		if !slices.Contains(all, s) {
			all = append(all, s)
		}
		if len(all) == 32 {
			all = append(all, "…")
			break
		}
	}
	if len(all) == 0 {
		return "none"
	}
	return strings.Join(all, ", ")
}
