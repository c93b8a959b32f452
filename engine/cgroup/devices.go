package cgroup

import (
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/internal/bpf"
)

// device is one allowed access: kind 'c' or 'b', -1 for any number.
type device struct {
	kind         byte
	major, minor int
	access       string
}

// allowedDevices are what every instance may use. Making nodes is allowed as such: a user namespace gives no right
// to it, and package managers try.
var allowedDevices = []device{
	{'c', -1, -1, "m"}, {'b', -1, -1, "m"},
	{'c', 1, 3, "rwm"}, {'c', 1, 5, "rwm"}, {'c', 1, 7, "rwm"}, {'c', 1, 8, "rwm"}, {'c', 1, 9, "rwm"},
	{'c', 5, 0, "rwm"}, {'c', 5, 1, "rwm"}, {'c', 5, 2, "rwm"}, {'c', 136, -1, "rwm"},
	{'c', 10, 229, "rwm"}, // fuse
}

func (d device) String() string {
	num := func(n int) string {
		if n < 0 {
			return "*"
		}
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%c %s:%s %s", d.kind, num(d.major), num(d.minor), d.access)
}

// devices denies all devices but the allowed ones, by the v1 controller or, without it, by a program on cgroup2.
func (g *Group) devices() error {
	if dir := g.v1("devices"); dir != "" {
		if err := write(dir, "devices.deny", "a"); err != nil {
			return fmt.Errorf("deny devices: %w", err)
		}
		for _, d := range allowedDevices {
			if err := write(dir, "devices.allow", d.String()); err != nil {
				return fmt.Errorf("allow device %s: %w", d, err)
			}
		}
		return nil
	}
	if g.v2() == "" {
		return lacks("devices")
	}
	return attachDeviceFilter(g.v2(), allowedDevices)
}

// insn is one eBPF instruction (struct bpf_insn).
type insn struct {
	code     byte
	dst, src byte
	off      int16
	imm      int32
}

const (
	bpfLoadW   = 0x61 // dst = *(u32 *)(src + off)
	bpfMov     = 0xbf // dst = src
	bpfMovImm  = 0xb7
	bpfAnd     = 0x57 // dst &= imm
	bpfRsh     = 0x77 // dst >>= imm
	bpfJneImm  = 0x55
	bpfExit    = 0x95
	bpfProgDev = 15 // BPF_PROG_TYPE_CGROUP_DEVICE
	bpfAttach  = 6  // BPF_CGROUP_DEVICE
)

// deviceProgram checks an access against the rules: struct bpf_cgroup_dev_ctx holds access<<16|type, major and
// minor; type 1 is block, 2 is character; access bits are 1 mknod, 2 read, 4 write.
func deviceProgram(rules []device) []insn {
	p := []insn{
		{code: bpfLoadW, dst: 2, src: 1},
		{code: bpfMov, dst: 3, src: 2},
		{code: bpfAnd, dst: 2, imm: 0xffff},
		{code: bpfRsh, dst: 3, imm: 16},
		{code: bpfLoadW, dst: 4, src: 1, off: 4},
		{code: bpfLoadW, dst: 5, src: 1, off: 8},
	}
	for _, r := range rules {
		kind, mask := int32(1), int32(0)
		if r.kind == 'c' {
			kind = 2
		}
		for _, a := range r.access {
			mask |= map[rune]int32{'m': 1, 'r': 2, 'w': 4}[a]
		}
		body := []insn{
			{code: bpfJneImm, dst: 2, imm: kind},
			{code: bpfMov, dst: 6, src: 3},
			{code: bpfAnd, dst: 6, imm: ^mask},
			{code: bpfJneImm, dst: 6, imm: 0},
		}
		if r.major >= 0 {
			body = append(body, insn{code: bpfJneImm, dst: 4, imm: int32(r.major)})
		}
		if r.minor >= 0 {
			body = append(body, insn{code: bpfJneImm, dst: 5, imm: int32(r.minor)})
		}
		body = append(body, insn{code: bpfMovImm, dst: 0, imm: 1}, insn{code: bpfExit})
		for i := range body {
			if body[i].code == bpfJneImm {
				body[i].off = int16(len(body) - i - 1)
			}
		}
		p = append(p, body...)
	}
	return append(p, insn{code: bpfMovImm, dst: 0, imm: 0}, insn{code: bpfExit})
}

// attachDeviceFilter loads the program and attaches it to a cgroup2 directory, replacing an earlier one.
func attachDeviceFilter(dir string, rules []device) error {
	prog := deviceProgram(rules)
	code := make([]byte, 0, 8*len(prog))
	for _, i := range prog {
		code = append(code, i.code, i.dst|i.src<<4)
		code = binary.NativeEndian.AppendUint16(code, uint16(i.off))
		code = binary.NativeEndian.AppendUint32(code, uint32(i.imm))
	}
	fd, err := bpf.Load(bpfProgDev, code)
	if err != nil {
		return fmt.Errorf("load device filter: %w", err)
	}
	defer unix.Close(fd)
	cg, err := os.OpenFile(dir, unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("attach device filter: %w", err)
	}
	defer cg.Close()
	attach := struct{ target, prog, attachType, flags uint32 }{uint32(cg.Fd()), uint32(fd), bpfAttach, 0}
	if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_ATTACH, uintptr(unsafe.Pointer(&attach)), unsafe.Sizeof(attach)); errno != 0 {
		return fmt.Errorf("attach device filter: %w", errno)
	}
	return nil
}
