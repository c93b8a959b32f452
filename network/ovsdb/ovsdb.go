// Package ovsdb speaks as much of OVSDB (RFC 7047) as plugging a port takes: one connection per operation, one
// transaction per change, no cache and no monitor. It starts no goroutine.
package ovsdb

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/novalet/novalet"
)

const (
	database = "Open_vSwitch"
	// timeout bounds one operation; the database answers in milliseconds.
	timeout = 10 * time.Second
	// maxReply bounds what is read of an answer.
	maxReply = 32 << 20
)

// Client talks to one database. It is safe for concurrent use.
type Client struct{ remote string }

// New makes a client for "unix:/path" or "tcp:host:port". It does not connect.
func New(remote string) *Client { return &Client{remote: remote} }

// Port is a port of a bridge with one interface of the same name.
type Port struct {
	Bridge, Name string
	// ExternalIDs are set on the interface; others it has are kept.
	ExternalIDs map[string]string
}

// Bridge is what is read of a bridge.
type Bridge struct {
	Name string
	// Datapath is the datapath_type: "" or "system" for the kernel, "netdev" for userspace.
	Datapath string
}

// ErrNoBridge: the switch has no bridge of that name.
var ErrNoBridge = errors.New("no such bridge")

// Bridge reads a bridge. Errors: ErrNoBridge; novalet.ErrTryAgain when the database cannot be reached.
func (c *Client) Bridge(ctx context.Context, name string) (*Bridge, error) {
	res, err := c.transact(ctx, op{"op": "select", "table": "Bridge", "where": where("name", name), "columns": []string{"datapath_type"}})
	if err != nil {
		return nil, fmt.Errorf("read bridge %s: %w", name, err)
	}
	if len(res[0].Rows) == 0 {
		return nil, fmt.Errorf("read bridge %s: %w", name, ErrNoBridge)
	}
	b := &Bridge{Name: name}
	_ = json.Unmarshal(res[0].Rows[0]["datapath_type"], &b.Datapath)
	return b, nil
}

// AddPort puts the port into the bridge with its ids, in one transaction: no agent sees it without them. A port that
// is there already gets the ids. Errors as Bridge's.
func (c *Client) AddPort(ctx context.Context, p Port) error {
	for try := 0; ; try++ {
		err := c.addPort(ctx, p)
		if err == nil {
			return nil
		}
		// Somebody else may have added a row of that name between the look and the change.
		if try < 3 && strings.Contains(err.Error(), "constraint violation") {
			continue
		}
		return fmt.Errorf("add port %s to bridge %s: %w", p.Name, p.Bridge, err)
	}
}

func (c *Client) addPort(ctx context.Context, p Port) error {
	res, err := c.transact(ctx,
		op{"op": "select", "table": "Bridge", "where": where("name", p.Bridge), "columns": []string{"_uuid", "ports"}},
		op{"op": "select", "table": "Port", "where": where("name", p.Name), "columns": []string{"_uuid"}},
		op{"op": "select", "table": "Interface", "where": where("name", p.Name), "columns": []string{"_uuid"}})
	if err != nil {
		return err
	}
	if len(res[0].Rows) == 0 {
		return ErrNoBridge
	}
	comment := op{"op": "comment", "comment": "novalet: add " + p.Name}
	if len(res[1].Rows) == 0 || len(res[2].Rows) == 0 {
		_, err = c.transact(ctx,
			op{"op": "insert", "table": "Interface", "uuid-name": "new_iface", "row": op{"name": p.Name, "external_ids": ovsMap(p.ExternalIDs)}},
			op{"op": "insert", "table": "Port", "uuid-name": "new_port", "row": op{"name": p.Name, "interfaces": []string{"named-uuid", "new_iface"}}},
			op{"op": "mutate", "table": "Bridge", "where": where("name", p.Bridge), "mutations": []any{
				[]any{"ports", "insert", []any{"set", []any{[]string{"named-uuid", "new_port"}}}}}},
			comment)
		return err
	}
	port := res[1].Rows[0]["_uuid"]
	keys := make([]string, 0, len(p.ExternalIDs))
	for k := range p.ExternalIDs {
		keys = append(keys, k)
	}
	_, err = c.transact(ctx,
		// A port that stands in another bridge has to leave it first: a row has one parent.
		op{"op": "mutate", "table": "Bridge", "where": []any{[]any{"name", "!=", p.Bridge}, []any{"ports", "includes", port}},
			"mutations": []any{[]any{"ports", "delete", port}}},
		op{"op": "mutate", "table": "Bridge", "where": where("name", p.Bridge), "mutations": []any{[]any{"ports", "insert", port}}},
		op{"op": "mutate", "table": "Interface", "where": where("name", p.Name), "mutations": []any{
			[]any{"external_ids", "delete", []any{"set", keys}},
			[]any{"external_ids", "insert", ovsMap(p.ExternalIDs)}}},
		comment)
	return err
}

