package network

import (
	"sync"
	"time"

	"github.com/vishvananda/netlink"
)

// reapDelay is how long a discarded device is left alone: most go with the namespace of their other end, many at a
// time and cheaper than one by one.
const reapDelay = 500 * time.Millisecond

// reaper deletes devices, one after the other.
type reaper struct {
	p     *Plugger
	delay time.Duration

	mu     sync.Mutex
	queue  []netlink.Link
	closed bool
	wake   chan struct{}
	done   chan struct{}
	stop   chan struct{}
}

func startReaper(p *Plugger) *reaper {
	r := &reaper{p: p, delay: reapDelay, wake: make(chan struct{}, 1), done: make(chan struct{}), stop: make(chan struct{})}
	go r.run()
	return r
}

// add hands over a device that has no name of use any more.
func (r *reaper) add(l netlink.Link) {
	r.mu.Lock()
	r.queue = append(r.queue, l)
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *reaper) run() {
	defer close(r.done)
	for {
		stopped := false
		select {
		case <-r.wake:
			t := time.NewTimer(r.delay)
			select {
			case <-t.C:
			case <-r.stop:
				stopped = true
			}
			t.Stop()
		case <-r.stop:
			stopped = true
		}
		r.mu.Lock()
		batch := r.queue
		r.queue = nil
		r.mu.Unlock()
		for _, l := range batch {
			r.free(l)
		}
		if stopped {
			return
		}
	}
}

// free deletes the device if it is still the one that was discarded: its number may have been given to another.
func (r *reaper) free(l netlink.Link) {
	now, err := r.p.h.LinkByIndex(l.Attrs().Index)
	if err != nil || now.Attrs().Alias != goneAlias {
		return
	}
	if err := r.p.h.LinkDel(now); err != nil && !gone(err) {
		r.p.log.Warn("network device left behind", "device", now.Attrs().Name, "error", err)
	}
}

// close frees what is queued and waits.
func (r *reaper) close() {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		<-r.done
		return
	}
	r.closed = true
	r.mu.Unlock()
	close(r.stop)
	<-r.done
}
