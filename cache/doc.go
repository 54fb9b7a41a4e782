// Package cache keeps verified bytes on this disk, under a bound.
//
// Its nouns: a pack is the sparse file that holds the contents of one layer; a
// map says which chunks of a pack are here and verified; an installed file
// (layer index, tree, blob) is written once and renamed into place; the shared
// table says in which pack a content lies whole, whatever layer asks for it.
//
// Invariants:
//   - A chunk is visible only after its digest matched, or after the pass that
//     staged it matched ([Pack.Commit]).
//   - A bit on disk implies its bytes on disk, after kill -9 and after a power
//     loss: the pack is synced before a bit is written, and a cleared bit is
//     synced before its bytes are punched out.
//   - What a reader gets is what the chunk's bit promised: an eviction that
//     overlaps a read makes the read start again.
//   - Packs use at most the budget. Least recently used segments go first,
//     pinned packs and staged bytes never.
//   - Damage (checksums, short files) is a miss, never an error and never wrong bytes.
//
// The formats are drawn in docs/cache.md.
package cache
