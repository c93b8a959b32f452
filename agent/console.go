package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/novalet/novalet"
)

// maxViewers bounds the viewers of one console.
const maxViewers = 16

// consoleTable holds the listeners through which console proxies reach consoles. A listener is opened on request only,
// on proxyclient_address only, takes allowed peers only, and closes when its time is over without a viewer: the
// token that guards it is checked by the proxy and never seen here.
type consoleTable struct {
	a       *Agent
	cfg     SerialConfig
	allowed []netip.Prefix

	mu    sync.Mutex
	open  map[string]*serialConsole
	ended bool
	wg    sync.WaitGroup
}

type serialConsole struct {
	t     *consoleTable
	uuid  string
	log   *slog.Logger
	ln    net.Listener
	port  int
	until time.Time // guarded by t.mu
	timer *time.Timer
	conns map[net.Conn]bool
}

func newConsoleTable(a *Agent, cfg SerialConfig) (*consoleTable, error) {
	t := &consoleTable{a: a, cfg: cfg, open: map[string]*serialConsole{}}
	if cfg.ProxyclientAddress == "" {
		return t, nil
	}
	if cfg.PortLast < cfg.PortFirst || cfg.PortFirst < 0 || cfg.PortLast > 65535 {
		return nil, fmt.Errorf("serial_console port_range: %d to %d is not a range of ports", cfg.PortFirst, cfg.PortLast)
	}
	for _, s := range cfg.Allowed {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			addr, aerr := netip.ParseAddr(s)
			if aerr != nil {
				return nil, fmt.Errorf("serial_console allowed proxies: %q is no address: %w", s, aerr)
			}
			p = netip.PrefixFrom(addr, addr.BitLen())
		}
		t.allowed = append(t.allowed, p)
	}
	return t, nil
}

// SerialConsole implements novalet.Compute.
func (a *Agent) SerialConsole(ctx context.Context, instanceUUID string, ttl time.Duration) (*novalet.ConsoleAccess, error) {
	if a.cfg.Serial.ProxyclientAddress == "" {
		f := novalet.Faultf(novalet.ErrUnsupported, "ConsoleTypeUnavailable", "Unavailable console type serial.")
		f.Details = map[string]any{"console_type": "serial"}
		return nil, f
	}
	in, err := a.lookup(instanceUUID)
	if err != nil {
		return nil, err
	}
	st, err := a.runtime.Status(ctx, instanceUUID)
	if err != nil && !errors.Is(err, novalet.ErrNotFound) {
		return nil, fmt.Errorf("read container: %w", err)
	}
	if err != nil || st.State != novalet.ContainerRunning && st.State != novalet.ContainerPaused {
		f := novalet.Faultf(novalet.ErrBusy, "InstanceNotReady", "Instance %s is not ready", instanceUUID)
		f.Details = map[string]any{"instance_id": instanceUUID}
		return nil, f
	}
	var known bool
	in.read(func(r *record) { known = r.Console })
	if !known {
		// The delete has tokens to clean then.
		in.note(func(r *record) { r.Console = true })
	}
	port, err := a.consoles.listen(in, ttl)
	if err != nil {
		return nil, err
	}
	return &novalet.ConsoleAccess{Host: a.cfg.Serial.ProxyclientAddress, Port: port}, nil
}

// ConsolePort implements novalet.Compute.
func (a *Agent) ConsolePort(_ context.Context, instanceUUID string, port int) (bool, error) {
	if _, err := a.lookup(instanceUUID); err != nil {
		return false, err
	}
	a.consoles.mu.Lock()
	defer a.consoles.mu.Unlock()
	c := a.consoles.open[instanceUUID]
	return c != nil && c.port == port, nil
}

// listen finds the instance's listener or opens one, and keeps it for ttl at least.
func (t *consoleTable) listen(in *instance, ttl time.Duration) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return 0, fmt.Errorf("open console: %w", errShutdown)
	}
	if c := t.open[in.uuid]; c != nil {
		c.extend(ttl)
		return c.port, nil
	}
	ln, err := t.bind()
	if err != nil {
		return 0, err
	}
	tcp, ok := ln.Addr().(*net.TCPAddr)
	if !ok {
		return 0, errors.Join(fmt.Errorf("open console: listens on %v", ln.Addr()), ln.Close())
	}
	c := &serialConsole{t: t, uuid: in.uuid, log: in.log, ln: ln, port: tcp.Port, conns: map[net.Conn]bool{}}
	t.open[in.uuid] = c
	c.extend(ttl)
	t.wg.Go(c.accept)
	return c.port, nil
}