// AddBridge makes a bridge of that datapath with the ids, unless there is one of that name, which is left as it is.
func (c *Client) AddBridge(ctx context.Context, b Bridge, externalIDs map[string]string) error {
	_, err := c.Bridge(ctx, b.Name)
	if !errors.Is(err, ErrNoBridge) {
		return err
	}
	// A bridge has a port of its own name, through which the host would reach it.
	_, err = c.transact(ctx,
		op{"op": "insert", "table": "Interface", "uuid-name": "new_iface", "row": op{"name": b.Name, "type": "internal"}},
		op{"op": "insert", "table": "Port", "uuid-name": "new_port", "row": op{"name": b.Name, "interfaces": []string{"named-uuid", "new_iface"}}},
		op{"op": "insert", "table": "Bridge", "uuid-name": "new_bridge", "row": op{"name": b.Name, "datapath_type": b.Datapath,
			"ports": []string{"named-uuid", "new_port"}, "external_ids": ovsMap(externalIDs)}},
		op{"op": "mutate", "table": "Open_vSwitch", "where": []any{}, "mutations": []any{
			[]any{"bridges", "insert", []any{"set", []any{[]string{"named-uuid", "new_bridge"}}}}}},
		op{"op": "comment", "comment": "novalet: add bridge " + b.Name})
	if err != nil && strings.Contains(err.Error(), "constraint violation") {
		_, err = c.Bridge(ctx, b.Name) // somebody else was quicker
	}
	if err != nil {
		return fmt.Errorf("add bridge %s: %w", b.Name, err)
	}
	return nil
}

// DelBridge removes a bridge with its ports if its ids satisfy may. Nil when there is none.
func (c *Client) DelBridge(ctx context.Context, name string, may func(externalIDs map[string]string) bool) error {
	res, err := c.transact(ctx, op{"op": "select", "table": "Bridge", "where": where("name", name), "columns": []string{"_uuid", "external_ids"}})
	if err != nil {
		return fmt.Errorf("delete bridge %s: %w", name, err)
	}
	if len(res[0].Rows) == 0 || !may(readMap(res[0].Rows[0]["external_ids"])) {
		return nil
	}
	_, err = c.transact(ctx,
		op{"op": "mutate", "table": "Open_vSwitch", "where": []any{}, "mutations": []any{[]any{"bridges", "delete", res[0].Rows[0]["_uuid"]}}},
		op{"op": "comment", "comment": "novalet: delete bridge " + name})
	if err != nil {
		return fmt.Errorf("delete bridge %s: %w", name, err)
	}
	return nil
}

// DelPort takes a port out of its bridge if the ids of its interface satisfy may. Nil when there is none.
func (c *Client) DelPort(ctx context.Context, name string, may func(externalIDs map[string]string) bool) error {
	res, err := c.transact(ctx,
		op{"op": "select", "table": "Port", "where": where("name", name), "columns": []string{"_uuid"}},
		op{"op": "select", "table": "Interface", "where": where("name", name), "columns": []string{"external_ids"}})
	if err != nil {
		return fmt.Errorf("delete port %s: %w", name, err)
	}
	if len(res[0].Rows) == 0 || len(res[1].Rows) == 0 || !may(readMap(res[1].Rows[0]["external_ids"])) {
		return nil
	}
	port := res[0].Rows[0]["_uuid"]
	_, err = c.transact(ctx,
		op{"op": "mutate", "table": "Bridge", "where": []any{[]any{"ports", "includes", port}}, "mutations": []any{[]any{"ports", "delete", port}}},
		op{"op": "comment", "comment": "novalet: delete " + name})
	if err != nil {
		return fmt.Errorf("delete port %s: %w", name, err)
	}
	return nil
}

// AwaitWithout blocks until the interface has gone or has no longer the key among its external_ids: by the operation wait (RFC
// 7047, 5.2.6). Errors: ErrNoKey when it is like that already; novalet.ErrTryAgain when the database cannot be reached; nothing
// changed for ten seconds.
func (c *Client) AwaitWithout(ctx context.Context, name, key string) error {
	for first := true; ; first = false {
		res, err := c.transact(ctx, op{"op": "select", "table": "Interface", "where": where("name", name), "columns": []string{"external_ids"}})
		if err != nil {
			return fmt.Errorf("look at interface %s: %w", name, err)
		}
		has := false
		if len(res[0].Rows) > 0 {
			_, has = readMap(res[0].Rows[0]["external_ids"])[key]
		}
		switch {
		case !has && first:
			return fmt.Errorf("interface %s: %w", name, ErrNoKey)
		case !has:
			return nil
		}
		_, err = c.transact(ctx, op{"op": "wait", "timeout": timeout.Milliseconds(), "table": "Interface", "where": where("name", name),
			"columns": []string{"external_ids"}, "until": "!=", "rows": []any{res[0].Rows[0]}})
		if err != nil {
			return fmt.Errorf("wait for interface %s: %w", name, err)
		}
	}
}

