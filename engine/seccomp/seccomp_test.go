package seccomp

import (
	"encoding/binary"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// run interprets a program on one call, as the kernel does.
func run(t *testing.T, prog []byte, arch, nr uint32, args [6]uint64) uint32 {
	t.Helper()
	data := make([]byte, 64)
	binary.LittleEndian.PutUint32(data, nr)
	binary.LittleEndian.PutUint32(data[4:], arch)
	for i, a := range args {
		binary.LittleEndian.PutUint64(data[16+8*i:], a)
	}
	var acc uint32
	for pc, steps := 0, 0; pc*8 < len(prog) && steps < 10000; steps++ {
		ins := prog[pc*8:]
		code, jt, jf, k := binary.NativeEndian.Uint16(ins), int(ins[2]), int(ins[3]), binary.NativeEndian.Uint32(ins[4:])
		branch := func(cond bool) {
			if cond {
				pc += 1 + jt
			} else {
				pc += 1 + jf
			}
		}
		switch code {
		case ldAbs:
			acc = binary.LittleEndian.Uint32(data[k:])
			pc++
		case and:
			acc &= k
			pc++
		case jeq:
			branch(acc == k)
		case jge:
			branch(acc >= k)
		case ja:
			pc += 1 + int(k)
		case ret:
			return k
		default:
			t.Fatalf("instruction %d: code %#x", pc, code)
		}
	}
	t.Fatal("the program does not end in a return")
	return 0
}

func TestProgramAgreesWithRules(t *testing.T) {
	for _, kind := range []Kind{Application, Machine} {
		rules, err := rules(kind)
		if err != nil {
			t.Fatal(err)
		}
		prog, err := Program(kind, false)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("kind %d: %d instructions", kind, len(prog)/8)
		for nr := uint32(0); nr < 1024; nr++ {
			got := run(t, prog, audit[runtime.GOARCH], nr, [6]uint64{})
			r := rules[nr]
			want := errnoAction(uint16(unix.EPERM))
			switch {
			case nr > 470 && r == nil:
				continue
			case r != nil && (r.always() || r.holds([6]uint64{})):
				want = unix.SECCOMP_RET_ALLOW
			case r != nil:
				want = errnoAction(r.errno)
			}
			if got != want && !(r == nil && got == errnoAction(uint16(unix.ENOSYS))) {
				t.Errorf("kind %d: call %d gives %#x, want %#x", kind, nr, got, want)
			}
		}
	}
}

func TestProfiles(t *testing.T) {
	const allow = unix.SECCOMP_RET_ALLOW
	eperm, enosys := errnoAction(uint16(unix.EPERM)), errnoAction(uint16(unix.ENOSYS))
	for _, c := range []struct {
		name         string
		args         [6]uint64
		app, machine uint32
	}{
		{"read", [6]uint64{}, allow, allow},
		{"execve", [6]uint64{}, allow, allow},
		{"clone", [6]uint64{unix.CLONE_VM | unix.CLONE_THREAD}, allow, allow},
		{"clone", [6]uint64{unix.CLONE_NEWUSER}, eperm, allow},
		{"clone", [6]uint64{unix.CLONE_NEWNET | unix.CLONE_NEWNS}, eperm, allow},
		{"clone3", [6]uint64{}, enosys, allow},
		{"unshare", [6]uint64{unix.CLONE_NEWUSER}, eperm, allow},
		{"setns", [6]uint64{}, eperm, allow},
		{"mount", [6]uint64{}, eperm, allow},
		{"umount2", [6]uint64{}, eperm, allow},
		{"pivot_root", [6]uint64{}, eperm, allow},
		{"fsconfig", [6]uint64{}, enosys, enosys},
		{"fsopen", [6]uint64{}, enosys, enosys},
		{"bpf", [6]uint64{}, enosys, enosys},
		{"keyctl", [6]uint64{}, enosys, enosys},
		{"add_key", [6]uint64{}, enosys, enosys},
		{"userfaultfd", [6]uint64{}, enosys, enosys},
		{"io_uring_setup", [6]uint64{}, enosys, enosys},
		{"kexec_load", [6]uint64{}, enosys, enosys},
		{"perf_event_open", [6]uint64{}, enosys, enosys},
		{"open_by_handle_at", [6]uint64{}, enosys, enosys},
		{"init_module", [6]uint64{}, eperm, eperm},
		{"finit_module", [6]uint64{}, eperm, eperm},
		{"settimeofday", [6]uint64{}, eperm, eperm},
		{"syslog", [6]uint64{}, eperm, eperm},
		{"reboot", [6]uint64{}, eperm, allow},
		{"socket", [6]uint64{unix.AF_INET}, allow, allow},
		{"socket", [6]uint64{unix.AF_NETLINK}, allow, allow},
		{"socket", [6]uint64{unix.AF_VSOCK}, eperm, eperm},
		{"socket", [6]uint64{unix.AF_ALG}, eperm, eperm},
		{"socket", [6]uint64{1<<32 | unix.AF_INET}, eperm, eperm},
		{"personality", [6]uint64{0xffffffff}, allow, allow},
		{"personality", [6]uint64{0x0400000}, eperm, eperm},
	} {
		for kind, want := range map[Kind]uint32{Application: c.app, Machine: c.machine} {
			prog, err := Program(kind, false)
			if err != nil {
				t.Fatal(err)
			}
			if got := run(t, prog, audit[runtime.GOARCH], numbers[c.name], c.args); got != want {
				t.Errorf("kind %d: %s %v gives %#x, want %#x", kind, c.name, c.args, got, want)
			}
		}
	}
}

// TestFixedAttributes: requests that change file attributes are refused whatever the half of the argument says that the kernel
// does not look at; others are not.
func TestFixedAttributes(t *testing.T) {
	fixed := errnoAction(uint16(unix.EOPNOTSUPP))
	for _, kind := range []Kind{Application, Machine} {
		prog, err := Program(kind, true)
		if err != nil {
			t.Fatal(err)
		}
		for request, want := range map[uint64]uint32{0x40086602: fixed, 0x401c5820: fixed, 7<<32 | 0x401c5820: fixed,
			unix.TCGETS: unix.SECCOMP_RET_ALLOW, 0x80086601: unix.SECCOMP_RET_ALLOW, 0x801c581f: unix.SECCOMP_RET_ALLOW} {
			if got := run(t, prog, audit[runtime.GOARCH], numbers["ioctl"], [6]uint64{3, request}); got != want {
				t.Errorf("kind %d: request %#x gives %#x, want %#x", kind, request, got, want)
			}
		}
		if got := run(t, prog, audit[runtime.GOARCH], numbers["file_setattr"], [6]uint64{}); got != fixed {
			t.Errorf("kind %d: file_setattr gives %#x", kind, got)
		}
	}
}

func TestForeignCallsDoNotExist(t *testing.T) {
	enosys := errnoAction(uint16(unix.ENOSYS))
	prog, err := Program(Machine, false)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string][2]uint32{
		"a call of another architecture": {unix.AUDIT_ARCH_I386, 0},
		"a call newer than the tables":   {audit[runtime.GOARCH], 900},
		"an x32 call":                    {audit[runtime.GOARCH], 0x40000000},
		"the largest number":             {audit[runtime.GOARCH], 0xffffffff},
	} {
		if got := run(t, prog, c[0], c[1], [6]uint64{}); got != enosys {
			t.Errorf("%s gives %#x", name, got)
		}
	}
}
