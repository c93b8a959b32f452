package layer

import (
	"archive/tar"
	"encoding/hex"
	"errors"
	"io"
	"strings"
)

// Limits bound what one image may cost. Zero takes the default.
type Limits struct {
	// Entries bounds the entries of all layers together.
	Entries int64
	// Bytes bounds the unpacked data in bytes, holes not counted; 0 is no bound.
	Bytes int64
	// Ratio bounds what a compressed stream may grow to: Ratio times its size, and 64 MiB more.
	Ratio int64
}

// The defaults of Limits.
const (
	DefaultEntries = 2_000_000
	// DefaultRatio is a little more than gzip can reach: an empty disk compresses that well.
	DefaultRatio = 1100
)

func (l Limits) withDefaults() Limits {
	if l.Entries <= 0 {
		l.Entries = DefaultEntries
	}
	if l.Ratio <= 0 {
		l.Ratio = DefaultRatio
	}
	return l
}

// TarInfo says what reading a tar found out.
type TarInfo struct {
	// DiffID is the sha256 of every byte of the uncompressed stream, also those after the end mark.
	DiffID string
	// Bytes is the length of that stream.
	Bytes int64
	// Entries counts the members.
	Entries int64
	// Ended reports whether the archive had its end mark: one without may have been cut between two members.
	Ended bool
}

// TarOptions say how the members of a tar are taken.
type TarOptions struct {
	// Strip is a leading directory to remove; members outside it are left out.
	Strip string
	// MaxEntries bounds the members; 0 is no bound.
	MaxEntries int64
	// enc, unless nil, is what the sink writes to. What it shares with the applier is what the tar is read into.
	enc *Encoder
}

// ReadTar reads an uncompressed tar to its last byte and hands every member to sink.
func ReadTar(r io.Reader, o TarOptions, sink Sink) (*TarInfo, error) {
	h := newHashReader(r)
	if o.enc != nil && o.enc.shared != nil {
		h.share(o.enc)
		defer h.stop()
	}
	info := &TarInfo{}
	members := &tarMembers{h: h, src: tarSource{h: h}}
	for {
		hdr, content, err := members.next()
		if err == io.EOF {
			// The end mark is at least one block of zeros; without it the reader ends in the same way.
			info.Ended = h.given > members.end
			break
		}
		if err != nil {
			return nil, tarError(err)
		}
		if info.Entries++; o.MaxEntries > 0 && info.Entries > o.MaxEntries {
			return nil, Refuse("the image has more than %d files", o.MaxEntries)
		}
		e, err := tarEntry(hdr, o.Strip)
		if err != nil {
			return nil, err
		}
		if e == nil {
			continue
		}
		if err := sink(e, content); err != nil {
			return nil, tarError(err)
		}
	}
	if _, err := io.Copy(io.Discard, h); err != nil {
		return nil, tarError(err)
	}
	if err := h.finish(); err != nil {
		return nil, err
	}
	h.stop()
	info.DiffID = "sha256:" + hex.EncodeToString(h.sum())
	info.Bytes = h.n.Load()
	return info, nil
}

// tarError makes the reader's own errors presentable; other errors pass.
func tarError(err error) error {
	switch {
	case errors.Is(err, tar.ErrHeader):
		return Refuse("the archive is damaged: a member's header is wrong")
	case errors.Is(err, tar.ErrFieldTooLong):
		return Refuse("the archive has a header that is too long")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return Refuse("the archive is cut short; upload it again")
	}
	return err
}