// ErrNoKey: an interface is without a key among its external_ids.
var ErrNoKey = errors.New("no such key")

// Interfaces lists name and ids of the interfaces that have the key among their external_ids.
func (c *Client) Interfaces(ctx context.Context, key string) (map[string]map[string]string, error) {
	return c.marked(ctx, "Interface", key)
}

// Bridges lists name and ids of the bridges that have the key among their external_ids.
func (c *Client) Bridges(ctx context.Context, key string) (map[string]map[string]string, error) {
	return c.marked(ctx, "Bridge", key)
}

func (c *Client) marked(ctx context.Context, table, key string) (map[string]map[string]string, error) {
	res, err := c.transact(ctx, op{"op": "select", "table": table, "where": []any{}, "columns": []string{"name", "external_ids"}})
	if err != nil {
		return nil, fmt.Errorf("list rows of %s: %w", table, err)
	}
	out := map[string]map[string]string{}
	for _, row := range res[0].Rows {
		var name string
		ids := readMap(row["external_ids"])
		if _, ok := ids[key]; ok && json.Unmarshal(row["name"], &name) == nil {
			out[name] = ids
		}
	}
	return out, nil
}

type op map[string]any

// opResult is the result of one operation of a transaction.
type opResult struct {
	Rows    []map[string]json.RawMessage `json:"rows"`
	Error   string                       `json:"error"`
	Details string                       `json:"details"`
}

func where(column, value string) []any { return []any{[]any{column, "==", value}} }

func ovsMap(m map[string]string) []any {
	pairs := [][]string{}
	for k, v := range m {
		pairs = append(pairs, []string{k, v})
	}
	return []any{"map", pairs}
}

func readMap(raw json.RawMessage) map[string]string {
	var outer []json.RawMessage
	var pairs [][]string
	m := map[string]string{}
	if json.Unmarshal(raw, &outer) != nil || len(outer) != 2 || json.Unmarshal(outer[1], &pairs) != nil {
		return m
	}
	for _, p := range pairs {
		if len(p) == 2 {
			m[p[0]] = p[1]
		}
	}
	return m
}

// transact runs the operations as one transaction. The results are as many as the operations.
func (c *Client) transact(ctx context.Context, ops ...op) ([]opResult, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: reach Open vSwitch: %w", novalet.ErrTryAgain, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	params := []any{database}
	for _, o := range ops {
		params = append(params, o)
	}
	if err := json.NewEncoder(conn).Encode(map[string]any{"method": "transact", "params": params, "id": 1}); err != nil {
		return nil, fmt.Errorf("%w: ask Open vSwitch: %w", novalet.ErrTryAgain, err)
	}
	dec := json.NewDecoder(bufio.NewReader(io.LimitReader(conn, maxReply)))
	for {
		var m struct {
			ID     json.RawMessage `json:"id"`
			Method string          `json:"method"`
			Params json.RawMessage `json:"params"`
			Result []*opResult     `json:"result"`
			Error  json.RawMessage `json:"error"`
		}
		if err := dec.Decode(&m); err != nil {
			return nil, fmt.Errorf("%w: read Open vSwitch's answer: %w", novalet.ErrTryAgain, err)
		}
		if m.Method == "echo" {
			// The server asks whether we are alive (RFC 7047, 4.1.11).
			if err := json.NewEncoder(conn).Encode(map[string]any{"id": m.ID, "result": m.Params, "error": nil}); err != nil {
				return nil, fmt.Errorf("%w: answer Open vSwitch: %w", novalet.ErrTryAgain, err)
			}
			continue
		}
		if m.Method != "" {
			continue
		}
		if len(m.Error) > 0 && string(m.Error) != "null" {
			return nil, fmt.Errorf("open vswitch refuses: %.300s", m.Error)
		}
		return results(m.Result, len(ops))
	}
}

// results finds the error of a transaction: in place of the operation that failed, or behind the last one.
func results(list []*opResult, n int) ([]opResult, error) {
	out := make([]opResult, 0, n)
	for _, r := range list {
		if r == nil {
			r = &opResult{Error: "not carried out"}
		}
		if r.Error != "" {
			return nil, fmt.Errorf("open vswitch: %.100s: %.300s", r.Error, r.Details)
		}
		out = append(out, *r)
	}
	if len(out) < n {
		return nil, fmt.Errorf("%w: open vswitch answers %d of %d operations", novalet.ErrTryAgain, len(out), n)
	}
	return out, nil
}

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	kind, addr, ok := strings.Cut(c.remote, ":")
	if !ok || kind != "unix" && kind != "tcp" {
		return nil, fmt.Errorf("%q is neither unix:PATH nor tcp:HOST:PORT", c.remote)
	}
	var d net.Dialer
	return d.DialContext(ctx, kind, addr)
}
