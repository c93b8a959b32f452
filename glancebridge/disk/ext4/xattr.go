package ext4

import (
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

const (
	xattrMagic = 0xEA020000

	indexUser       = 1
	indexACLAccess  = 2
	indexACLDefault = 3
	indexTrusted    = 4
	indexSecurity   = 6
	indexSystem     = 7
	indexRichACL    = 8
)

// Bounds on the attributes of one inode, in bytes: the kernel's for a value, ours for all.
const (
	maxValue = 64 << 10
	maxAll   = 256 << 10
)

func (f *FS) xattrs(i *inode) (map[string]string, error) {
	var all map[string]string
	size := 0
	add := func(index byte, name, value []byte) error {
		var key string
		switch index {
		case indexUser:
			key = "user." + string(name)
		case indexACLAccess, indexACLDefault:
			list, ok := acl(value)
			if !ok {
				return verdict.Damaged("ext4: inode %d has a broken access list", i.no)
			}
			key, value = "system.posix_acl_access", list
			if index == indexACLDefault {
				key = "system.posix_acl_default"
			}
		case indexTrusted:
			key = "trusted." + string(name)
		case indexSecurity:
			key = "security." + string(name)
		case indexSystem:
			if string(name) == "data" {
				return nil // a small file's contents
			}
			key = "system." + string(name)
		case indexRichACL:
			key = "system.richacl"
		default:
			return nil // not visible through the kernel either
		}
		if size += len(key) + len(value); size > maxAll {
			return verdict.Limit("ext4: inode %d has more than %d bytes of extended attributes", i.no, maxAll)
		}
		if all == nil {
			all = make(map[string]string)
		}
		all[key] = string(value)
		return nil
	}
	if err := f.eachInner(i, add); err != nil {
		return nil, err
	}
	if i.acl == 0 {
		return all, nil
	}
	b, err := f.block(i.acl)
	if err != nil {
		return nil, err
	}
	if le.Uint32(b) != xattrMagic || le.Uint32(b[8:]) != 1 {
		return nil, verdict.Damaged("ext4: the attribute block of inode %d is broken", i.no)
	}
	return all, f.each(i, b[32:], b, add)
}

// eachInner goes through the attributes within the inode.
func (f *FS) eachInner(i *inode, add func(index byte, name, value []byte) error) error {
	at := 128 + i.extra()
	if i.extra() == 0 || len(i.raw)-at < 8 || le.Uint32(i.raw[at:]) != xattrMagic {
		return nil
	}
	b := i.raw[at+4:]
	return f.each(i, b, b, add)
}

// each goes through a list of entries; their values lie at offsets into base.
func (f *FS) each(i *inode, list, base []byte, add func(index byte, name, value []byte) error) error {
	for len(list) >= 4 && le.Uint32(list) != 0 {
		if len(list) < 16 || len(list) < 16+int(list[0]) {
			return verdict.Damaged("ext4: inode %d has a broken attribute", i.no)
		}
		length, index := int(list[0]), list[1]
		at, inum, size := int(le.Uint16(list[2:])), le.Uint32(list[4:]), int64(le.Uint32(list[8:]))
		name := list[16 : 16+length]
		list = list[min(len(list), (16+length+3)&^3):]
		if size > maxValue {
			return verdict.Damaged("ext4: inode %d has an attribute of %d bytes", i.no, size)
		}
		var value []byte
		if inum != 0 {
			v, err := f.eaInode(i, inum, size)
			if err != nil {
				return err
			}
			value = v
		} else if size > 0 {
			if int64(at)+size > int64(len(base)) {
				return verdict.Damaged("ext4: inode %d has a broken attribute", i.no)
			}
			value = base[at : at+int(size)]
		}
		if err := add(index, name, value); err != nil {
			return err
		}
	}
	return nil
}

// eaInode reads a value that has an inode of its own.
func (f *FS) eaInode(i *inode, no uint32, size int64) ([]byte, error) {
	if f.incompat&incompatEAInode == 0 {
		return nil, verdict.Damaged("ext4: inode %d has a broken attribute", i.no)
	}
	v, err := f.inode(no)
	if err != nil {
		return nil, err
	}
	if v.flags&flagEAInode == 0 || v.size != size || le.Uint16(v.raw)&0xF000 != 0x8000 || v.flags&flagInline != 0 {
		return nil, verdict.Damaged("ext4: inode %d has an attribute in inode %d, which holds none", i.no, no)
	}
	return f.contents(v)
}

// acl turns an access list from the form on disk into that of the system.posix_acl_* attributes.
func acl(b []byte) ([]byte, bool) {
	if len(b) < 4 || le.Uint32(b) != 1 {
		return nil, false
	}
	out := le.AppendUint32(nil, 2)
	for b = b[4:]; len(b) > 0; {
		if len(b) < 4 {
			return nil, false
		}
		tag, perm, id := le.Uint16(b), le.Uint16(b[2:]), ^uint32(0)
		b = b[4:]
		switch tag {
		case 0x02, 0x08: // named user, named group
			if len(b) < 4 {
				return nil, false
			}
			id, b = le.Uint32(b), b[4:]
		case 0x01, 0x04, 0x10, 0x20: // owner, group, mask, others
		default:
			return nil, false
		}
		out = le.AppendUint16(out, tag)
		out = le.AppendUint16(out, perm)
		out = le.AppendUint32(out, id)
	}
	return out, true
}
