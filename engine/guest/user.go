package guest

import (
	"fmt"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/mnt"
)

// passwdMax bounds the user and group files of an image.
const passwdMax = 1 << 20

// ids is a resolved user.
type ids struct {
	uid, gid uint32
	groups   []uint32
	home     string
	name     string
}

// become makes this thread, the one that goes on to a program, the user's.
func (id *ids) become() error {
	var first *uint32
	if len(id.groups) > 0 {
		first = &id.groups[0]
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(id.groups)), uintptr(unsafe.Pointer(first)), 0); errno != 0 {
		return fmt.Errorf("set groups: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(id.gid), uintptr(id.gid), uintptr(id.gid)); errno != 0 {
		return fmt.Errorf("set group: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(id.uid), uintptr(id.uid), uintptr(id.uid)); errno != 0 {
		return fmt.Errorf("set user: %w", errno)
	}
	return nil
}

// readEtc reads a user or group file of the image from inside: an absent one is empty.
func readEtc(rootfd int, name string) string {
	fd, err := mnt.OpenInRoot(rootfd, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return ""
	}
	b, err := readRegular(fd, passwdMax)
	if err != nil {
		return ""
	}
	return string(b)
}

// number parses an id: decimal digits only, in the range of a user namespace of 65,536 ids. A sign, blanks and
// leading text make it a name (and so, mostly, an unknown one): CVE-2026-30892 was a lenient parse.
func number(s string) (uint32, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n > 65535 {
		return 0, false
	}
	return uint32(n), true
}

// lookupUser resolves user[:group] against the texts of /etc/passwd and /etc/group. A number need not be listed;
// a name must. Without a group it is the user's own and its further groups, as an image config means it.
func lookupUser(spec, passwd, group string) (*ids, error) {
	if strings.ContainsAny(spec, " \t\n\x00") || strings.Count(spec, ":") > 1 {
		return nil, fault("the image's user %q is not of the form user[:group]", spec)
	}
	user, grp, hasGroup := strings.Cut(spec, ":")
	if user == "" {
		user = "0"
	}
	id := &ids{home: "/"}
	uid, isNumber := number(user)
	found := false
	for _, f := range fields(passwd, 7) {
		u, ok := number(f[2])
		g, gok := number(f[3])
		if !ok || !gok || (f[0] != user && !(isNumber && u == uid)) {
			continue
		}
		found = true
		id.uid, id.gid, id.name = u, g, f[0]
		if strings.HasPrefix(f[5], "/") {
			id.home = f[5]
		}
		break
	}
	switch {
	case found:
	case isNumber:
		id.uid, id.name = uid, user
	default:
		return nil, fault("the image has no user %q: set a user that its /etc/passwd lists", user)
	}
	if id.uid == 0 && !found {
		id.home, id.name = "/root", "root"
	}
	for _, f := range fields(group, 4) {
		g, ok := number(f[2])
		if !ok {
			continue
		}
		if !hasGroup {
			for _, m := range strings.Split(f[3], ",") {
				if m != "" && m == id.name && g != id.gid && len(id.groups) < 256 {
					id.groups = append(id.groups, g)
				}
			}
		}
	}
	if !hasGroup {
		return id, nil
	}
	if g, ok := number(grp); ok {
		id.gid = g
		return id, nil
	}
	for _, f := range fields(group, 4) {
		if g, ok := number(f[2]); ok && f[0] == grp {
			id.gid = g
			return id, nil
		}
	}
	return nil, fault("the image has no group %q: set a group that its /etc/group lists", grp)
}

// fields splits the lines of a colon-separated file; lines with fewer fields are left out.
func fields(text string, n int) [][]string {
	var out [][]string
	for line := range strings.SplitSeq(text, "\n") {
		if f := strings.Split(line, ":"); len(f) >= n {
			out = append(out, f)
		}
	}
	return out
}
