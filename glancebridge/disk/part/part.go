// Package part reads partition tables: GPT (UEFI specification, chapter 5) and the PC's MBR with its chain of extended
// partitions.
package part

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"unicode/utf16"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

var le = binary.LittleEndian

// Partition is a piece of a disk, in bytes. Type is a GUID in capitals, or the MBR's number as "0x83".
type Partition struct {
	Number int
	Type   string
	Name   string
	Off    int64
	Size   int64
}

// Root says whether the type is one of the "Linux root" GUIDs (the Discoverable Partitions Specification), whatever
// the architecture.
func (p Partition) Root() bool { return rootTypes[p.Type] }

var rootTypes = map[string]bool{
	"44479540-F297-41B2-9AF7-D131D5F0458A": true, // x86
	"4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709": true, // x86-64
	"69DAD710-2CE4-4E3C-B16C-21A1D49ABED3": true, // arm
	"B921B045-1DF0-41C3-AF44-4C6F280D3FAE": true, // arm64
	"993D8D3D-F80E-4225-855A-9DAF8ED7EA97": true, // ia64
	"77055800-792C-4F94-B39A-98C91B762BB6": true, // loongarch64
	"912ADE1D-A839-4913-8964-A10EEE08FBD2": true, // ppc64
	"C31C45E6-3F39-412E-80FB-4809C4980599": true, // ppc64le
	"60D5A7FE-8E7D-435C-B714-3DD8162144E1": true, // riscv32
	"72EC70A6-CF74-40E6-BD49-4BDA08E8F224": true, // riscv64
	"08A7ACEA-624C-4A20-91E8-6E0FA67D23F9": true, // s390
	"5EEAD9A9-FE09-4A1E-A1D7-520D00531306": true, // s390x
}

// Table is what kind of table a disk has.
type Table string

// The kinds of table.
const (
	None Table = ""
	GPT  Table = "gpt"
	MBR  Table = "mbr"
)

const (
	mbrSize    = 512
	maxChain   = 64
	maxEntries = 1024
)

// Read gives the partitions of a disk, empty entries left out. None is returned for a disk without the MBR's mark, and
// for one whose MBR has no partition.
func Read(d blockio.Disk) (Table, []Partition, error) {
	if d.Size() < mbrSize {
		return None, nil, nil
	}
	b := make([]byte, mbrSize)
	if _, err := d.ReadAt(b, 0); err != nil {
		return None, nil, err
	}
	if b[510] != 0x55 || b[511] != 0xAA {
		return None, nil, nil
	}
	used := false
	for k := range 4 {
		switch e := b[446+16*k:]; e[4] {
		case 0xEE:
			ps, err := gpt(d)
			return GPT, ps, err
		case 0:
		default:
			// The start of a boot sector has the mark too; its code reads as entries with other flags.
			if e[0]&0x7F != 0 {
				return None, nil, nil
			}
			used = used || le.Uint32(e[12:]) != 0
		}
	}
	if !used {
		return None, nil, nil
	}
	ps, err := mbr(d, b)
	return MBR, ps, err
}

func mbr(d blockio.Disk, b []byte) ([]Partition, error) {
	var all []Partition
	for k := range 4 {
		e := b[446+16*k:]
		start, count := int64(le.Uint32(e[8:])), int64(le.Uint32(e[12:]))
		if e[4] == 0 || count == 0 {
			continue
		}
		if !extended(e[4]) {
			all = append(all, Partition{Number: k + 1, Type: fmt.Sprintf("0x%02x", e[4]), Off: start * 512, Size: count * 512})
			continue
		}
		logical, err := chain(d, start)
		if err != nil {
			return nil, err
		}
		all = append(all, logical...)
	}
	return all, nil
}

func extended(kind byte) bool { return kind == 0x05 || kind == 0x0F || kind == 0x85 }