// tarEntry translates a header; nil means the member is left out.
func tarEntry(hdr *tar.Header, strip string) (*Entry, error) {
	e := &Entry{
		Mode: uint32(hdr.Mode) & 07777, UID: clampID(hdr.Uid), GID: clampID(hdr.Gid),
		ModTime: hdr.ModTime, Linkname: hdr.Linkname,
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		e.Type, e.Size, e.Linkname = TypeRegular, hdr.Size, ""
		if strings.HasSuffix(hdr.Name, "/") {
			// v7 archives mark directories by the slash alone.
			e.Type, e.Size = TypeDirectory, 0
		}
	case tar.TypeDir:
		e.Type = TypeDirectory
	case tar.TypeSymlink:
		e.Type = TypeSymlink
	case tar.TypeLink:
		e.Type = TypeHardlink
	case tar.TypeChar:
		e.Type = TypeCharDevice
	case tar.TypeBlock:
		e.Type = TypeBlockDevice
	case tar.TypeFifo:
		e.Type = TypeFIFO
	case tar.TypeXGlobalHeader:
		return nil, nil
	default:
		return nil, Refuse("the archive has a member of the unknown type %q", hdr.Typeflag)
	}
	if e.Type == TypeCharDevice || e.Type == TypeBlockDevice {
		if hdr.Devmajor < 0 || hdr.Devminor < 0 || hdr.Devmajor > 1<<31 || hdr.Devminor > 1<<31 {
			return nil, Refuse("the archive has a device with a number that does not exist")
		}
		e.Major, e.Minor = uint32(hdr.Devmajor), uint32(hdr.Devminor)
	}
	if e.Size < 0 {
		return nil, Refuse("the archive has a file of negative size")
	}
	name, err := CleanName(hdr.Name)
	if err != nil {
		return nil, err
	}
	if e.Name, err = stripDir(name, strip), nil; strip != "" && name != strip && e.Name == name {
		return nil, nil
	}
	if e.Type == TypeHardlink {
		target, err := CleanName(hdr.Linkname)
		if err != nil {
			return nil, err
		}
		e.Linkname = stripDir(target, strip)
	}
	if e.Type == TypeSymlink && (len(e.Linkname) > MaxSymlink || e.Linkname == "" || strings.IndexByte(e.Linkname, 0) >= 0) {
		return nil, Refuse("the archive has a symlink with an impossible target")
	}
	if err := tarXattrs(hdr, e); err != nil {
		return nil, err
	}
	return e, nil
}

func stripDir(name, dir string) string {
	if dir == "" || name == dir {
		if name == dir {
			return ""
		}
		return name
	}
	if rest, ok := strings.CutPrefix(name, dir+"/"); ok {
		return rest
	}
	return name
}

// clampID turns ids that no 32 bits hold into nobody.
func clampID(id int) uint32 {
	if id < 0 || int64(id) > 1<<32-2 {
		return 65534
	}
	return uint32(id)
}

// tarXattrs takes the extended attributes from the PAX records: SCHILY.xattr (GNU tar, docker, umoci), and the
// textual ACLs of GNU tar and bsdtar.
func tarXattrs(hdr *tar.Header, e *Entry) error {
	total := 0
	for k, v := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(k, "SCHILY.xattr.")
		switch {
		case ok:
		case k == "SCHILY.acl.access", k == "SCHILY.acl.default":
			if hdr.PAXRecords["SCHILY.xattr.system.posix_acl_"+k[len("SCHILY.acl."):]] != "" {
				continue // there in the kernel's own form, which has numbers instead of names
			}
			acl, err := parseACL(v, k == "SCHILY.acl.default")
			if err != nil || acl == "" {
				continue
			}
			name, v = "system.posix_acl_"+k[len("SCHILY.acl."):], acl
		default:
			continue
		}
		if name == "" || len(name) > MaxXattrName || len(v) > MaxXattrValue || strings.IndexByte(name, 0) >= 0 {
			return Refuse("the archive has an extended attribute that is too large")
		}
		if total += len(name) + len(v); total > MaxXattrs {
			return Refuse("the archive has a file with more than %d KiB of extended attributes", MaxXattrs>>10)
		}
		if e.Xattrs == nil {
			e.Xattrs = make(map[string]string)
		}
		e.Xattrs[name] = v
	}
	return nil
}
