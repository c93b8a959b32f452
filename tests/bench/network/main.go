// Command network measures the data path and the cost of a plug: TCP (throughput and round trip) between two instances against a plain veth and
// bridge made with ip(8), the two hundredth plug against the first ones, and a published port against NAT rules as
// Docker writes them. It needs root, works in network namespaces of its own and leaves nothing.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/thread"
	"github.com/novalet/novalet/network"
	"github.com/novalet/novalet/network/natbridge"
	"github.com/novalet/novalet/tests/bench/report"
)

func main() {
	rounds := flag.Int("rounds", 15, "rounds of each comparison")
	size := flag.Int("mib", 256, "MiB sent in a round")
	ports := flag.Int("ports", 200, "ports plugged on one host")
	out := flag.String("out", ".", "directory in which build/bench is")
	flag.Parse()
	// The thread that plays the host; it ends with the program.
	runtime.LockOSThread()
	if err := run(*rounds, *size, *ports, *out); err != nil {
		fmt.Fprintln(os.Stderr, "bench network:", err)
		os.Exit(1)
	}
}

func run(rounds, mib, ports int, out string) error {
	r := report.New("network", rounds)
	r.Options["mib"], r.Options["ports"] = fmt.Sprint(mib), fmt.Sprint(ports)
	for _, step := range []struct {
		id string
		fn func() error
	}{
		{"tcp_vs_veth", func() error { return tcp(r, rounds, mib) }},
		{"plug_200_vs_10", func() error { return plugs(r, ports) }},
		{"published_vs_nat", func() error { return published(r, rounds, mib) }},
	} {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		if err := step.fn(); err != nil {
			r.Missing[step.id] = err.Error()
		}
	}
	if err := r.Write(os.Stdout, out); err != nil {
		return err
	}
	if len(r.Missing) > 0 {
		return errors.New("some rows are missing")
	}
	return nil
}

// ns is a network namespace held by its file.
type ns struct{ f *os.File }

func newNS() (*ns, error) {
	n := &ns{}
	err := thread.Run(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			n.f, err = os.Open("/proc/thread-self/ns/net")
		}
		return err
	})
	return n, err
}

func (n *ns) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.f.Fd()) }

