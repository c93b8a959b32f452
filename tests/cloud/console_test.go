package cloud_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/remoteconsoles"
)

// viewer is a web socket to nova-serialproxy, as Horizon and the command line open one.
type viewer struct {
	conn net.Conn

	mu   sync.Mutex
	seen strings.Builder
	end  error
}

// serialURL asks for the serial console of a server, as its user.
func serialURL(t testing.TB, u *user, id string) string {
	t.Helper()
	c := *u.compute
	c.Microversion = "2.8"
	r, err := remoteconsoles.Create(t.Context(), &c, id, remoteconsoles.CreateOpts{
		Protocol: remoteconsoles.ConsoleProtocolSerial, Type: remoteconsoles.ConsoleTypeSerial}).Extract()
	if err != nil {
		t.Fatalf("serial console of %s: %v", id, err)
	}
	return r.URL
}

// view opens a web socket; what comes is read until it closes.
func view(t testing.TB, url string) *viewer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	d := ws.Dialer{Protocols: []string{"binary"}}
	conn, early, _, err := d.Dial(ctx, url)
	if err != nil {
		// The address holds the token.
		t.Fatalf("connect to nova-serialproxy: %v", strings.ReplaceAll(err.Error(), url, "its address"))
	}
	v := &viewer{conn: conn}
	var from io.Reader = conn
	if early != nil {
		from = io.MultiReader(early, conn)
	}
	var done sync.WaitGroup
	done.Go(func() {
		rw := struct {
			io.Reader
			io.Writer
		}{from, conn}
		for {
			b, _, err := wsutil.ReadServerData(rw)
			v.mu.Lock()
			v.seen.Write(b)
			v.end = err
			v.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	t.Cleanup(func() { _ = conn.Close(); done.Wait() })
	return v
}

func (v *viewer) write(t testing.TB, text string) {
	t.Helper()
	if err := wsutil.WriteClientBinary(v.conn, []byte(text)); err != nil {
		t.Fatalf("type %q: %v", text, err)
	}
}

// wait waits until the viewer has seen a text.
func (v *viewer) wait(t testing.TB, want string) {
	t.Helper()
	eventually(t, long, fmt.Sprintf("the console shows %q", want), func() error {
		v.mu.Lock()
		defer v.mu.Unlock()
		if strings.Contains(v.seen.String(), want) {
			return nil
		}
		return fmt.Errorf("seen so far: %q (%v)", tail(v.seen.String(), 300), v.end)
	})
}

// closed waits until the other side has ended the web socket.
func (v *viewer) closed(t testing.TB) {
	t.Helper()
	eventually(t, long, "the console closes", func() error {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.end == nil {
			return errors.New("it is open")
		}
		return nil
	})
}

// TestSerialConsole: a user types to the server through nova-serialproxy and sees what it answers; a second viewer sees the
// same and what was there before it came; a token that was made up, and one of a server that stopped, open nothing.
func TestSerialConsole(t *testing.T) {
	u := as(t, "demo")
	image := upload(t, u, imageSpec{name: "novalet-test-shell", container: "docker", disk: "raw", props: map[string]string{"os_command_line": "/bin/sh"}},
		bytes.NewReader(dockerArchive(t, busyboxRoot(t), appConfig())))
	s := boot(t, u, bootOpts{name: "typed-to", image: image, noNet: true})
	url := serialURL(t, u, s.ID)
	first := view(t, url)
	first.write(t, "echo $((6*7)) is what it says\r")
	first.wait(t, "\n42 is what it says\r\n")
	second := view(t, serialURL(t, u, s.ID))
	second.wait(t, "\n42 is what it says\r\n")
	second.write(t, "echo $((7*8)) too\r")
	first.wait(t, "\n56 too\r\n")
	if log := consoleLog(t, u, s.ID); !strings.Contains(log, "42 is what it says") {
		t.Errorf("what was shown is not in the console log: %q", log)
	}

	refused := func(what, url string) {
		t.Helper()
		v := view(t, url)
		v.closed(t)
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.seen.Len() > 0 {
			t.Errorf("%s shows %q", what, v.seen.String())
		}
	}
	known, _, _ := strings.Cut(url, "?")
	refused("a made-up token", known+"?token=00000000-0000-0000-0000-000000000000")
	// The shell is the server's first process; a stop would wait for its end, which a shell does not think of.
	second.write(t, "exit\r")
	waitStatus(t, u, s.ID, "SHUTOFF")
	first.closed(t)
	second.closed(t)
	refused("the token of a server that stopped", url)
}
