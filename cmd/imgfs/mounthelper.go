package main

import (
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/spf13/pflag"
)

// helperFlags are mount options of mount(8) and fstab that say nothing to imgfs:
// others act on them, or they are how an imgfs mount is anyway.
var helperFlags = []string{
	"rw", "defaults", "auto", "noauto", "nofail", "_netdev", "user", "users", "nouser", "owner", "group",
	"exec", "nodev", "nosuid", "async", "atime", "noatime", "relatime", "norelatime", "diratime", "nodiratime",
}

// helperArgs turns the call of a mount helper, `mount.fuse.imgfs SRC DIR [-sfnv]
// [-o k=v,…]`, into arguments of imgfs. An option is a flag of mount without its
// dashes; allow_other is understood too.
func helperArgs(args []string) ([]string, error) {
	var names, options []string
	for i := 0; i < len(args); i++ {
		switch arg := args[i]; {
		case arg == "-o" && i+1 < len(args):
			i++
			options = append(options, strings.Split(args[i], ",")...)
		case strings.HasPrefix(arg, "-o") && len(arg) > 2:
			options = append(options, strings.Split(arg[2:], ",")...)
		case arg == "-t" && i+1 < len(args):
			i++
		case arg == "-n" || arg == "-v" || arg == "-s":
		case strings.HasPrefix(arg, "-"):
			return nil, fmt.Errorf("unknown flag %q", arg)
		default:
			names = append(names, arg)
		}
	}
	if len(names) != 2 {
		return nil, errors.New("usage: mount.fuse.imgfs SOURCE DIR [-o KEY=VALUE,…]")
	}
	out := []string{"mount", "--source=" + names[0]}
	keys := new(config).keys()
	for _, option := range options {
		flag, err := helperOption(keys, option)
		if err != nil {
			return nil, err
		}
		if flag != "" {
			out = append(out, flag)
		}
	}
	return append(out, "--", names[1]), nil
}

// helperOption is the flag for one mount option; "" for one to be ignored.
func helperOption(keys *pflag.FlagSet, option string) (string, error) {
	key, _, hasValue := strings.Cut(option, "=")
	if option == "" || slices.Contains(helperFlags, option) || strings.HasPrefix(key, "x-") || key == "comment" {
		return "", nil
	}
	name := strings.ReplaceAll(key, "_", "-")
	flag := keys.Lookup(name)
	if flag == nil {
		var known []string
		keys.VisitAll(func(f *pflag.Flag) { known = append(known, f.Name) })
		sort.Strings(known)
		return "", fmt.Errorf("unknown option %q; known are %s", key, strings.Join(known, ", "))
	}
	if !hasValue && flag.NoOptDefVal == "" {
		return "", fmt.Errorf("option %q needs a value", key)
	}
	return "--" + name + option[len(key):], nil
}
