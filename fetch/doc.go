// Package fetch brings bytes from registries.
//
// A [Client] turns a reference into an [Image] (manifest, config, layers'
// descriptors, all of them checked against their digests) and a descriptor into
// a [Blob], whose bytes come by single ranges or as one stream. It speaks the
// OCI distribution protocol
// (https://github.com/opencontainers/distribution-spec/blob/main/spec.md),
// knows the mirrors of certs.d/*/hosts.toml, and keeps these promises:
//
//   - Requests are bounded: in number per host ([Priority]), in time (the
//     context's deadline, [Options].Timeout, silence), in attempts, and in the
//     size of everything that is kept in memory.
//   - Credentials go to the host that they are for, follow no redirect to
//     another one, and appear in no error.
//   - A manifest and a config that came through Resolve match their digests. The
//     bytes of a Blob are the registry's word: whoever reads them checks them.
//   - Every error is an [*Error] whose kind is found by errors.Is.
//
// The other half of the package reads what the bytes are: the layer formats.
// docs/registries.md tells users what is done with hosts, mirrors, credentials
// and failures.
package fetch
