package layer

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"io"
	"time"
)

// tarBlock is the unit of a tar in bytes.
const tarBlock = 512

// tarMembers goes through the members of a tar. The headers that nearly all members have are read here, without the dozen
// allocations that archive/tar makes for each; every other one is archive/tar's, and so is what is wrong.
type tarMembers struct {
	h   *hashReader
	src tarSource
	// end is where the member before ended, with its padding.
	end int64

	hdr   tar.Header // of the member at hand, if it was read here
	rest  *tar.Reader
	plain tarContent
}

// next goes to the next member. Its content may be read in part. io.EOF is the end, with or without its mark.
func (t *tarMembers) next() (hdr *tar.Header, content io.Reader, err error) {
	if err := t.skip(); err != nil {
		return nil, nil, err
	}
	t.end = (t.h.given + tarBlock - 1) &^ (tarBlock - 1)
	if err := t.pad(); err != nil {
		return nil, nil, err
	}
	t.plain = tarContent{src: &t.src}
	if b := t.block(); b != nil && plainHeader(b, &t.hdr) {
		t.h.advance(tarBlock)
		if t.hdr.Typeflag == tar.TypeReg {
			t.plain.left = t.hdr.Size
		}
		return &t.hdr, &t.plain, nil
	}
	t.rest = tar.NewReader(&t.src)
	if hdr, err = t.rest.Next(); err != nil {
		return nil, nil, err
	}
	if hdr.Typeflag == tar.TypeReg && !isSparse(hdr) {
		t.plain.left = hdr.Size
		return hdr, &t.plain, nil
	}
	return hdr, t.rest, nil
}

// skip goes to the end of the member at hand.
func (t *tarMembers) skip() error {
	if err := t.plain.skip(); err != nil {
		return err
	}
	if t.rest != nil {
		if _, err := io.Copy(io.Discard, t.rest); err != nil {
			return err
		}
	}
	t.rest, t.src.taken = nil, 0
	return nil
}

// pad goes over what fills the last block of a member. As for archive/tar, an archive may end there.
func (t *tarMembers) pad() error {
	for t.h.given%tarBlock != 0 {
		if err := t.h.fill(); err != nil {
			return err
		}
		t.h.advance(min(len(t.h.have), int(-t.h.given&(tarBlock-1))))
	}
	return nil
}

// block gives the next block without taking it, or nil when archive/tar has to look.
func (t *tarMembers) block() []byte {
	if t.h.join(tarBlock) != nil || len(t.h.have) < tarBlock {
		return nil
	}
	return t.h.have[:tarBlock]
}

// plainHeader reads the header of a file, a directory or a link, and reports whether archive/tar would read the same: ustar
// or GNU, octal numbers, none of the records that would come before it. POSIX.1-2017, pax, ustar Interchange Format; for
// GNU's the manual of GNU tar, Basic Tar Format.
func plainHeader(b []byte, h *tar.Header) bool {
	*h = tar.Header{Typeflag: b[156]}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink:
	default:
		return false
	}
	var prefix []byte
	switch string(b[257:265]) {
	case "ustar\x0000":
		if string(b[508:]) == "tar\x00" {
			return false // star's own fields
		}
		prefix = text(b[345:500])
	case "ustar  \x00":
		if b[345] != 0 || b[357] != 0 {
			return false // times of access and change, or what an old mistake of archive/tar put there
		}
	default:
		return false
	}
	var mode, uid, gid, mtime, sum, dev int64
	for _, f := range [...]struct {
		to  *int64
		has []byte
	}{
		{&mode, b[100:108]}, {&uid, b[108:116]}, {&gid, b[116:124]}, {&h.Size, b[124:136]}, {&mtime, b[136:148]},
		{&sum, b[148:156]}, {&dev, b[329:337]}, {&dev, b[337:345]},
	} {
		var ok bool
		if *f.to, ok = digits(f.has); !ok {
			return false
		}
	}
	if sum != checksum(b) {
		return false
	}
	h.Mode, h.Uid, h.Gid, h.ModTime = mode, int(uid), int(gid), time.Unix(mtime, 0)
	h.Name, h.Linkname = string(text(b[:100])), string(text(b[157:257]))
	if len(prefix) > 0 {
		h.Name = string(prefix) + "/" + h.Name
	}
	return true
}

// text is a field up to its NUL byte, if it has one.
func text(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i]
	}
	return b
}

// digits reads an octal number that only spaces and NUL bytes follow; none at all are 0. A field has too few for an overflow.
func digits(b []byte) (n int64, ok bool) {
	for len(b) > 0 && b[0]-'0' < 8 {
		n, b = n<<3|int64(b[0]-'0'), b[1:]
	}
	for _, c := range b {
		if c != 0 && c != ' ' {
			return 0, false
		}
	}
	return n, true
}

// checksum is the sum of all bytes, where those of the checksum itself count as spaces.
func checksum(b []byte) int64 {
	const each = 0x00ff00ff00ff00ff
	var lanes uint64 // of 16 bits; they hold that of 128 bytes each
	for i := 0; i < tarBlock; i += 8 {
		v := binary.LittleEndian.Uint64(b[i:])
		if i == 148&^7 {
			v = v&(1<<32-1) | 0x20202020<<32
		} else if i == 152&^7 {
			v = v&^(1<<32-1) | 0x20202020
		}
		lanes += v&each + v>>8&each
	}
	return int64(lanes&0xffff + lanes>>16&0xffff + lanes>>32&0xffff + lanes>>48)
}
