package oslomsg

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

func TestPause(t *testing.T) {
	o := DefaultOptions()
	for n, want := range []time.Duration{1, 3, 5, 7} {
		if got := o.pause(n); got != want*time.Second {
			t.Errorf("attempt %d: %s, want %ds", n, got, want)
		}
	}
	if got := o.pause(1 << 40); got != 30*time.Second {
		t.Errorf("after many attempts: %s", got)
	}
	if got := (&Options{}).pause(0); got <= 0 {
		t.Errorf("without options: %s", got)
	}
}

// One line when the broker goes, one for each other trouble, one when all
// connections are back.
func TestOutagesAreLoggedOnce(t *testing.T) {
	var buf bytes.Buffer
	o := newOutages(slog.New(slog.NewTextHandler(&buf, nil)))
	take := func() string {
		var lines []string
		for line := range strings.Lines(buf.String()) {
			_, msg, _ := strings.Cut(line, "msg=")
			msg, _, _ = strings.Cut(strings.TrimPrefix(msg, `"`), `"`)
			lines = append(lines, strings.TrimSpace(msg))
		}
		buf.Reset()
		return strings.Join(lines, "|")
	}
	h := Host{Name: "h", Port: 1}
	unreachable := &dialError{kind: "unreachable", text: "cannot reach"}
	refused := &dialError{kind: "refused", text: "broker refuses user"}
	o.add("publish")
	o.add("consume")
	for range 5 {
		o.down("publish", h, unreachable)
		o.down("consume", h, unreachable)
	}
	if got := take(); got != "waiting for the broker" {
		t.Errorf("start without a broker: %s", got)
	}
	o.down("publish", h, refused)
	o.down("publish", h, refused)
	if got := take(); got != "waiting for the broker" {
		t.Errorf("then it refuses: %s", got)
	}
	o.up("publish", h)
	if got := take(); got != "" {
		t.Errorf("one of two is there: %s", got)
	}
	o.up("consume", h)
	if got := take(); got != "connected to the broker" {
		t.Errorf("both are there: %s", got)
	}
	for range 3 {
		o.down("publish", h, errors.New("EOF"))
		o.down("consume", h, errors.New("EOF"))
		o.down("consume", h, unreachable)
	}
	if got := take(); got != "lost the broker, reconnecting" {
		t.Errorf("lost: %s", got)
	}
	o.down("consume", h, refused)
	o.down("consume", h, refused)
	if got := take(); got != "cannot connect to the broker again, retrying" {
		t.Errorf("refused after a loss: %s", got)
	}
	o.up("publish", h)
	o.up("consume", h)
	if got := take(); got != "connected to the broker again" {
		t.Errorf("back: %s", got)
	}
}

