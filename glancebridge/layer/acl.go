package layer

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// The tags of a POSIX ACL entry, linux/posix_acl_xattr.h.
const (
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

// parseACL turns the text of a tar's ACL record ("user::rwx,user:1000:r--,group::r-x,mask::r-x,other::---", also
// one per line, also with a fourth field that repeats the id) into the kernel's xattr. Names that are no numbers
// belong to another machine's users: their entries are left out. "" means there is nothing beyond the mode bits.
func parseACL(text string, isDefault bool) (string, error) {
	type entry struct {
		tag, perm uint16
		id        uint32
	}
	var list []entry
	extended := isDefault
	for _, item := range strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == '\n' }) {
		if i := strings.IndexByte(item, '#'); i >= 0 {
			item = item[:i]
		}
		f := strings.Split(strings.TrimSpace(item), ":")
		if len(f) < 3 {
			return "", fmt.Errorf("acl entry %q", short(item))
		}
		e := entry{id: 1<<32 - 1}
		who := f[1]
		if len(f) > 3 && who != "" {
			who = f[3]
		}
		switch f[0] + map[bool]string{true: "", false: "+"}[who == ""] {
		case "user", "u":
			e.tag = aclUserObj
		case "user+", "u+":
			e.tag = aclUser
		case "group", "g":
			e.tag = aclGroupObj
		case "group+", "g+":
			e.tag = aclGroup
		case "mask", "m":
			e.tag = aclMask
		case "other", "o":
			e.tag = aclOther
		default:
			return "", fmt.Errorf("acl entry %q", short(item))
		}
		if e.tag == aclUser || e.tag == aclGroup {
			id, err := strconv.ParseUint(who, 10, 32)
			if err != nil {
				continue
			}
			e.id = uint32(id)
			extended = true
		}
		for _, c := range f[2] {
			switch c {
			case 'r':
				e.perm |= 4
			case 'w':
				e.perm |= 2
			case 'x':
				e.perm |= 1
			}
		}
		extended = extended || e.tag == aclMask
		list = append(list, e)
		if len(list) > 1000 {
			return "", fmt.Errorf("acl of more than 1000 entries")
		}
	}
	if !extended || len(list) == 0 {
		return "", nil
	}
	slices.SortStableFunc(list, func(a, b entry) int {
		if a.tag != b.tag {
			return int(a.tag) - int(b.tag)
		}
		return int(int64(a.id) - int64(b.id))
	})
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range list {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b), nil
}