// bind takes the first free port of the range.
func (t *consoleTable) bind() (net.Listener, error) {
	var last error
	for port := t.cfg.PortFirst; port <= t.cfg.PortLast; port++ {
		ln, err := net.Listen("tcp", net.JoinHostPort(t.cfg.ProxyclientAddress, fmt.Sprint(port)))
		if err == nil {
			return ln, nil
		}
		last = err
		if !strings.Contains(err.Error(), "in use") {
			break // the address is wrong, not the port
		}
	}
	f := novalet.Faultf(novalet.ErrBusy, "SocketPortRangeExhaustedException", "Not able to acquire a free port for %s", t.cfg.ProxyclientAddress)
	f.Details = map[string]any{"host": t.cfg.ProxyclientAddress}
	f.Err = last
	return nil, f
}

// extend keeps the listener open for ttl more. t.mu is held.
func (c *serialConsole) extend(ttl time.Duration) {
	if until := time.Now().Add(ttl); until.After(c.until) {
		c.until = until
	}
	if c.timer != nil {
		c.timer.Stop()
	}
	c.timer = time.AfterFunc(time.Until(c.until), func() {
		c.t.mu.Lock()
		defer c.t.mu.Unlock()
		if len(c.conns) == 0 && !time.Now().Before(c.until) {
			c.close()
		}
	})
}

// close ends the listener and its viewers. t.mu is held.
func (c *serialConsole) close() {
	if c.t.open[c.uuid] == c {
		delete(c.t.open, c.uuid)
	}
	c.timer.Stop()
	_ = c.ln.Close() // ends accept; there is nothing to lose
	for conn := range c.conns {
		_ = conn.Close()
	}
}

func (c *serialConsole) accept() {
	for {
		conn, err := c.ln.Accept()
		if err != nil {
			c.t.mu.Lock()
			c.close()
			c.t.mu.Unlock()
			return
		}
		c.t.mu.Lock()
		ok := !c.t.ended && c.t.open[c.uuid] == c && len(c.conns) < maxViewers && c.t.peerAllowed(conn)
		if ok {
			c.conns[conn] = true
			c.t.wg.Go(func() { c.view(conn) })
		}
		c.t.mu.Unlock()
		if !ok {
			c.log.Warn("console viewer turned away", "peer", conn.RemoteAddr().String())
			_ = conn.Close()
		}
	}
}

// peerAllowed says whether a peer is one of the console proxies, or this host when none is named.
func (t *consoleTable) peerAllowed(conn net.Conn) bool {
	peer, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		return false
	}
	addr := peer.Addr().Unmap()
	for _, p := range t.allowed {
		if p.Contains(addr) {
			return true
		}
	}
	if len(t.allowed) > 0 {
		return false
	}
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	return err == nil && (addr.IsLoopback() || addr == local.Addr().Unmap())
}

// view joins a viewer and the console until one of them ends.
func (c *serialConsole) view(conn net.Conn) {
	defer func() {
		_ = conn.Close()
		c.t.mu.Lock()
		delete(c.conns, conn)
		if len(c.conns) == 0 && !time.Now().Before(c.until) {
			c.close()
		}
		c.t.mu.Unlock()
	}()
	term, err := c.t.a.runtime.Console(c.t.a.ctx, c.uuid)
	if err != nil {
		c.log.Warn("console is not opened", "err", err)
		return
	}
	c.log.Info("console viewer came", "peer", conn.RemoteAddr().String())
	var typing sync.WaitGroup
	typing.Go(func() {
		_, _ = io.Copy(term, conn) // ends with the viewer
		_ = term.Close()
	})
	_, _ = io.Copy(conn, term) // ends with the guest, or with the viewer by the close above
	_ = conn.Close()
	typing.Wait()
}

// closeInstance ends the console of an instance that stopped or went.
func (t *consoleTable) closeInstance(uuid string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.open[uuid]; c != nil {
		c.close()
	}
}

// closeAll ends all consoles and waits for them.
func (t *consoleTable) closeAll() {
	t.mu.Lock()
	t.ended = true
	for _, c := range t.open {
		c.close()
	}
	t.mu.Unlock()
	t.wg.Wait()
}
