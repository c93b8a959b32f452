package xfs

import (
	"encoding/binary"

	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

const (
	attrLocal      = 0x1
	attrRoot       = 0x2
	attrSecure     = 0x4
	attrParent     = 0x8
	attrIncomplete = 0x80

	attrLeafV4 = 0xFBEE
	attrLeafV5 = 0x3BEE
	attrNodeV4 = 0xFEBE
	attrNodeV5 = 0x3EBE

	maxValue  = 64 << 10
	maxAll    = 256 << 10
	maxLeaves = 4096
)

// attributes collects those of one inode.
type attributes struct {
	i    *inode
	all  map[string]string
	size int
}

func (a *attributes) add(flags byte, name, value []byte) error {
	if flags&(attrParent|attrIncomplete) != 0 {
		return nil
	}
	var key string
	switch {
	case flags&attrSecure != 0:
		key = "security." + string(name)
	case flags&attrRoot != 0:
		key = "trusted." + string(name)
		if k := aclNames[key]; k != "" {
			list, ok := acl(value)
			if !ok {
				return verdict.Damaged("xfs: inode %d has a broken access list", a.i.no)
			}
			key, value = k, list
		}
	default:
		key = "user." + string(name)
	}
	if a.size += len(key) + len(value); a.size > maxAll {
		return verdict.Limit("xfs: inode %d has more than %d bytes of extended attributes", a.i.no, maxAll)
	}
	if a.all == nil {
		a.all = make(map[string]string)
	}
	a.all[key] = string(value)
	return nil
}

var aclNames = map[string]string{
	"trusted.SGI_ACL_FILE":    "system.posix_acl_access",
	"trusted.SGI_ACL_DEFAULT": "system.posix_acl_default",
}

// acl turns an access list from the form on disk into that of the system.posix_acl_* attributes.
func acl(b []byte) ([]byte, bool) {
	if len(b) < 4 {
		return nil, false
	}
	count := int64(be.Uint32(b))
	b = b[4:]
	if count > int64(len(b)/12) {
		return nil, false
	}
	le := binary.LittleEndian
	out := le.AppendUint32(nil, 2)
	for range count {
		tag, id := be.Uint32(b), be.Uint32(b[4:])
		if tag != 0x02 && tag != 0x08 { // only named users and groups have one
			id = ^uint32(0)
		}
		out = le.AppendUint16(out, uint16(tag))
		out = le.AppendUint16(out, be.Uint16(b[8:]))
		out = le.AppendUint32(out, id)
		b = b[12:]
	}
	return out, true
}

func badAttr(i *inode) error { return verdict.Damaged("xfs: inode %d has a broken attribute", i.no) }

func (f *FS) xattrs(i *inode) (map[string]string, error) {
	a := &attributes{i: i}
	switch {
	case len(i.attr.b) == 0:
		return nil, nil
	case i.attr.format == formatLocal:
		err := a.short()
		return a.all, err
	case i.attr.format == formatExtents && i.attr.count == 0:
		return nil, nil
	}
	err := f.leaves(i, a)
	return a.all, err
}

// short reads attributes kept in the inode.
func (a *attributes) short() error {
	b := a.i.attr.b
	if len(b) < 4 {
		return badAttr(a.i)
	}
	count := int(b[2])
	for b = b[4:]; count > 0; count-- {
		if len(b) < 3 {
			return badAttr(a.i)
		}
		length, size, flags := int(b[0]), int(b[1]), b[2]
		if len(b) < 3+length+size {
			return badAttr(a.i)
		}
		if err := a.add(flags, b[3:3+length], b[3+length:3+length+size]); err != nil {
			return err
		}
		b = b[3+length+size:]
	}
	return nil
}

// attrBlock reads a logical block of the attribute fork.
func (f *FS) attrBlock(i *inode, b int64) ([]byte, error) {
	phys, _, err := f.find(i, &i.attr, b)
	if err != nil {
		return nil, err
	}
	if phys < 0 {
		return nil, badAttr(i)
	}
	return f.c.View(phys, int(f.bs))
}

// leaves descends to the first leaf and follows the chain of them.
func (f *FS) leaves(i *inode, a *attributes) error {
	info, leaf, node := 12, uint16(attrLeafV4), uint16(attrNodeV4)
	if f.v5 {
		info, leaf, node = 56, attrLeafV5, attrNodeV5
	}
	at := int64(0)
	b, err := f.attrBlock(i, at)
	for depth := 0; err == nil && be.Uint16(b[8:]) == node; depth++ {
		entries := info + 4
		if f.v5 {
			entries += 4
		}
		if depth > 8 || be.Uint16(b[info:]) == 0 || len(b) < entries+8 {
			return badAttr(i)
		}
		b, err = f.attrBlock(i, int64(be.Uint32(b[entries+4:])))
	}
	for n := 0; err == nil; n++ {
		if be.Uint16(b[8:]) != leaf || n > maxLeaves {
			return badAttr(i)
		}
		if f.csum && !sumOK(b, 12) {
			return verdict.Damaged("xfs: the checksum of the attributes of inode %d is wrong", i.no)
		}
		if err := f.leafAttrs(i, a, b, info); err != nil {
			return err
		}
		next := int64(be.Uint32(b))
		if next == 0 {
			return nil
		}
		b, err = f.attrBlock(i, next)
	}
	return err
}

func (f *FS) leafAttrs(i *inode, a *attributes, b []byte, info int) error {
	entries := info + 20
	if f.v5 {
		entries = 80
	}
	count := int(be.Uint16(b[info:]))
	if count > (len(b)-entries)/8 {
		return badAttr(i)
	}
	for k := range count {
		e := b[entries+8*k:]
		at, flags := int(be.Uint16(e[4:])), e[6]
		if at+9 > len(b) {
			return badAttr(i)
		}
		v := b[at:]
		if flags&attrLocal != 0 {
			size, length := int(be.Uint16(v)), int(v[2])
			if 3+length+size > len(v) {
				return badAttr(i)
			}
			if err := a.add(flags, v[3:3+length], v[3+length:3+length+size]); err != nil {
				return err
			}
			continue
		}
		block, size, length := int64(be.Uint32(v)), int64(be.Uint32(v[4:])), int(v[8])
		if 9+length > len(v) || size > maxValue {
			return badAttr(i)
		}
		if flags&attrIncomplete != 0 {
			continue
		}
		value, err := f.remoteValue(i, block, size)
		if err != nil {
			return err
		}
		if err := a.add(flags, v[9:9+length], value); err != nil {
			return err
		}
	}
	return nil
}

// remoteValue reads a value from blocks of its own. In version 5 each of them begins with a header.
func (f *FS) remoteValue(i *inode, b, size int64) ([]byte, error) {
	out := make([]byte, 0, size)
	for ; int64(len(out)) < size; b++ {
		p, err := f.attrBlock(i, b)
		if err != nil {
			return nil, err
		}
		if f.v5 {
			if string(p[:4]) != "XARM" {
				return nil, badAttr(i)
			}
			p = p[remoteHeader:]
		}
		out = append(out, p[:min(int64(len(p)), size-int64(len(out)))]...)
	}
	return out, nil
}
