package oslomsg_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet/novadriver/oslomsg"
)

// python is the interpreter that has oslo.messaging.
func python(t *testing.T) string {
	t.Helper()
	p := os.Getenv("NOVALET_OSLO_PYTHON")
	if p == "" {
		t.Skip("NOVALET_OSLO_PYTHON names no python with oslo.messaging")
	}
	return p
}

// A stock oslo.messaging client calls our server.
func TestInteropClient(t *testing.T) {
	py := python(t)
	b := newBroker(t)
	notes := make(chan string, 1)
	tr := b.dial()
	b.tidy()
	s, err := oslomsg.Serve(tr, oslomsg.ServerOptions{
		Exchange: b.exchange(), Queues: []string{b.queue()}, Logger: b.opt.Logger,
		Endpoints: append(methods(map[string]oslomsg.Handler{
			"echo": func(_ context.Context, d *oslomsg.Delivery) {
				d.Reply(map[string]any{"value": d.Arg("value"), "user_id": d.Context.String("user_id")})
			},
			"nothing":       func(_ context.Context, d *oslomsg.Delivery) { d.Reply(nil) },
			"note":          func(_ context.Context, d *oslomsg.Delivery) { notes <- string(d.Arg("value")) },
			"unimplemented": func(_ context.Context, d *oslomsg.Delivery) { d.Fail(oslomsg.NotImplemented("not here")) },
			"missing": func(_ context.Context, d *oslomsg.Delivery) {
				d.Fail(&oslomsg.Failure{Module: "nova.exception", Class: "InstanceNotFound", Message: "Instance x could not be found."})
			},
			"slow": func(_ context.Context, d *oslomsg.Delivery) {
				time.Sleep(5 * time.Second) // longer than the call monitor
				d.Reply("late")
			},
		}), oslomsg.BaseAPI("compute")),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown(context.Background())
	b.ready(s.Ready)

	cmd := exec.CommandContext(t.Context(), py, "testdata/interop.py", "client", os.Getenv("NOVALET_AMQP_URL"), b.exchange(), b.name, "host1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	want := strings.Join([]string{
		`["echo", {"user_id": "u1", "value": {"text": "<\u00fc\u2028>", "n": [1, null, 2.5]}}]`,
		`["null", null]`,
		`["cast", null]`,
		`["builtin", {"raised": "NotImplementedError", "value": "not here\n"}]`,
		`["nova", {"remote": "InstanceNotFound", "value": "Instance x could not be found."}]`,
		`["method", {"remote": "NoSuchMethod", "value": "Endpoint does not support RPC method nosuch"}]`,
		`["version", {"remote": "UnsupportedVersion", "value": "Endpoint does not support RPC version 7.0. Attempted method: echo"}]`,
		`["ping", {"arg": "hello", "service": "compute"}]`,
		`["slow", "late"]`,
	}, "\n")
	got := strings.TrimSpace(string(out))
	rest := got[strings.LastIndexByte(got, '\n')+1:]
	if !strings.HasPrefix(rest, `["unmonitored", {"raised": "MessagingTimeout`) {
		t.Errorf("a call without heartbeats gave %s", rest)
	}
	if diff := cmp.Diff(want, strings.TrimSpace(strings.TrimSuffix(got, rest))); diff != "" {
		t.Errorf("the client saw (-want +got):\n%s\n%s", diff, stderr.String())
	}
	select {
	case note := <-notes:
		if note != `"cast"` {
			t.Errorf("cast brought %s", note)
		}
	case <-time.After(time.Minute):
		t.Error("the cast did not arrive")
	}
}

// A stock oslo.messaging listener hears our notifications, in both forms of the message, also one that was sent before
// it came.
func TestInteropNotification(t *testing.T) {
	py := python(t)
	b := newBroker(t)
	ch := b.raw()
	t.Cleanup(func() {
		ch.QueueDelete(b.name+".info", false, false, false)
		ch.ExchangeDelete(b.exchange(), false, false)
	})
	tr := b.dial()
	rctx := oslomsg.AdminContext(time.Now())
	rctx.Set("request_id", "req-1")
	rctx.Set("auth_token", "SECRET")
	send := func(event string, envelope bool) {
		t.Helper()
		err := oslomsg.Notify(t.Context(), tr, b.exchange(), b.name, &oslomsg.Notification{Publisher: "compute.host1", Event: event, Priority: "INFO",
			Payload: map[string]any{"text": "<ü>"}, At: time.Now()}, rctx, envelope)
		if err != nil {
			t.Fatal(err)
		}
	}
	send("first", true)
	cmd := exec.Command(py, "testdata/interop.py", "listener", os.Getenv("NOVALET_AMQP_URL"), b.exchange(), b.name, "host1")
	cmd.Stderr = b.log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("listener: %v", err)
		}
	}()
	lines := bufio.NewReader(stdout)
	for _, event := range []string{"first", "second", "third"} {
		if event != "first" {
			send(event, event == "second")
		}
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("%v\n%s", err, b.log)
		}
		for _, part := range []string{`"request_id": "req-1"`, `"compute.host1", "` + event + `", {"text": "<\u00fc>"}, ["message_id", "timestamp"]`} {
			if !strings.Contains(line, part) {
				t.Errorf("%s: the listener heard %s", event, line)
			}
		}
		if strings.Contains(line, "SECRET") {
			t.Error("the token is in the notification")
		}
	}
}

