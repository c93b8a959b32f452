package network

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/internal/bpf"
)

// insn is one instruction of eBPF (linux/bpf.h, struct bpf_insn): opcode, registers (dst | src<<4), offset, immediate.
type insn struct {
	op, regs byte
	off      int16
	imm      int32
}

const (
	tcActUnspec = -1 // the next classifier decides
	tcActShot   = 2  // drop
)

// loadClassifier gives a program for the traffic control's classifiers to the kernel. Its descriptor is the caller's to
// close; a device that uses the program keeps it.
func loadClassifier(prog []insn) (int, error) {
	code := make([]byte, 0, 8*len(prog))
	for _, i := range prog {
		code = append(code, i.op, i.regs)
		code = binary.NativeEndian.AppendUint16(code, uint16(i.off))
		code = binary.NativeEndian.AppendUint32(code, uint32(i.imm))
	}
	fd, err := bpf.Load(unix.BPF_PROG_TYPE_SCHED_CLS, code)
	if err != nil {
		return -1, fmt.Errorf("load classifier: %w", err)
	}
	return fd, nil
}

// classify puts a program in the way of what comes in at a device. The same name again replaces it in one step.
func (p *Plugger) classify(link netlink.Link, fd int, name string) error {
	return p.classifyAt(link, fd, name, 1)
}

// classifyAt does so at a priority: what one program has no opinion about is the next one's.
func (p *Plugger) classifyAt(link netlink.Link, fd int, name string, priority uint16) error {
	index := link.Attrs().Index
	if err := p.h.QdiscAdd(clsact(link)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact to %s: %w", link.Attrs().Name, err)
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: priority},
		Fd:          fd, Name: name, DirectAction: true,
	}
	if err := p.h.FilterReplace(f); err != nil {
		return fmt.Errorf("add classifier to %s: %w", link.Attrs().Name, err)
	}
	return nil
}
