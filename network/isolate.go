package network

import (
	"sync"

	"golang.org/x/sys/unix"
)

// A switch with the userspace datapath reads a port through a packet socket, which gives it a copy: the frame itself
// goes on into the host's own network stack, and an instance could talk to the host's services by addressing the
// port's MAC, past every security group. A classifier behind the packet sockets drops it.

// dropName is the name of that classifier.
const dropName = "novalet_drop"

// dropProgram is the classifier: return TC_ACT_SHOT.
type dropProgram struct {
	once sync.Once
	fd   int
	err  error
}

func (d *dropProgram) load() (int, error) {
	d.once.Do(func() { d.fd, d.err = loadClassifier([]insn{{op: opMovImm, imm: tcActShot}, {op: opExit}}) })
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
		err = p.classify(link, fd, dropName)
	}
	if err != nil {
		p.isolateOnce.Do(func() {
			p.log.Warn("instances can address the host itself through the ports of its switch: the kernel takes no classifier", "error", err)
		})
	}
	return nil
}
