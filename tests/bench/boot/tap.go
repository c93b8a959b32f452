package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// tap listens to what passes the exchange nova: casts to computes and calls to the conductor, and what computes cast to
// the schedulers. It sees each message when
// the broker has it, the same for both contenders.
type tap struct {
	conn *amqp.Connection

	mu    sync.Mutex
	seen  []event
	bytes int64
}

// event is one message.
type event struct {
	at       time.Time
	key      string // routing key
	method   string // RPC method, or Object.method for the conductor's object calls
	request  string // request id
	uuid     string // instance, where the message names one
	vmState  string // that an Instance.save writes
	size     int
	nodeSave bool
	replyTo  string // queue of the caller, which tells one service from another; "" of a cast
	host     string // the message names as its sender's
	service  int64  // id of the service's row that the message saves
}

func openTap(url string, hosts []string) (*tap, error) {
	conn, err := amqp.Dial(url)
	if err != nil {
		return nil, fmt.Errorf("connect to the broker: %w", err)
	}
	t := &tap{conn: conn}
	ch, err := conn.Channel()
	if err != nil {
		return nil, err
	}
	q, err := ch.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		return nil, err
	}
	for _, key := range append([]string{"conductor"}, keysOf(hosts)...) {
		if err := ch.QueueBind(q.Name, key, "nova", false, nil); err != nil {
			return nil, fmt.Errorf("bind %s: %w", key, err)
		}
	}
	// What computes tell the schedulers of their instances.
	if err := ch.QueueBind(q.Name, "", "scheduler_fanout", false, nil); err != nil {
		return nil, fmt.Errorf("bind scheduler_fanout: %w", err)
	}
	in, err := ch.Consume(q.Name, "", true, true, false, false, nil)
	if err != nil {
		return nil, err
	}
	go func() { // ends with the connection
		for d := range in {
			e := parse(d.RoutingKey, d.Body)
			t.mu.Lock()
			t.seen = append(t.seen, e)
			t.bytes += int64(len(d.Body))
			t.mu.Unlock()
		}
	}()
	return t, nil
}

func keysOf(hosts []string) []string {
	var k []string
	for _, h := range hosts {
		k = append(k, "compute."+h, "compute-alt."+h)
	}
	return k
}

func parse(key string, body []byte) event {
	e := event{at: time.Now(), key: key, size: len(body)}
	var env struct {
		Message string `json:"oslo.message"`
	}
	_ = json.Unmarshal(body, &env)
	var m struct {
		Method  string `json:"method"`
		Request string `json:"_context_request_id"`
		ReplyQ  string `json:"_reply_q"`
		Args    struct {
			Host      string `json:"host_name"`
			ObjName   string `json:"objname"`
			ObjMethod string `json:"objmethod"`
			ObjInst   *struct {
				Name string `json:"nova_object.name"`
				Data struct {
					ID           int64  `json:"id"`
					UUID         string `json:"uuid"`
					InstanceUUID string `json:"instance_uuid"`
					Host         string `json:"host"`
					VMState      string `json:"vm_state"`
				} `json:"nova_object.data"`
				Changes []string `json:"nova_object.changes"`
			} `json:"objinst"`
			Instance *struct {
				Data struct {
					UUID string `json:"uuid"`
				} `json:"nova_object.data"`
			} `json:"instance"`
		} `json:"args"`
	}
	_ = json.Unmarshal([]byte(env.Message), &m)
	e.method, e.request, e.replyTo, e.host = m.Method, m.Request, m.ReplyQ, m.Args.Host
	if i := m.Args.Instance; i != nil {
		e.uuid = i.Data.UUID
	}
	if m.Args.ObjName != "" {
		e.method = m.Args.ObjName + "." + m.Args.ObjMethod
	}
	if o := m.Args.ObjInst; o != nil {
		e.method = o.Name + "." + m.Args.ObjMethod
		e.uuid = o.Data.UUID
		if o.Data.InstanceUUID != "" {
			e.uuid = o.Data.InstanceUUID
		}
		for _, c := range o.Changes {
			if c == "vm_state" {
				e.vmState = o.Data.VMState
			}
		}
	}
	if o := m.Args.ObjInst; o != nil && (o.Name == "Service" || o.Name == "ComputeNode") {
		e.host = o.Data.Host
	}
	if o := m.Args.ObjInst; o != nil && o.Name == "Service" {
		e.service = o.Data.ID
	}
	e.nodeSave = strings.HasPrefix(e.method, "ComputeNode.") || strings.HasPrefix(e.method, "Service.")
	return e
}

