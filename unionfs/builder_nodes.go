package unionfs

import "hash/maphash"

// find returns 1 + the node of a name in a directory, or 0.
func (b *Builder) find(dir uint32, name string) uint32 {
	h := b.hash(dir, name)
	for n := b.nodeTab.first(h); n != 0; {
		r := b.nodes.at(n-1, nodeSize)
		if get32(r, nodeHash) == h && get32(r, nodeParent) == dir &&
			string(b.name(get32(r, childName), uint32(r[childLen]))) == name {
			return n
		}
		n = get32(r, nodeNext)
	}
	return 0
}

// hash is that of a name in a directory. Its seed is random, so that no archive
// can make long chains.
func (b *Builder) hash(dir uint32, name string) uint32 {
	h := maphash.String(b.seed, name) ^ (uint64(dir)+1)*0x9e3779b97f4a7c15
	return uint32(h ^ h>>32)
}

// newNode makes a name in a directory and returns 1 + its node.
func (b *Builder) newNode(dir uint32, name string) (uint32, error) {
	i := b.nodes.count(nodeSize)
	if i >= MaxEntries {
		return 0, refusal("too many entries")
	}
	off, err := b.addName(name)
	if err != nil {
		return 0, err
	}
	grown, err := b.nodeTab.fit(i)
	if err != nil {
		return 0, err
	}
	if grown {
		for k := range i {
			if r := b.nodes.at(k, nodeSize); r[childKind] != byte(ChildNone) {
				b.chain(k+1, r)
			}
		}
	}
	r, err := b.nodes.grow(nodeSize)
	if err != nil {
		return 0, err
	}
	d := b.dirs.at(dir, dirSize)
	put32(r, childName, off)
	r[childLen] = byte(len(name))
	put32(r, nodeParent, dir)
	put32(r, nodeSib, get32(d, dirFirst))
	put32(r, nodeHash, b.hash(dir, name))
	b.chain(i+1, r)
	put32(d, dirFirst, i+1)
	put32(d, dirCount, get32(d, dirCount)+1)
	b.live++
	return i + 1, nil
}

// chain puts node n (1 + its number) first in its hash chain.
func (b *Builder) chain(n uint32, r []byte) {
	slot := b.nodeTab.slot(get32(r, nodeHash))
	put32(r, nodeNext, *slot)
	*slot = n
}

// unchain takes node n (1 + its number) out of its hash chain.
func (b *Builder) unchain(n uint32) {
	r := b.nodes.at(n-1, nodeSize)
	slot := b.nodeTab.slot(get32(r, nodeHash))
	if *slot == n {
		*slot = get32(r, nodeNext)
		return
	}
	for m := *slot; m != 0; {
		before := b.nodes.at(m-1, nodeSize)
		if m = get32(before, nodeNext); m == n {
			put32(before, nodeNext, get32(r, nodeNext))
			return
		}
	}
}

// addName puts bytes on the name heap and returns where.
func (b *Builder) addName(s string) (uint32, error) {
	if b.names.n+int64(len(s)) > MaxNameHeap {
		return 0, refusal("names too long together")
	}
	off := b.names.n
	m, err := b.names.grow(int64(len(s)))
	if err != nil {
		return 0, err
	}
	copy(m, s)
	return uint32(off), nil
}
