package oslomsg

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Notification is a message to whoever listens outside of Nova: no method, no answer.
type Notification struct {
	Publisher string // "compute.host1", or "nova-compute:host1" for versioned payloads
	Event     string // "compute.instance.create.end"
	Priority  string // INFO, ERROR, …: part of the routing key
	Payload   any    // encodes as JSON
	At        time.Time
}

// safeContext are the parts of a request context that a notification carries: no token and no service catalog
// (oslo_messaging/notify/notifier.py).
var safeContext = []string{
	"user_id", "project_id", "domain_id", "user_domain_id", "project_domain_id", "is_admin", "request_id", "roles",
	"user_name", "project_name", "domain_name", "user_domain_name", "project_domain_name", "service_user_id",
	"service_user_domain_id", "service_user_domain_name", "service_project_id", "service_project_name",
	"service_project_domain_id", "service_project_domain_name", "service_roles", "global_request_id", "system_scope",
	"user", "domain", "user_domain", "project_domain",
}

// Notify publishes n on topic and returns once the broker has confirmed it. It declares the queue
// "<topic>.<priority>" first, as oslo does, so that what nobody listens to yet is kept. envelope is the form of the
// driver messagingv2; without it, it is that of messaging. It blocks and fails as Transport.Publish does.
func Notify(ctx context.Context, t Transport, exchange, topic string, n *Notification, rctx Context, envelope bool) error {
	message := map[string]any{
		"message_id": newUUID(), "publisher_id": n.Publisher, "event_type": n.Event, "priority": n.Priority, "payload": n.Payload,
		"timestamp": n.At.UTC().Format("2006-01-02 15:04:05.000000"), "_unique_id": newID(),
	}
	for k, v := range rctx {
		if slices.Contains(safeContext, k) {
			message[contextPrefix+k] = v
		}
	}
	wrap := marshal
	if envelope {
		wrap = seal
	}
	body, err := wrap(message)
	if err != nil {
		return fmt.Errorf("encode notification %s: %w", n.Event, err)
	}
	key := topic + "." + strings.ToLower(n.Priority)
	if err := t.Publish(ctx, Publishing{Exchange: Target{Exchange: exchange}.exchange(), RoutingKey: key, DeclareQueue: true, Body: body}); err != nil {
		return fmt.Errorf("notify %s: %w", key, err)
	}
	return nil
}