func TestBlockedLink(t *testing.T) {
	opt := DefaultOptions()
	l := newLink("publish", &opt, []Host{{Name: "h", Port: 5672}}, newOutages(logger(nil)))
	conn := &amqp.Connection{}
	l.up(l.hosts[0], conn)
	l.block(amqp.Blocking{Active: true, Reason: "low on memory"})
	if err := (Health{Links: []Link{l.health()}}).Err(); err == nil || err.Error() != "publish: broker h:5672 takes no messages: low on memory" {
		t.Errorf("health: %v", err)
	}
	if got, err := l.await(t.Context(), false); got != conn || err != nil {
		t.Errorf("a consumer waits for a blocked connection: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.await(ctx, true); !errors.Is(err, context.Canceled) {
		t.Errorf("a publisher does not wait: %v", err)
	}
	l.block(amqp.Blocking{})
	if got, err := l.await(t.Context(), true); got != conn || err != nil {
		t.Errorf("a publisher waits after the end: %v", err)
	}
	l.block(amqp.Blocking{Active: true})
	l.down(l.hosts[0], errors.New("EOF"))
	l.up(l.hosts[0], conn)
	if err := (Health{Links: []Link{l.health()}}).Err(); err != nil {
		t.Errorf("a new connection is still blocked: %v", err)
	}
}

// serveTCP accepts connections and hands them to fn until the test ends.
func serveTCP(t *testing.T, fn func(net.Conn)) Host {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fn(c)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return Host{Name: "127.0.0.1", Port: l.Addr().(*net.TCPAddr).Port, User: "u", Password: "hidden"}
}

func TestDialErrors(t *testing.T) {
	opt := DefaultOptions()
	dial := func(h Host) string {
		_, err := opt.dial(t.Context(), h, "test")
		if err == nil {
			t.Fatal("connected")
		}
		if strings.Contains(err.Error(), "hidden") {
			t.Errorf("the password is shown: %v", err)
		}
		return err.Error()
	}
	nobody := serveTCP(t, func(net.Conn) {})
	if text := dial(nobody); !strings.HasPrefix(text, "no AMQP with broker "+nobody.Addr()) {
		t.Errorf("somebody else listens: %s", text)
	}
	opt.TLS.Enabled = true
	plain := serveTCP(t, func(c net.Conn) { c.Read(make([]byte, 5)); c.Write([]byte("AMQP\x00\x00\x09\x01")) })
	if text := dial(plain); !strings.HasPrefix(text, "TLS with broker "+plain.Addr()) || !strings.Contains(text, "TLS port?") {
		t.Errorf("no TLS: %s", text)
	}
	opt.TLS.CAFile = "/nonexistent/ca.pem"
	if text := dial(nobody); !strings.Contains(text, "read CA file: open /nonexistent/ca.pem") {
		t.Errorf("no CA file: %s", text)
	}
	closed := nobody
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Port = l.Addr().(*net.TCPAddr).Port
	l.Close()
	if text := dial(closed); !strings.HasPrefix(text, "cannot reach broker "+closed.Addr()+": ") {
		t.Errorf("nobody listens: %s", text)
	}
	for _, c := range []struct {
		err  error
		want string
	}{
		{amqp.ErrSASL, "offers no login method"},
		{amqp.ErrCredentials, "broker refuses user u at h:1 (ACCESS_REFUSED)"},
		{&amqp.Error{Code: 403, Reason: "user 'u' - invalid credentials", Server: true}, "broker refuses user u at h:1 (ACCESS_REFUSED): user 'u'"},
		{&amqp.Error{Code: 530, Reason: "vhost x not found", Server: true}, `refuses vhost "x" for user u: vhost x not found`},
		{amqp.ErrVhost, `refuses vhost "x" for user u`},
	} {
		opt.URL.Vhost = "x"
		if text := opt.explain(c.err, Host{Name: "h", Port: 1, User: "u"}).Error(); !strings.Contains(text, c.want) {
			t.Errorf("%v: %s", c.err, text)
		}
	}
}

// A broker that accepts and says nothing does not keep Close waiting.
func TestCloseWhileConnecting(t *testing.T) {
	release := make(chan struct{})
	h := serveTCP(t, func(net.Conn) { <-release })
	defer close(release)
	opt := DefaultOptions()
	opt.URL = URL{Hosts: []Host{h}, Vhost: "/"}
	tr, err := Dial(opt)
	if err != nil {
		t.Fatal(err)
	}
	c, err := tr.Consume(Queue{Name: "q", Exchange: "nova"}, func(*Message) {})
	if err != nil {
		t.Fatal(err)
	}
	published := make(chan error, 1)
	go func() { published <- tr.Publish(context.Background(), Publishing{RoutingKey: "q"}) }()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Ready(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("ready: %v", err)
	}
	if err := tr.Health().Err(); err == nil {
		t.Error("healthy")
	}
	if err := tr.Close(); err != nil {
		t.Error(err)
	}
	if err := <-published; !errors.Is(err, ErrClosed) {
		t.Errorf("publish: %v", err)
	}
	if err := c.Ready(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("ready after close: %v", err)
	}
	if _, err := tr.Consume(Queue{Name: "q"}, func(*Message) {}); !errors.Is(err, ErrClosed) {
		t.Errorf("consume after close: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := Dial(Options{}); err == nil {
		t.Error("no hosts, no error")
	}
}

// makeCert makes a certificate for name, signed by parent or by itself.
func makeCert(t *testing.T, name string, parent *tls.Certificate) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: parent == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	signer, signKey := tmpl, any(key)
	if parent != nil {
		if signer, err = x509.ParseCertificate(parent.Certificate[0]); err != nil {
			t.Fatal(err)
		}
		signKey = parent.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, signer, &key.PublicKey, signKey)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, text []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	ca, caPEM := makeCert(t, "ca", nil)
	_, otherPEM := makeCert(t, "other ca", nil)
	leaf, leafPEM := makeCert(t, "broker.example", &ca)
	keyDER, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	caFile, otherFile := write("ca.pem", caPEM), write("other.pem", otherPEM)
	certFile := write("cert.pem", leafPEM)
	keyFile := write("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	empty := write("empty.pem", []byte("nothing"))

	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(caPEM)
	h := serveTCP(t, func(c net.Conn) {
		tls.Server(c, &tls.Config{Certificates: []tls.Certificate{leaf}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool}).Handshake()
	})
	for _, c := range []struct {
		name string
		o    TLSOptions
		host string
		want string // "" connects
	}{
		{"no CA is not verified", TLSOptions{}, "elsewhere.example", ""},
		{"the right name", TLSOptions{CAFile: caFile}, "broker.example", ""},
		{"another name", TLSOptions{CAFile: caFile}, "elsewhere.example", "not elsewhere.example"},
		{"another name, not checked", TLSOptions{CAFile: caFile, SkipHostname: true}, "elsewhere.example", ""},
		{"another CA", TLSOptions{CAFile: otherFile}, "broker.example", "unknown authority"},
		{"another CA, name not checked", TLSOptions{CAFile: otherFile, SkipHostname: true}, "broker.example", "unknown authority"},
		{"client certificate", TLSOptions{CAFile: caFile, CertFile: certFile, KeyFile: keyFile}, "broker.example", ""},
		{"no client key", TLSOptions{CertFile: certFile, KeyFile: empty}, "broker.example", "load client certificate"},
		{"empty CA file", TLSOptions{CAFile: empty}, "broker.example", "holds no certificate"},
		{"TLS 1.2", TLSOptions{CAFile: caFile, Version: "TLSv1_2"}, "broker.example", ""},
		{"odd version", TLSOptions{Version: "9"}, "broker.example", "is not supported"},
	} {
		err := func() error {
			cfg, err := c.o.config(c.host)
			if err != nil {
				return err
			}
			raw, err := net.Dial("tcp", h.Addr())
			if err != nil {
				return err
			}
			defer raw.Close()
			return tls.Client(raw, cfg).Handshake()
		}()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}
