package btrfs

import (
	"cmp"
	"slices"
	"sort"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

const (
	chunkHead   = 48
	stripeSize  = 32
	profileDup  = 0x20
	profileMask = 0x7F8 // of the redundant and striped kinds
)

// chunk maps a range of logical addresses to the disk.
type chunk struct {
	from, size uint64
	at         uint64 // byte of the disk
}

// readChunks begins with the chunks in the superblock, which hold the tree with the others.
func (f *FS) readChunks(s []byte) error {
	size := le.Uint32(s[160:])
	if size > arraySize {
		return verdict.Damaged("btrfs: the superblock's chunks have %d bytes", size)
	}
	for b := s[arrayOff : arrayOff+size]; len(b) > 0; {
		if len(b) < keySize+chunkHead {
			return verdict.Damaged("btrfs: the superblock's chunks are broken")
		}
		used, err := f.chunk(parseKey(b).offset, b[keySize:])
		if err != nil {
			return err
		}
		b = b[keySize+used:]
	}
	f.sortChunks()
	var more []chunk
	old := f.chunks
	c := f.cursor(pointer{at: le.Uint64(s[88:]), level: int(s[199])})
	for ok, err := c.seek(key{objectid: chunkTreeObject, kind: kindChunk}); ; ok, err = c.next() {
		if err != nil {
			return err
		}
		if !ok || c.key.kind != kindChunk {
			break
		}
		f.chunks = more
		_, err := f.chunk(c.key.offset, c.data)
		more, f.chunks = f.chunks, old
		if err != nil {
			return err
		}
		if len(more) > maxChunks {
			return verdict.Limit("btrfs: the file system has more than %d chunks", maxChunks)
		}
	}
	f.chunks = more
	f.sortChunks()
	return nil
}

func (f *FS) sortChunks() {
	slices.SortFunc(f.chunks, func(a, b chunk) int { return cmp.Compare(a.from, b.from) })
}

// chunk adds a chunk and gives the length of its item.
func (f *FS) chunk(from uint64, b []byte) (int, error) {
	if len(b) < chunkHead {
		return 0, verdict.Damaged("btrfs: a chunk is broken")
	}
	size, profile, stripes := le.Uint64(b), le.Uint64(b[24:])&profileMask, int(le.Uint16(b[44:]))
	used := chunkHead + stripes*stripeSize
	if stripes == 0 || used > len(b) {
		return 0, verdict.Damaged("btrfs: a chunk is broken")
	}
	if stripes > 1 && profile != profileDup {
		return 0, verdict.Unsupported(plainBackup, "btrfs: the file system is striped or mirrored")
	}
	at := le.Uint64(b[chunkHead+8:])
	if le.Uint64(b[chunkHead:]) != f.devid {
		return 0, verdict.Unsupported(plainBackup, "btrfs: a part of the file system is on another device")
	}
	if size > 1<<56 || from > 1<<62 || at > 1<<62 || !blockio.Inside(int64(at), int64(size), f.d.Size()) {
		return 0, verdict.Cut("btrfs: a chunk lies at byte %d of %d", at, f.d.Size())
	}
	f.chunks = append(f.chunks, chunk{from: from, size: size, at: at})
	return used, nil
}

// physical is the byte of the disk of n bytes at a logical address.
func (f *FS) physical(logical uint64, n int64) (int64, error) {
	k := sort.Search(len(f.chunks), func(k int) bool { return f.chunks[k].from > logical })
	if k > 0 {
		c := f.chunks[k-1]
		if in := logical - c.from; in < c.size && uint64(n) <= c.size-in {
			return int64(c.at + in), nil
		}
	}
	return 0, verdict.Damaged("btrfs: %d bytes at the address %d are wanted", n, logical)
}
