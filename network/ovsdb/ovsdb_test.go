package ovsdb

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
)

// server starts a real ovsdb-server with Open vSwitch's schema on a socket of the test's own.
func server(t *testing.T) (remote string) {
	t.Helper()
	const schema = "/usr/share/openvswitch/vswitch.ovsschema"
	bin, err := exec.LookPath("ovsdb-server")
	if err != nil {
		if bin, err = exec.LookPath("/usr/sbin/ovsdb-server"); err != nil {
			t.Skip("needs ovsdb-server (package openvswitch-switch)")
		}
	}
	if _, err := os.Stat(schema); err != nil {
		t.Skip("needs Open vSwitch's schema (package openvswitch-switch)")
	}
	dir := t.TempDir()
	db, sock := filepath.Join(dir, "conf.db"), filepath.Join(dir, "db.sock")
	if out, err := exec.Command("ovsdb-tool", "create", db, schema).CombinedOutput(); err != nil {
		t.Fatalf("ovsdb-tool: %v: %s", err, out)
	}
	cmd := exec.Command(bin, db, "--remote=punix:"+sock, "--unixctl="+filepath.Join(dir, "ctl"), "--log-file="+filepath.Join(dir, "log"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	c := New("unix:" + sock)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := c.transact(t.Context(), op{"op": "select", "table": "Open_vSwitch", "where": []any{}})
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	return "unix:" + sock
}

// bridges makes the root row with bridges, as the switch's own tools do.
func bridges(t *testing.T, c *Client, names ...string) {
	t.Helper()
	ops := []op{}
	set := []any{}
	for i, n := range names {
		id := fmt.Sprintf("b%d", i)
		ops = append(ops, op{"op": "insert", "table": "Bridge", "uuid-name": id, "row": op{"name": n, "datapath_type": "netdev"}})
		set = append(set, []string{"named-uuid", id})
	}
	ops = append(ops, op{"op": "insert", "table": "Open_vSwitch", "row": op{"bridges": []any{"set", set}}})
	if _, err := c.transact(t.Context(), ops...); err != nil {
		t.Fatal(err)
	}
}

// ports lists the ports of a bridge by name.
func ports(t *testing.T, c *Client, bridge string) []string {
	t.Helper()
	res, err := c.transact(t.Context(),
		op{"op": "select", "table": "Bridge", "where": where("name", bridge), "columns": []string{"ports"}},
		op{"op": "select", "table": "Port", "where": []any{}, "columns": []string{"_uuid", "name"}})
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, row := range res[1].Rows {
		var id []string
		var name string
		_ = json.Unmarshal(row["_uuid"], &id)
		_ = json.Unmarshal(row["name"], &name)
		if strings.Contains(string(res[0].Rows[0]["ports"]), id[1]) {
			out = append(out, name)
		}
	}
	return out
}

func all(map[string]string) bool { return true }

func TestPorts(t *testing.T) {
	c := New(server(t))
	ctx := t.Context()
	p := Port{Bridge: "br-int", Name: "tap1", ExternalIDs: map[string]string{"iface-id": "x", "novalet": "mine"}}
	if err := c.AddPort(ctx, p); !errors.Is(err, ErrNoBridge) {
		t.Fatalf("no bridge: %v", err)
	}
	bridges(t, c, "br-int", "br-old")
	b, err := c.Bridge(ctx, "br-int")
	if err != nil || b.Datapath != "netdev" {
		t.Fatalf("bridge %+v, %v", b, err)
	}
	if _, err := c.Bridge(ctx, "br-none"); !errors.Is(err, ErrNoBridge) {
		t.Errorf("unknown bridge: %v", err)
	}
	for range 2 {
		if err := c.AddPort(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	// Agents write ids of their own; ours change, theirs stay.
	if _, err := c.transact(ctx, op{"op": "mutate", "table": "Interface", "where": where("name", "tap1"), "mutations": []any{
		[]any{"external_ids", "insert", ovsMap(map[string]string{"ovn-installed": "true"})}}}); err != nil {
		t.Fatal(err)
	}
	p.ExternalIDs["iface-id"] = "y"
	if err := c.AddPort(ctx, p); err != nil {
		t.Fatal(err)
	}
	got, err := c.Interfaces(ctx, "novalet")
	want := map[string]map[string]string{"tap1": {"iface-id": "y", "novalet": "mine", "ovn-installed": "true"}}
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("interfaces: %v\n%s", err, d)
	}
	// From another bridge it is taken over whole.
	p.Bridge = "br-old"
	if err := c.AddPort(ctx, p); err != nil {
		t.Fatal(err)
	}
	if in, old := ports(t, c, "br-int"), ports(t, c, "br-old"); len(in) != 0 || len(old) != 1 {
		t.Errorf("moved: %v %v", in, old)
	}

	if err := c.DelPort(ctx, "tap1", func(ids map[string]string) bool { return ids["novalet"] == "other" }); err != nil {
		t.Fatal(err)
	}
	if n := ports(t, c, "br-old"); len(n) != 1 {
		t.Error("a port of somebody else was deleted")
	}
	for range 2 {
		if err := c.DelPort(ctx, "tap1", all); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := c.Interfaces(ctx, "novalet"); err != nil || len(got) != 0 {
		t.Errorf("left: %v, %v", got, err)
	}
}

func TestAwaitWithout(t *testing.T) {
	c := New(server(t))
	bridges(t, c, "br-int")
	if err := c.AddPort(t.Context(), Port{Bridge: "br-int", Name: "tap1", ExternalIDs: map[string]string{"iface-id": "x"}}); err != nil {
		t.Fatal(err)
	}
	change := func(ops ...op) {
		t.Helper()
		if _, err := c.transact(t.Context(), ops...); err != nil {
			t.Fatal(err)
		}
	}
	mutate := func(what string, v any) op {
		return op{"op": "mutate", "table": "Interface", "where": where("name", "tap1"), "mutations": []any{[]any{"external_ids", what, v}}}
	}
	insert := func(k string) op { return mutate("insert", ovsMap(map[string]string{k: "true"})) }
	remove := func(k string) op { return mutate("delete", []any{"set", []string{k}}) }
	for _, name := range []string{"tap1", "tap-none"} {
		if err := c.AwaitWithout(t.Context(), name, "mark"); !errors.Is(err, ErrNoKey) {
			t.Errorf("%s without a mark: %v", name, err)
		}
	}
	for what, end := range map[string]func(){
		"the mark goes":      func() { change(remove("mark")) },
		"the interface goes": func() { _ = c.DelPort(t.Context(), "tap1", all) },
	} {
		change(insert("mark"))
		done := make(chan error, 1)
		go func() { done <- c.AwaitWithout(t.Context(), "tap1", "mark") }()
		// Other keys come and go meanwhile.
		for range 5 {
			change(insert("other"))
			change(remove("other"))
		}
		select {
		case err := <-done:
			t.Fatalf("%s: it ended before that: %v", what, err)
		case <-time.After(100 * time.Millisecond):
		}
		end()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if err := c.AddPort(t.Context(), Port{Bridge: "br-int", Name: "tap1"}); err != nil {
			t.Fatal(err)
		}
	}
	change(insert("mark"))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := c.AwaitWithout(ctx, "tap1", "mark"); err == nil {
		t.Error("it ended without a reason")
	}
}

// scripted answers one connection with fixed lines.
func scripted(t *testing.T, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		r := bufio.NewReader(conn)
		_, _ = r.ReadString('\n')
		for _, s := range lines {
			_, _ = conn.Write([]byte(s))
		}
		if len(lines) > 0 && strings.Contains(lines[0], "echo") {
			_, _ = r.ReadString('\n') // the answer to it
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return "unix:" + path
}

func TestAnswers(t *testing.T) {
	const good = `{"id":1,"error":null,"result":[{"rows":[{"datapath_type":""}]}]}`
	for _, c := range []struct {
		name  string
		lines []string
		again bool // ErrTryAgain
		fails bool
	}{
		{"good", []string{good}, false, false},
		{"asked whether we live", []string{`{"id":"echo","method":"echo","params":[]}`, good}, false, false},
		{"a notification first", []string{`{"id":null,"method":"update","params":[]}`, good}, false, false},
		{"hung up", nil, true, true},
		{"garbage", []string{"\x00\x01"}, true, true},
		{"too few results", []string{`{"id":1,"error":null,"result":[]}`}, true, true},
		{"refused", []string{`{"id":1,"error":"unknown database","result":null}`}, false, true},
		{"an operation failed", []string{`{"id":1,"error":null,"result":[null,{"error":"constraint violation","details":"x"}]}`}, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := New(scripted(t, c.lines...)).Bridge(t.Context(), "br-int")
			if (err != nil) != c.fails || errors.Is(err, novalet.ErrTryAgain) != c.again {
				t.Errorf("error %v", err)
			}
		})
	}
	if _, err := New("unix:/nowhere/db.sock").Bridge(t.Context(), "br-int"); !errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("switch away: %v", err)
	}
	if _, err := New("ssl:x").Bridge(t.Context(), "br-int"); err == nil {
		t.Error("an unknown remote was accepted")
	}
}
