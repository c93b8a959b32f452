package novadriver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

// caller is the part of oslomsg.Client that is used.
type caller interface {
	Call(ctx context.Context, to oslomsg.Target, method string, args any, rctx oslomsg.Context, opts ...oslomsg.CallOption) (json.RawMessage, error)
	Cast(ctx context.Context, to oslomsg.Target, method string, args any, rctx oslomsg.Context) error
	Fanout(ctx context.Context, to oslomsg.Target, method string, args any, rctx oslomsg.Context) error
}

// rpc sends requests to nova-conductor and repeats them while it, the broker or its database is away.
type rpc struct {
	client   caller
	exchange string
	release  *releaseBox
	timeout  time.Duration
	pause    time.Duration
	log      *slog.Logger
	away     atomic.Bool // said that the conductor does not answer
	calls    atomic.Int64
}

// answer is what object_action returns.
type answer struct {
	updates json.RawMessage // fields of the object after the call
	result  json.RawMessage // of the method
	// repeated: an earlier try may have been carried out, its answer was lost.
	repeated bool
}

// object calls a method of an object (object_action). The error of an attempt that was answered is a
// *oslomsg.RemoteError; when nobody answers until ctx ends it is ErrTryAgain.
func (r *rpc) object(ctx context.Context, rctx oslomsg.Context, o *ovo.Object, method string, args []any, kwargs map[string]any) (*answer, error) {
	what := o.Name + "." + method
	var a answer
	for range 3 {
		raw, repeated, err := r.call(ctx, rctx, what, "object_action", map[string]any{
			"objinst": o, "objmethod": method, "args": list(args), "kwargs": dict(kwargs),
		})
		a.repeated = a.repeated || repeated
		if err != nil {
			if name, v := tooNew(err); name == o.Name && v != o.Version {
				r.release.lower(name, v)
				o = o.Clone()
				o.Version = v
				if name == "Instance" {
					o.Unset("compute_id")
				}
				continue
			}
			return &a, err
		}
		var pair []json.RawMessage
		if err := json.Unmarshal(raw, &pair); err != nil || len(pair) != 2 {
			return &a, fmt.Errorf("%s: the conductor's answer is no pair of updates and result", what)
		}
		a.updates, a.result = pair[0], pair[1]
		return &a, nil
	}
	return &a, fmt.Errorf("%s: the conductor takes no version of %s", what, o.Name)
}

// class calls a method of a class (object_class_action_versions).
func (r *rpc) class(ctx context.Context, rctx oslomsg.Context, name, method string, args []any, kwargs map[string]any) (json.RawMessage, error) {
	what := name + "." + method
	for range 3 {
		raw, _, err := r.call(ctx, rctx, what, "object_class_action_versions", map[string]any{
			"objname": name, "objmethod": method, "object_versions": r.release.get().Manifest(name),
			"args": list(args), "kwargs": dict(kwargs),
		})
		if n, v := tooNew(err); n != "" && r.release.get().Version(n) != v {
			r.release.lower(n, v)
			continue
		}
		return raw, err
	}
	return nil, fmt.Errorf("%s: the conductor takes no version of %s", what, name)
}

// call sends one request until it is answered. repeated says that more than one attempt may have been carried out.
func (r *rpc) call(ctx context.Context, rctx oslomsg.Context, what, method string, args any) (raw json.RawMessage, repeated bool, err error) {
	to := oslomsg.Target{Exchange: r.exchange, Topic: "conductor", Version: "3.0"}
	return r.send(ctx, rctx, to, what, method, args, r.timeout)
}

func (r *rpc) send(ctx context.Context, rctx oslomsg.Context, to oslomsg.Target, what, method string, args any, timeout time.Duration) (raw json.RawMessage, repeated bool, err error) {
	r.calls.Add(1)
	for {
		raw, err = r.client.Call(ctx, to, method, args, rctx, oslomsg.WithTimeout(timeout))
		var late *oslomsg.TimeoutError
		var remote *oslomsg.RemoteError
		switch {
		case err == nil:
			r.answered()
			return raw, repeated, nil
		case errors.As(err, &remote):
			if !passing(remote) {
				r.answered()
				return nil, repeated, fmt.Errorf("%s: %w", what, err)
			}
		case errors.As(err, &late):
			repeated = repeated || late.Sent
		case errors.Is(err, oslomsg.ErrNoExchange):
		default:
			// Closed, or the caller's context ended.
			return nil, repeated, fmt.Errorf("%w: %s: %w", novalet.ErrTryAgain, what, err)
		}
		if ctx.Err() == nil && r.away.CompareAndSwap(false, true) {
			r.log.Warn("the conductor does not answer; waiting for it", "call", what, "err", err)
		}
		if late == nil && !sleep(ctx, r.pause) || ctx.Err() != nil {
			return nil, repeated, fmt.Errorf("%w: %s: %w", novalet.ErrTryAgain, what, err)
		}
	}
}

func (r *rpc) answered() {
	if r.away.CompareAndSwap(true, false) {
		r.log.Info("the conductor answers")
	}
}

// passing reports whether the failure is of the conductor's database and goes by itself.
func passing(e *oslomsg.RemoteError) bool {
	if strings.HasPrefix(e.Module, "oslo_db.") {
		return e.Class == "DBDeadlock" || e.Class == "DBConnectionError" || e.Class == "RetryRequest"
	}
	return e.Module == "sqlalchemy.exc" && (e.Class == "TimeoutError" || e.Class == "OperationalError")
}

// tooNew takes object and supported version from an IncompatibleObjectVersion.
func tooNew(err error) (name, supported string) {
	var e *oslomsg.RemoteError
	if !errors.As(err, &e) || e.Class != "IncompatibleObjectVersion" {
		return "", ""
	}
	_ = json.Unmarshal(e.Kwargs["objname"], &name)
	_ = json.Unmarshal(e.Kwargs["supported"], &supported)
	if supported == "" {
		return "", ""
	}
	return name, supported
}

// isClass reports whether err is a failure of one of the classes.
func isClass(err error, classes ...string) bool {
	var e *oslomsg.RemoteError
	if !errors.As(err, &e) {
		return false
	}
	for _, c := range classes {
		if e.Class == c {
			return true
		}
	}
	return false
}

// sleep waits, or returns false when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func list(l []any) []any {
	if l == nil {
		return []any{}
	}
	return l
}

func dict(m map[string]any) map[string]any {
	if m == nil {
		return map[string]any{}
	}
	return m
}
