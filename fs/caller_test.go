package fs

import "testing"

func TestPasses(t *testing.T) {
	for _, c := range []struct {
		mkdir, path string
		want        bool
	}{
		{"/mnt/images/bitnami/redis/7.2", "bitnami", true},
		{"/mnt/images/bitnami/redis/7.2", "bitnami/redis", true},
		{"/mnt/images/bitnami/redis/7.2", "bitnami/redis/7.2", false},
		{"/mnt/images/bitnami/redis/7.2/", "bitnami/redis/7.2", false},
		{"redis/7.2", "bitnami/redis", true},
		{"./redis//7.2", "bitnami/redis/7.2", false},
		{"7.2", "bitnami/redis/7.2", false},
		{"/m/h/a/a/v1", "h/a", true},
		{"/m/h/a/a/v1", "h/a/a", true},
		{"/m/h/a/a/v1", "h/a/a/v1", false},
		{"/m/docker.io/library/redis/7", "redis", true},
		{"/m/docker.io/library/redis/7", "redis/7", false},
		{"../x/y", "x", false}, // not known
		{"", "x", false},       // not known
	} {
		if got := (change{any: true, path: c.mkdir}).passes(c.path); got != c.want {
			t.Errorf("passes(mkdir %q, %q) = %v, want %v", c.mkdir, c.path, got, c.want)
		}
	}
}
