package seccomp

import (
	"encoding/binary"
	"fmt"
	"reflect"
	"runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data; arguments are 64-bit words from 16 on. Both architectures are little-endian.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

const (
	ldAbs = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	jeq   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jge   = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	ja    = unix.BPF_JMP | unix.BPF_JA
	and   = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	ret   = unix.BPF_RET | unix.BPF_K
)

// audit are the architecture values of the kernel (linux/audit.h).
var audit = map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}

// span is a run of system call numbers with one rule.
type span struct {
	first uint32
	r     *rule
}

// assemble makes the program: a check of the architecture (a call by another one, such as 32-bit, is answered with
// ENOSYS: its numbers mean other things), then a binary search over spans of numbers.
func assemble(rules map[uint32]*rule) ([]byte, error) {
	arch, ok := audit[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("system call filter: no tables for %s", runtime.GOARCH)
	}
	last := uint32(0)
	for _, nr := range numbers {
		last = max(last, nr)
	}
	noSys, denied := &rule{errno: uint16(unix.ENOSYS)}, &rule{errno: uint16(unix.EPERM)}
	var spans []span
	for nr := uint32(0); nr <= last; nr++ {
		r := rules[nr]
		if r == nil {
			r = denied
		}
		if r.always() {
			r = &rule{alternatives: [][]condition{nil}}
		}
		if n := len(spans); n == 0 || !reflect.DeepEqual(spans[n-1].r, r) {
			spans = append(spans, span{nr, r})
		}
	}
	// Above: newer calls, and on amd64 those of x32, which carry a high bit.
	spans = append(spans, span{last + 1, noSys})

	p := &program{}
	p.emit(ldAbs, 0, 0, offArch)
	p.emit(jeq, 1, 0, arch)
	p.emit(ret, 0, 0, errnoAction(uint16(unix.ENOSYS)))
	p.emit(ldAbs, 0, 0, offNr)
	p.search(spans)
	if len(p.ins) > unix.BPF_MAXINSNS {
		return nil, fmt.Errorf("system call filter: %d instructions", len(p.ins))
	}
	out := make([]byte, 0, 8*len(p.ins))
	for _, i := range p.ins {
		out = binary.NativeEndian.AppendUint16(out, i.Code)
		out = append(out, i.Jt, i.Jf)
		out = binary.NativeEndian.AppendUint32(out, i.K)
	}
	return out, nil
}

type program struct{ ins []unix.SockFilter }

func (p *program) emit(code uint16, jt, jf uint8, k uint32) int {
	p.ins = append(p.ins, unix.SockFilter{Code: code, Jt: jt, Jf: jf, K: k})
	return len(p.ins) - 1
}

func errnoAction(e uint16) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(e) }

// search emits a search tree. Conditional jumps reach 255 instructions only, so each node jumps far by JA.
func (p *program) search(s []span) {
	if len(s) == 1 {
		p.rule(s[0].r)
		return
	}
	mid := len(s) / 2
	p.emit(jge, 0, 1, s[mid].first)
	far := p.emit(ja, 0, 0, 0)
	p.search(s[:mid])
	p.ins[far].K = uint32(len(p.ins) - far - 1)
	p.search(s[mid:])
}

// rule emits the end of a path.
func (p *program) rule(r *rule) {
	for _, alt := range r.alternatives {
		// Every condition that fails leads to the next alternative.
		var fails []int
		for _, c := range alt {
			fails = append(fails, p.condition(c)...)
		}
		p.emit(ret, 0, 0, unix.SECCOMP_RET_ALLOW)
		for _, f := range fails {
			p.ins[f].K = uint32(len(p.ins) - f - 1)
		}
		if len(alt) == 0 {
			return
		}
	}
	p.emit(ret, 0, 0, errnoAction(r.errno))
}

// condition emits a comparison of a 64-bit argument that falls through when it holds, and returns the jumps to be
// aimed at where it does not.
func (p *program) condition(c condition) (fails []int) {
	half := func(off uint32, mask uint32, code uint16, k uint32, whenTrue bool) {
		p.emit(ldAbs, 0, 0, off)
		if mask != ^uint32(0) {
			p.emit(and, 0, 0, mask)
		}
		if whenTrue {
			p.emit(code, 1, 0, k)
		} else {
			p.emit(code, 0, 1, k)
		}
		fails = append(fails, p.emit(ja, 0, 0, 0))
	}
	low, high := offArgs+8*c.arg, offArgs+8*c.arg+4
	switch c.op {
	case specs.OpEqualTo:
		half(high, uint32(c.mask>>32), jeq, uint32(c.value>>32), true)
		half(low, uint32(c.mask), jeq, uint32(c.value), true)
	case specs.OpLessThan:
		// Used for small values only: the high word has to be zero.
		half(high, ^uint32(0), jeq, 0, true)
		half(low, ^uint32(0), jge, uint32(c.value), false)
	case specs.OpNotEqual:
		// Used for what fits the low word only.
		half(low, uint32(c.mask), jeq, uint32(c.value), false)
	default:
		// Not in the base profile: such an alternative never holds.
		fails = append(fails, p.emit(ja, 0, 0, 0))
	}
	return fails
}
