package novadriver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
)

// maxRequests is how many requests are carried out at a time.
const maxRequests = 512

// serverOptions describe the server of compute.<host> and compute-alt.<host>. The latter exists on every release:
// controllers of 2026.1 and later send events there without asking.
func (d *Driver) serverOptions() oslomsg.ServerOptions {
	handlers := map[string]oslomsg.Handler{}
	for _, m := range methods {
		handlers[m.name] = d.handler(m)
	}
	return oslomsg.ServerOptions{
		Exchange: d.o.ControlExchange,
		Queues:   []string{"compute." + d.o.Host, "compute-alt." + d.o.Host},
		Endpoints: []oslomsg.Endpoint{
			{Version: "6.5", AnyMinor: true, Methods: handlers},
			oslomsg.BaseAPI("compute"),
		},
		Accept: d.accept,
		// Calls may last (an image fetched ahead, an interface that waits for its port): none of them may keep
		// an event from being handed on.
		Workers: maxRequests,
		Ping:    true,
		Logger:  d.log,
	}
}

var methodByName = func() map[string]*method {
	m := make(map[string]*method, len(methods))
	for i := range methods {
		m[methods[i].name] = &methods[i]
	}
	return m
}()

// readRequest reads what all methods have.
func readRequest(dl *oslomsg.Delivery) (*request, error) {
	a, err := decodeArgs(dl.Args)
	if err != nil {
		return nil, err
	}
	return &request{args: a, rc: contextOf(dl.Context), wire: dl.Context, id: dl.UniqueID}, nil
}

// accept is called before a delivery is acked: casts that change an instance are recorded here. An error keeps the
// message on the queue; a message that cannot be read would come back for ever, so it is logged and let go.
func (d *Driver) accept(ctx context.Context, dl *oslomsg.Delivery) error {
	m := methodByName[dl.Method]
	if m == nil || dl.Namespace != "" || m.operation == nil && m.record == nil {
		return nil
	}
	r, err := readRequest(dl)
	if err == nil && m.record != nil {
		err = m.record(ctx, d, r)
	}
	if err != nil {
		d.unreadable(dl, err)
		return nil
	}
	if m.operation == nil {
		return nil
	}
	op, err := d.operationOf(m, r, dl)
	if err != nil {
		d.unreadable(dl, err)
		return nil
	}
	if err := d.agent().Submit(ctx, op); err != nil {
		if errors.Is(err, novalet.ErrUnsupported) {
			d.unreadable(dl, err)
			return nil
		}
		return fmt.Errorf("record %s of instance %s: %w", op.Method, op.Instance.UUID, err)
	}
	return nil
}

// operationOf makes an operation of a cast.
func (d *Driver) operationOf(m *method, r *request, dl *oslomsg.Delivery) (*novalet.Operation, error) {
	inst, err := d.argInstance(r.args)
	if err != nil {
		return nil, err
	}
	received := dl.Received
	if received.IsZero() {
		received = d.o.now()
	}
	op := &novalet.Operation{
		ID: dl.UniqueID, Method: novalet.Method(m.name), Context: r.rc, Instance: *inst, Received: received.UTC().Truncate(time.Microsecond),
	}
	if op.ID == "" {
		op.ID = newUUID() // without one duplicates cannot be told
	}
	return op, m.operation(d, r, op)
}

func (d *Driver) unreadable(dl *oslomsg.Delivery, err error) {
	d.log.Error("a message cannot be carried out and is dropped", "method", dl.Method, "request_id", dl.Context.RequestID(), "unique_id", dl.UniqueID, "err", err)
}

// handler answers the deliveries of a method.
func (d *Driver) handler(m method) oslomsg.Handler {
	return func(ctx context.Context, dl *oslomsg.Delivery) {
		answer := m.answer
		if answer == nil {
			// Recorded by accept. stop_instance may be called for an answer; stock gives one when all is done, here
			// the record stands for it.
			_ = dl.Reply(nil)
			return
		}
		res, err := d.carryOut(ctx, dl, answer)
		if err == nil {
			if err = dl.Reply(res); err == nil {
				return
			}
			d.log.Error("a result cannot be encoded", "method", dl.Method, "err", err)
			return
		}
		f := failureOf(err, instanceUUID(dl))
		level := slog.LevelInfo
		if f.Class == "NovaException" {
			level = slog.LevelError // a fault of this host or of what it needs, not a refusal
		}
		d.log.Log(ctx, level, "request refused", "method", dl.Method, "request_id", dl.Context.RequestID(), "class", f.Class, "err", err)
		dl.Fail(&f.Failure)
	}
}

// carryOut reads the request and runs the method.
func (d *Driver) carryOut(ctx context.Context, dl *oslomsg.Delivery, answer func(context.Context, *Driver, *request) (any, error)) (any, error) {
	r, err := readRequest(dl)
	if err != nil {
		return nil, &failure{oslomsg.Failure{Module: "builtins", Class: "TypeError", Message: err.Error()}}
	}
	return answer(ctx, d, r)
}

// instanceUUID is the instance a request names, for texts.
func instanceUUID(dl *oslomsg.Delivery) string {
	var a struct {
		Instance struct {
			Data struct {
				UUID string `json:"uuid"`
			} `json:"nova_object.data"`
		} `json:"instance"`
	}
	_ = json.Unmarshal(dl.Args, &a)
	return a.Instance.Data.UUID
}
