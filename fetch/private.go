package fetch

import (
	"fmt"
	iofs "io/fs"
	"net/netip"
	"slices"
)

// metadata are addresses, beside the link-local ones, at which clouds answer every
// process of a machine, some with the machine's credentials: AWS and Google by IPv6,
// Alibaba, Oracle, Azure.
var metadata = []netip.Addr{
	netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("fd00:ec2::23"), netip.MustParseAddr("fd20:ce::254"), netip.MustParseAddr("100.100.100.200"),
	netip.MustParseAddr("192.0.0.192"), netip.MustParseAddr("168.63.129.16"),
}

var errPrivate = fmt.Errorf("an address of this link or of a metadata service is not asked: %w", iofs.ErrPermission)

// mayDial refuses an address (with a port or without) that no registry has, and that
// is dangerous to ask, unless allow names it as it is: whoever can make a name
// resolve, or a path walked, chooses what is asked. A host that is no address may be
// asked; what it resolves to is looked at when it is dialled.
func mayDial(allow []string, addr string) error {
	host := hostname(addr)
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return nil
	}
	ip = ip.Unmap()
	if !ip.IsLinkLocalUnicast() && !ip.IsMulticast() && !ip.IsUnspecified() && !slices.Contains(metadata, ip) {
		return nil
	}
	if slices.ContainsFunc(allow, func(name string) bool { return hostname(name) == host }) {
		return nil
	}
	return fmt.Errorf("%w: %s; --registry-allow %s would let it be", errPrivate, ip, ip)
}
