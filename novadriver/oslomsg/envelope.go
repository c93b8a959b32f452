package oslomsg

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// Keys of the envelope and of the message inside, as oslo.messaging names them.
const (
	keyEnvelopeVersion = "oslo.version"
	keyEnvelopeMessage = "oslo.message"
	envelopeVersion    = "2.0"
	contextPrefix      = "_context_"
)

// defaultMaxBody bounds a message, packed and unpacked.
const defaultMaxBody = 64 << 20

// defaultVersion is that of a request that names none.
const defaultVersion = "1.0"

var errTooLarge = errors.New("message is larger than the limit")

// seal wraps a message: JSON as a text inside JSON.
func seal(message any) ([]byte, error) {
	inner, err := marshal(message)
	if err != nil {
		return nil, err
	}
	return marshal(map[string]string{keyEnvelopeVersion: envelopeVersion, keyEnvelopeMessage: string(inner)})
}

// open unwraps the body of a message: it uncompresses it, checks the envelope
// and returns the JSON inside. A body that is no envelope is a bare message,
// as very old senders made them.
func open(m *Message, limit int) (json.RawMessage, error) {
	body, err := uncompress(m, limit)
	if err != nil {
		return nil, err
	}
	var top map[string]json.RawMessage
	if err := json.Unmarshal(body, &top); err != nil {
		return nil, fmt.Errorf("read envelope: %w", err)
	}
	version, isVersioned := top[keyEnvelopeVersion]
	message, hasMessage := top[keyEnvelopeMessage]
	if !isVersioned || !hasMessage {
		return body, nil
	}
	if v := rawString(version); !compatible(v, envelopeVersion, false) {
		return nil, fmt.Errorf("read envelope: version %q is not supported", clip(v, 20))
	}
	var inner string
	if err := json.Unmarshal(message, &inner); err != nil {
		return nil, errors.New("read envelope: the message is no text")
	}
	return json.RawMessage(inner), nil
}

// uncompress undoes kombu's compression and enforces the limit, before and
// after.
func uncompress(m *Message, limit int) ([]byte, error) {
	if len(m.Body) > limit {
		return nil, fmt.Errorf("%w (%d > %d bytes)", errTooLarge, len(m.Body), limit)
	}
	var r io.Reader
	switch m.Compression {
	case "":
		return m.Body, nil
	case "application/x-gzip":
		z, err := gzip.NewReader(bytes.NewReader(m.Body))
		if err != nil {
			return nil, fmt.Errorf("uncompress: %w", err)
		}
		r = z
	case "application/x-bz2":
		r = bzip2.NewReader(bytes.NewReader(m.Body))
	default:
		return nil, fmt.Errorf("compression %q is not supported", clip(m.Compression, 40))
	}
	body, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	if err != nil {
		return nil, fmt.Errorf("uncompress: %w", err)
	}
	if len(body) > limit {
		return nil, fmt.Errorf("%w (more than %d bytes uncompressed)", errTooLarge, limit)
	}
	return body, nil
}

// encodeRequest makes the body of a call or cast. more holds the keys that
// only a call has.
func encodeRequest(to Target, method string, args any, rctx Context, more map[string]any) ([]byte, error) {
	encoded, err := marshal(args)
	if err != nil {
		return nil, fmt.Errorf("encode args of %s: %w", method, err)
	}
	if isNull(encoded) {
		encoded = json.RawMessage("{}")
	}
	if encoded[0] != '{' {
		return nil, fmt.Errorf("encode args of %s: they are no object", method)
	}
	message := make(map[string]any, len(rctx)+8)
	for k, v := range rctx {
		message[contextPrefix+k] = v
	}
	for k, v := range more {
		message[k] = v
	}
	message["method"], message["args"] = method, json.RawMessage(encoded)
	message["version"] = to.version()
	if to.Namespace != "" {
		message["namespace"] = to.Namespace
	}
	message["_unique_id"] = newID()
	body, err := seal(message)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", method, err)
	}
	return body, nil
}

// parseRequest reads the message of a request; inner is what open returned.
func parseRequest(inner json.RawMessage) (*Delivery, error) {
	var top map[string]json.RawMessage
	if err := json.Unmarshal(inner, &top); err != nil {
		return nil, fmt.Errorf("read request: %w", err)
	}
	d := &Delivery{
		Method:    rawString(top["method"]),
		Version:   rawString(top["version"]),
		Namespace: rawString(top["namespace"]),
		UniqueID:  rawString(top["_unique_id"]),
		MsgID:     rawString(top["_msg_id"]),
		ReplyTo:   rawString(top["_reply_q"]),
		Args:      top["args"],
		Context:   Context{},
		message:   inner,
	}
	if d.Method == "" {
		return nil, errors.New("read request: no method")
	}
	if isNull(d.Args) {
		d.Args = json.RawMessage("{}")
	}
	if d.Args[0] != '{' {
		return nil, fmt.Errorf("read request %s: args are no object", clip(d.Method, 60))
	}
	if d.Version == "" {
		d.Version = defaultVersion
	}
	d.Timeout = seconds(top["_timeout"])
	for k, v := range top {
		if key, ok := strings.CutPrefix(k, contextPrefix); ok {
			d.Context[key] = v
		}
	}
	return d, nil
}

// seconds reads a number of seconds; anything else is 0.
func seconds(raw json.RawMessage) time.Duration {
	var f float64
	if json.Unmarshal(raw, &f) != nil || !(f > 0) {
		return 0
	}
	return time.Duration(min(f, 7*24*3600) * float64(time.Second))
}

// reply is one message of an answer.
type reply struct {
	msgID   string
	result  json.RawMessage // nil for null
	failure *RemoteError
	ending  bool
}

// encodeReply makes the body of an answer. failure is "" for none.
func encodeReply(msgID string, result json.RawMessage, failure string, ending bool) ([]byte, error) {
	message := map[string]any{
		"result": result, "failure": nil, "ending": ending, "_msg_id": msgID, "_unique_id": newID(),
	}
	if failure != "" {
		message["failure"] = failure
	}
	return seal(message)
}

// parseReply reads the message of an answer.
func parseReply(inner json.RawMessage) (*reply, error) {
	var top map[string]json.RawMessage
	if err := json.Unmarshal(inner, &top); err != nil {
		return nil, fmt.Errorf("read reply: %w", err)
	}
	r := &reply{msgID: rawString(top["_msg_id"])}
	if r.msgID == "" {
		return nil, errors.New("read reply: no _msg_id")
	}
	if v := top["result"]; !isNull(v) {
		r.result = v
	}
	if v := top["failure"]; !isNull(v) {
		r.failure = decodeFailure(v)
	}
	if json.Unmarshal(top["ending"], &r.ending) != nil {
		r.ending = false
	}
	return r, nil
}

// compatible reports whether a request of version want can be served by have:
// the same major and, unless anyMinor, a minor that is not newer; a third
// component counts only when the minors are equal.
func compatible(want, have string, anyMinor bool) bool {
	w, ok1 := parseVersion(want)
	h, ok2 := parseVersion(have)
	if !ok1 || !ok2 || w[0] != h[0] {
		return false
	}
	return anyMinor || w[1] < h[1] || w[1] == h[1] && w[2] <= h[2]
}

func parseVersion(s string) (v [3]int, ok bool) {
	parts := strings.Split(s, ".")
	if len(parts) > len(v) {
		return v, false
	}
	for i, p := range parts {
		n, err := strconv.Atoi(p)
		if err != nil || n < 0 {
			return v, false
		}
		v[i] = n
	}
	return v, true
}