// since returns what was seen from a moment on.
func (t *tap) since(at time.Time) []event {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []event
	for _, e := range t.seen {
		if !e.at.Before(at) {
			out = append(out, e)
		}
	}
	return out
}

// wait returns as soon as a call for an instance was seen that came from a moment on, with a vm_state that it writes if one is
// given, or after a while without.
func (t *tap) wait(from time.Time, uuid, method, vmState string, atMost time.Duration) {
	for end := time.Now().Add(atMost); !t.saw(from, uuid, method, vmState) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
}

func (t *tap) saw(from time.Time, uuid, method, vmState string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := len(t.seen) - 1; i >= 0 && !t.seen[i].at.Before(from); i-- {
		if t.seen[i].ends(uuid, method, vmState) {
			return true
		}
	}
	return false
}

// ends: the message is the call for an instance that ends an operation, with the vm_state that it writes if one is given.
func (e *event) ends(uuid, method, vmState string) bool {
	return e.uuid == uuid && e.method == method && (vmState == "" || e.vmState == vmState)
}

// span is the time between a cast of a method for an instance and the save that gives it a vm_state; ok is false while
// one of the two is missing.
func span(events []event, uuid, cast, save, vmState string) (time.Duration, bool) {
	var from, to time.Time
	for _, e := range events {
		if e.uuid != uuid {
			continue
		}
		if e.method == cast && strings.HasPrefix(e.key, "compute.") {
			from = e.at
		}
		if e.ends(uuid, save, vmState) {
			to = e.at
		}
	}
	return to.Sub(from), !from.IsZero() && !to.IsZero()
}

// calls counts what one request asked of the conductor. Saves of the node and the service are counted apart.
func calls(events []event, request string) int {
	n := 0
	for _, e := range events {
		if e.key == "conductor" && e.request == request && !e.nodeSave && strings.Contains(e.method, ".") {
			n++
		}
	}
	return n
}

// requestOf is the request id of a cast.
func requestOf(events []event, uuid, cast string) string {
	for _, e := range events {
		if e.uuid == uuid && e.method == cast {
			return e.request
		}
	}
	return ""
}

// traffic is what one service has sent.
type traffic struct{ messages, bytes int }

// senders adds up the messages of computes, by host, that came from a moment on. A service is known by the queue its
// answers go to: of each some message names the host, or the row of the service, as a heartbeat does; rows tells whose it is.
// unknown counts those of which none does, by what they are.
func (t *tap) senders(from time.Time, rows map[int64]string) (by map[string]traffic, unknown map[string]int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	hosts := map[string]string{}
	for _, e := range t.seen {
		if e.replyTo == "" {
			continue
		}
		if e.host != "" {
			hosts[e.replyTo] = e.host
		} else if host := rows[e.service]; host != "" {
			hosts[e.replyTo] = host
		}
	}
	by, unknown = map[string]traffic{}, map[string]int{}
	for _, e := range t.seen {
		if e.at.Before(from) || strings.HasPrefix(e.key, "compute") {
			continue
		}
		host := e.host
		if e.replyTo != "" {
			host = hosts[e.replyTo]
		}
		if host == "" {
			unknown[fmt.Sprintf("%s of %s to %q", e.method, e.replyTo, e.key)]++
			continue
		}
		s := by[host]
		by[host] = traffic{s.messages + 1, s.bytes + e.size}
	}
	return by, unknown
}
