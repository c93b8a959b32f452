package network

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A switch with the userspace datapath reads a port through a packet socket, which gives it a copy: the frame itself
// goes on into the host's own network stack, and an instance could talk to the host's services by addressing the
// port's MAC, past every security group. A classifier behind the packet sockets drops it.

// dropProgram is the classifier: return TC_ACT_SHOT.
type dropProgram struct {
	once sync.Once
	fd   int
	err  error
}

// bpfProgLoad is the part of union bpf_attr that BPF_PROG_LOAD reads (linux/bpf.h).
type bpfProgLoad struct {
	progType, insnCnt uint32
	insns, license    uint64
	logLevel, logSize uint32
	logBuf            uint64
	kernVersion       uint32
	progFlags         uint32
}

const (
	bpfCmdProgLoad  = 5
	bpfProgSchedCls = 3
	tcActShot       = 2
)

func (d *dropProgram) load() (int, error) {
	d.once.Do(func() {
		// r0 = TC_ACT_SHOT; exit. An instruction is opcode, registers, offset, immediate.
		insns := [2][8]byte{{0xb7, 0, 0, 0, tcActShot}, {0x95}}
		license := [...]byte{'A', 'p', 'a', 'c', 'h', 'e', '-', '2', '.', '0', 0}
		attr := bpfProgLoad{progType: bpfProgSchedCls, insnCnt: uint32(len(insns)),
			insns: uint64(uintptr(unsafe.Pointer(&insns))), license: uint64(uintptr(unsafe.Pointer(&license)))}
		fd, _, errno := unix.Syscall(unix.SYS_BPF, bpfCmdProgLoad, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		runtime.KeepAlive(&insns)
		runtime.KeepAlive(&license)
		d.fd = int(fd)
		if errno != 0 {
			d.fd, d.err = -1, fmt.Errorf("load classifier: %w", errno)
		}
	})
	return d.fd, d.err
}

func (d *dropProgram) close() {
	if d.fd > 0 {
		_ = unix.Close(d.fd)
	}
}

// isolate keeps what comes in at the device from the host's network stack. A kernel that cannot do it is told of once.
func (p *Plugger) isolate(name string) error {
	link, err := p.link(name)
	if err != nil || link == nil {
		return err
	}
	fd, err := p.drop.load()
	if err == nil {
		err = p.addDrop(link, fd)
	}
	if err != nil {
		p.isolateOnce.Do(func() {
			p.log.Warn("instances can address the host itself through the ports of its switch: the kernel takes no classifier", "error", err)
		})
	}
	return nil
}

func (p *Plugger) addDrop(link netlink.Link, fd int) error {
	index := link.Attrs().Index
	clsact := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := p.h.QdiscAdd(clsact); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact to %s: %w", link.Attrs().Name, err)
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
		Fd:          fd, Name: "novalet_drop", DirectAction: true,
	}
	if err := p.h.FilterReplace(f); err != nil {
		return fmt.Errorf("add classifier to %s: %w", link.Attrs().Name, err)
	}
	return nil
}