// Our client calls a stock oslo.messaging server.
func TestInteropServer(t *testing.T) {
	py := python(t)
	b := newBroker(t)
	b.tidy()
	cmd := exec.Command(py, "testdata/interop.py", "server", os.Getenv("NOVALET_AMQP_URL"), b.exchange(), b.name, "host1")
	cmd.Stderr = b.log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("server: %v", err)
		}
	}()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("server says %q, %v\n%s", line, err, b.log)
	}
	c := b.client(b.dial())
	to := b.target()
	to.Version = "3.0"
	rctx := oslomsg.AdminContext(time.Now())
	rctx.Set("user_id", "u2")

	raw, err := c.Call(t.Context(), to, "echo", map[string]any{"value": "<ü>"}, rctx)
	var got any
	if err != nil || json.Unmarshal(raw, &got) != nil {
		t.Fatalf("%s, %v", raw, err)
	}
	if diff := cmp.Diff(any(map[string]any{"value": "<ü>", "user_id": "u2"}), got); diff != "" {
		t.Errorf("echo (-want +got):\n%s", diff)
	}
	if raw, err := c.Call(t.Context(), to, "nothing", nil, rctx); err != nil || string(raw) != "null" {
		t.Errorf("null: %s, %v", raw, err)
	}
	if raw, err := c.Call(t.Context(), to, "slow", map[string]int{"seconds": 5}, rctx, oslomsg.WithCallMonitor(2*time.Second)); err != nil || string(raw) != `"late"` {
		t.Errorf("slow: %s, %v", raw, err)
	}
	var remote *oslomsg.RemoteError
	if _, err := c.Call(t.Context(), to, "fails", nil, rctx); !errors.As(err, &remote) ||
		remote.Class != "Odd" || remote.Message != "it is odd" || string(remote.Kwargs["code"]) != "418" || len(remote.Traceback) == 0 {
		t.Errorf("failure: %#v, %v", remote, err)
	}
	for method, class := range map[string]string{"nosuch": "NoSuchMethod", "_private": "NoSuchMethod"} {
		if _, err := c.Call(t.Context(), to, method, nil, rctx); !errors.As(err, &remote) || remote.Class != class || remote.Module != "oslo_messaging.rpc.dispatcher" {
			t.Errorf("%s: %v", method, err)
		}
	}
	to.Version = "3.1"
	if _, err := c.Call(t.Context(), to, "echo", nil, rctx); !errors.As(err, &remote) || remote.Class != "UnsupportedVersion" {
		t.Errorf("version: %v", err)
	}
}