// chain follows the extended partition that begins at sector base.
func chain(d blockio.Disk, base int64) ([]Partition, error) {
	var all []Partition
	b := make([]byte, mbrSize)
	for at, n := base, 0; ; n++ {
		if n == maxChain {
			return nil, verdict.Damaged("the extended partition has more than %d parts", maxChain)
		}
		if _, err := d.ReadAt(b, at*512); err != nil {
			return nil, err
		}
		if b[510] != 0x55 || b[511] != 0xAA {
			return nil, verdict.Damaged("the extended partition is broken at sector %d", at)
		}
		if e := b[446:]; e[4] != 0 && le.Uint32(e[12:]) != 0 {
			all = append(all, Partition{
				Number: 5 + len(all), Type: fmt.Sprintf("0x%02x", e[4]),
				Off: (at + int64(le.Uint32(e[8:]))) * 512, Size: int64(le.Uint32(e[12:])) * 512,
			})
		}
		next := b[462:]
		if !extended(next[4]) || le.Uint32(next[12:]) == 0 {
			return all, nil
		}
		to := base + int64(le.Uint32(next[8:]))
		if to <= at {
			return nil, verdict.Damaged("the extended partition goes back from sector %d to %d", at, to)
		}
		at = to
	}
}

// gpt tries the header behind the first sector, then the one in the last, with sectors of 512 and 4096 bytes.
func gpt(d blockio.Disk) ([]Partition, error) {
	var first error
	for _, sector := range []int64{512, 4096} {
		for _, at := range []int64{sector, d.Size()/sector*sector - sector} {
			ps, ok, err := gptAt(d, at, sector)
			if ok {
				return ps, nil
			}
			if err != nil && first == nil {
				first = err
			}
		}
	}
	if first == nil {
		first = verdict.Damaged("the disk is marked GPT but has no GPT header")
	}
	return nil, first
}

func gptAt(d blockio.Disk, at, sector int64) ([]Partition, bool, error) {
	if !blockio.Inside(at, sector, d.Size()) || at < sector {
		return nil, false, nil
	}
	h := make([]byte, sector)
	if _, err := d.ReadAt(h, at); err != nil {
		return nil, false, err
	}
	if string(h[:8]) != "EFI PART" {
		return nil, false, nil
	}
	size := int64(le.Uint32(h[12:]))
	if size < 92 || size > sector {
		return nil, false, verdict.Damaged("the GPT header has %d bytes", size)
	}
	want := le.Uint32(h[16:])
	clear(h[16:20])
	if crc32.ChecksumIEEE(h[:size]) != want || int64(le.Uint64(h[24:])) != at/sector {
		return nil, false, verdict.Damaged("the checksum of the GPT header is wrong")
	}
	n, each := int64(le.Uint32(h[80:])), int64(le.Uint32(h[84:]))
	if n > maxEntries || each < 128 || each > 4096 || each&(each-1) != 0 {
		return nil, false, verdict.Damaged("the GPT has %d entries of %d bytes", n, each)
	}
	lba := le.Uint64(h[72:])
	if lba > uint64(d.Size()/sector) {
		return nil, false, verdict.Cut("the GPT's entries are at sector %d", lba)
	}
	b := make([]byte, n*each)
	if _, err := d.ReadAt(b, int64(lba)*sector); err != nil {
		return nil, false, err
	}
	if crc32.ChecksumIEEE(b) != le.Uint32(h[88:]) {
		return nil, false, verdict.Damaged("the checksum of the GPT's entries is wrong")
	}
	var all []Partition
	for k := range n {
		e := b[k*each:]
		from, to := le.Uint64(e[32:]), le.Uint64(e[40:])
		kind := guid(e)
		if kind == "00000000-0000-0000-0000-000000000000" {
			continue
		}
		if from > to || to >= 1<<50 || from == 0 {
			return nil, false, verdict.Damaged("GPT partition %d lies at sectors %d to %d", k+1, from, to)
		}
		all = append(all, Partition{
			Number: int(k) + 1, Type: kind, Name: name(e[56:128]),
			Off: int64(from) * sector, Size: int64(to-from+1) * sector,
		})
	}
	return all, true, nil
}

func guid(b []byte) string {
	return fmt.Sprintf("%08X-%04X-%04X-%X-%X", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

func name(b []byte) string {
	var u []uint16
	for ; len(b) >= 2 && le.Uint16(b) != 0; b = b[2:] {
		u = append(u, le.Uint16(b))
	}
	return string(utf16.Decode(u))
}