func (n *ns) in(fn func() error) error {
	return thread.Run(func() error {
		if err := unix.Setns(int(n.f.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return fn()
	})
}

func (n *ns) sh(script string) error { return n.in(func() error { return sh(script) }) }

func sh(script string) error {
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

func uuid() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// vif is a port on a Linux bridge.
func vif(n int) *novalet.VIF {
	return &novalet.VIF{ID: uuid(), Type: "bridge", Address: fmt.Sprintf("fa:16:3e:00:%02x:%02x", n>>8, n&255),
		Network: novalet.VIFNetwork{Bridge: "brqbench", Meta: novalet.NetworkMeta{MTU: 1500}, Subnets: []novalet.Subnet{{
			CIDR: "10.66.0.0/16", IPs: []novalet.FixedIP{{Address: fmt.Sprintf("10.66.%d.%d", 1+n/200, 1+n%200)}}}}}}
}

func plug(p *network.Plugger, v *novalet.VIF, n *ns) error {
	return p.Plug(context.Background(), &novalet.PlugRequest{InstanceUUID: uuid(), VIF: v, NetNS: n.path(), Static: true})
}

// send measures TCP from one namespace to an address at which another listens, in MB/s.
func send(from, to *ns, listen, dial string, mib int) (float64, error) {
	var l net.Listener
	if err := to.in(func() (err error) { l, err = net.Listen("tcp", listen); return err }); err != nil {
		return 0, err
	}
	defer l.Close()
	type result struct {
		n   int64
		err error
	}
	got := make(chan result, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			got <- result{0, err}
			return
		}
		defer c.Close()
		buf := make([]byte, 256<<10)
		var n int64
		for {
			m, err := c.Read(buf)
			n += int64(m)
			if err != nil {
				if errors.Is(err, io.EOF) {
					err = nil
				}
				got <- result{n, err}
				return
			}
		}
	}()
	var c net.Conn
	if err := from.in(func() (err error) { c, err = net.DialTimeout("tcp", dial, 10*time.Second); return err }); err != nil {
		return 0, err
	}
	buf := make([]byte, 256<<10)
	start := time.Now()
	for range mib * 4 {
		if _, err := c.Write(buf); err != nil {
			c.Close()
			return 0, err
		}
	}
	c.Close()
	res := <-got
	if res.err != nil || res.n != int64(mib)<<20 {
		return 0, fmt.Errorf("%d bytes came: %w", res.n, res.err)
	}
	return float64(res.n) / 1e6 / time.Since(start).Seconds(), nil
}

// roundTrip measures one byte there and back over TCP, in microseconds.
func roundTrip(from, to *ns, addr string) (float64, error) {
	const turns = 2000
	var l net.Listener
	if err := to.in(func() (err error) { l, err = net.Listen("tcp", addr); return err }); err != nil {
		return 0, err
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		buf := make([]byte, 1)
		for {
			if _, err := io.ReadFull(c, buf); err != nil {
				return
			}
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}()
	var c net.Conn
	if err := from.in(func() (err error) { c, err = net.DialTimeout("tcp", addr, 10*time.Second); return err }); err != nil {
		return 0, err
	}
	buf := make([]byte, 1)
	start := time.Now()
	for range turns {
		if _, err := c.Write(buf); err != nil {
			return 0, errors.Join(err, c.Close())
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			return 0, errors.Join(err, c.Close())
		}
	}
	took := time.Since(start)
	err := c.Close()
	<-done
	return float64(took.Microseconds()) / turns, err
}

// pairs measures two things in turn, after one round that does not count.
func pairs(rounds int, ours, peer func() (float64, error)) ([][2]float64, error) {
	var out [][2]float64
	for i := range rounds + 1 {
		var s [2]float64
		order := []int{0, 1}
		if i%2 == 1 {
			order = []int{1, 0}
		}
		for _, k := range order {
			var err error
			if s[k], err = []func() (float64, error){ours, peer}[k](); err != nil {
				return nil, err
			}
		}
		if i > 0 {
			out = append(out, s)
		}
	}
	return out, nil
}

func tcp(r *report.Report, rounds, mib int) error {
	var n [4]*ns
	for i := range n {
		var err error
		if n[i], err = newNS(); err != nil {
			return err
		}
	}
	p, err := network.New(network.Options{})
	if err != nil {
		return err
	}
	defer p.Close()
	for i := range 2 {
		if err := plug(p, vif(i), n[i]); err != nil {
			return err
		}
	}
	if err := sh("ip link add brplain type bridge; ip link set brplain up"); err != nil {
		return err
	}
	for i := 2; i < 4; i++ {
		// Run where the host is, with the other end moved by the file of its namespace.
		script := fmt.Sprintf("ip link add p%d type veth peer name q%d; ip link set p%d master brplain up", i, i, i)
		if err := sh(script); err != nil {
			return err
		}
		if err := moveTo(fmt.Sprintf("q%d", i), n[i]); err != nil {
			return err
		}
		if err := n[i].sh(fmt.Sprintf("ip link set lo up; ip link set q%d up; ip addr add 10.67.0.%d/16 dev q%d", i, i, i)); err != nil {
			return err
		}
	}
	samples, err := pairs(rounds,
		func() (float64, error) { return send(n[0], n[1], "10.66.1.2:5001", "10.66.1.2:5001", mib) },
		func() (float64, error) { return send(n[2], n[3], "10.67.0.3:5001", "10.67.0.3:5001", mib) })
	if err != nil {
		return err
	}
	r.Add("tcp_vs_veth", "MB/s", "veth and bridge by ip(8)", 0.95, samples)
	samples, err = pairs(rounds,
		func() (float64, error) { return roundTrip(n[0], n[1], "10.66.1.2:5003") },
		func() (float64, error) { return roundTrip(n[2], n[3], "10.67.0.3:5003") })
	if err != nil {
		return err
	}
	r.Add("latency_vs_veth", "us", "veth and bridge by ip(8)", 1/0.95, samples)
	return nil
}

// moveTo puts a device of the current namespace into another.
func moveTo(dev string, n *ns) error {
	cmd := exec.Command("ip", "link", "set", dev, "netns", "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{n.f}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("move %s: %w: %s", dev, err, out)
	}
	return nil
}

func plugs(r *report.Report, ports int) error {
	p, err := network.New(network.Options{})
	if err != nil {
		return err
	}
	defer p.Close()
	took := make([]float64, ports)
	for i := range ports {
		n, err := newNS()
		if err != nil {
			return err
		}
		v := vif(i)
		start := time.Now()
		if err := plug(p, v, n); err != nil {
			return err
		}
		took[i] = float64(time.Since(start).Microseconds()) / 1000
	}
	var samples [][2]float64
	for i := range 10 {
		samples = append(samples, [2]float64{took[ports-10+i], took[i]})
	}
	r.Add(fmt.Sprintf("plug_%d_vs_10", ports), "ms", "the first ten of the same run", 1.5, samples)
	return nil
}

func published(r *report.Report, rounds, mib int) error {
	outside, err := newNS()
	if err != nil {
		return err
	}
	for _, s := range []string{
		"ip link set lo up; ip link add up0 type veth peer name down0; ip addr add 192.0.2.1/24 dev up0; ip link set up0 up",
	} {
		if err := sh(s); err != nil {
			return err
		}
	}
	if err := moveTo("down0", outside); err != nil {
		return err
	}
	if err := outside.sh("ip link set lo up; ip addr add 192.0.2.2/24 dev down0; ip link set down0 up"); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "nvbench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b, err := natbridge.New(natbridge.Options{StateDir: dir, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer b.Remove()
	p, err := network.New(network.Options{})
	if err != nil {
		return err
	}
	defer p.Close()
	a, err := newNS()
	if err != nil {
		return err
	}
	inst := &novalet.Instance{UUID: uuid(), Metadata: map[string]string{natbridge.PublishKey: "5001:5001"}}
	info, err := b.Allocate(context.Background(), &novalet.AllocateRequest{Instance: inst})
	if err != nil {
		return err
	}
	if err := plug(p, &info[0], a); err != nil {
		return err
	}
	// As Docker 20.10 writes its rules with the userland proxy off.
	d, err := newNS()
	if err != nil {
		return err
	}
	if err := sh(`ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0; ip link set docker0 up
ip link add v0 type veth peer name v1; ip link set v0 master docker0 up
iptables -t nat -N DOCKER
iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
iptables -t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
iptables -t nat -A DOCKER ! -i docker0 -p tcp --dport 5002 -j DNAT --to-destination 172.17.0.2:5002
iptables -N DOCKER; iptables -N DOCKER-USER; iptables -A DOCKER-USER -j RETURN
iptables -A FORWARD -j DOCKER-USER
iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -A FORWARD -o docker0 -j DOCKER
iptables -A FORWARD -i docker0 ! -o docker0 -j ACCEPT
iptables -A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp --dport 5002 -j ACCEPT`); err != nil {
		return err
	}
	if err := moveTo("v1", d); err != nil {
		return err
	}
	if err := d.sh("ip link set lo up; ip addr add 172.17.0.2/16 dev v1; ip link set v1 up; ip route add default via 172.17.0.1"); err != nil {
		return err
	}
	samples, err := pairs(rounds,
		func() (float64, error) { return send(outside, a, ":5001", "192.0.2.1:5001", mib) },
		func() (float64, error) { return send(outside, d, ":5002", "192.0.2.1:5002", mib) })
	if err != nil {
		return err
	}
	r.Add("published_vs_nat", "MB/s", "NAT rules as Docker writes them", 0.95, samples)
	return nil
}
