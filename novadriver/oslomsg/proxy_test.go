package oslomsg_test

import (
	"bytes"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// proxy stands between a transport and the broker and breaks what it is told
// to break.
type proxy struct {
	t      *testing.T
	target string
	tls    *tls.Config // terminates TLS, if set
	addr   string

	mu       sync.Mutex
	listener net.Listener // nil while down
	conns    map[net.Conn]struct{}
	frozen   chan struct{} // while not nil no byte passes
	cutAfter int           // bytes to pass towards the broker before a reset; 0: no limit
	accepted int
	running  sync.WaitGroup
}

// newProxy reserves an address; up starts listening on it.
func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, target: target, addr: l.Addr().String(), conns: map[net.Conn]struct{}{}}
	l.Close()
	t.Cleanup(func() {
		p.down()
		p.freeze(false)
		p.running.Wait()
	})
	return p
}

func (p *proxy) up() {
	p.t.Helper()
	var l net.Listener
	waitFor(p.t, "the proxy's address", func() bool {
		var err error
		l, err = net.Listen("tcp", p.addr)
		return err == nil
	})
	p.mu.Lock()
	p.listener = l
	p.mu.Unlock()
	p.running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.running.Go(func() { p.serve(c) })
		}
	})
}

// down refuses new connections and resets those there are.
func (p *proxy) down() {
	p.mu.Lock()
	if p.listener != nil {
		p.listener.Close()
		p.listener = nil
	}
	p.mu.Unlock()
	p.reset()
}

// reset breaks every connection with a RST.
func (p *proxy) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		abort(c)
	}
}

func abort(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		t.SetLinger(0)
	}
	c.Close()
}

// cut makes each connection break once n more bytes went towards the broker.
func (p *proxy) cut(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cutAfter = n
}

// freeze makes the network swallow everything, or pass it again.
func (p *proxy) freeze(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case on && p.frozen == nil:
		p.frozen = make(chan struct{})
	case !on && p.frozen != nil:
		close(p.frozen)
		p.frozen = nil
	}
}

func (p *proxy) connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.accepted
}

func (p *proxy) serve(client net.Conn) {
	broker, err := net.Dial("tcp", p.target)
	if err != nil {
		abort(client)
		return
	}
	p.mu.Lock()
	p.accepted++
	if p.listener == nil {
		p.mu.Unlock()
		abort(client)
		broker.Close()
		return
	}
	p.conns[client] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.conns, client)
		p.mu.Unlock()
	}()
	stream := client
	if p.tls != nil {
		stream = tls.Server(client, p.tls)
	}
	var both sync.WaitGroup
	end := func() {
		abort(client)
		abort(broker)
	}
	both.Go(func() { defer end(); p.copy(broker, stream, true) })
	both.Go(func() { defer end(); p.copy(stream, broker, false) })
	both.Wait()
}

func (p *proxy) copy(dst io.Writer, src io.Reader, toBroker bool) {
	buf := make([]byte, 4096)
	for {
		n, err := src.Read(buf)
		p.mu.Lock()
		frozen := p.frozen
		cut := false
		if toBroker && p.cutAfter > 0 {
			if p.cutAfter -= n; p.cutAfter <= 0 {
				p.cutAfter, cut = 0, true
			}
		}
		p.mu.Unlock()
		if frozen != nil {
			<-frozen
			return
		}
		if cut {
			dst.Write(buf[:n/2]) // the broker sees the beginning of something
			return
		}
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// waitFor polls until ok or, after a minute, fails the test.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waiting for %s took too long", what)
		}
	}
}

// logBook collects log lines.
type logBook struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBook) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *logBook) logger() *slog.Logger { return slog.New(slog.NewTextHandler(b, nil)) }

// count tells how many lines hold text.
func (b *logBook) count(text string) int {
	n := 0
	for line := range strings.Lines(b.String()) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}
