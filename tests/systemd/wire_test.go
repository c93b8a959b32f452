package systemd_test

import "encoding/binary"

// This file is how AMQP writes its values: integers in network order, texts behind their length.

func octet(n byte) []byte      { return []byte{n} }
func short(n uint16) []byte    { return binary.BigEndian.AppendUint16(nil, n) }
func long(n uint32) []byte     { return binary.BigEndian.AppendUint32(nil, n) }
func longlong(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
func text(s string) []byte     { return append([]byte{byte(len(s))}, s...) }
func longText(s string) []byte { return append(long(uint32(len(s))), s...) }
func emptyTable() []byte       { return long(0) }
func join(parts [][]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// fields reads the arguments of a method. Past their end are zeros: the client under test is trusted so far.
type fields struct{ b []byte }

func (f *fields) take(n int) []byte {
	out := make([]byte, n)
	f.b = f.b[copy(out, f.b):]
	return out
}

func (f *fields) octet() byte      { return f.take(1)[0] }
func (f *fields) short() uint16    { return binary.BigEndian.Uint16(f.take(2)) }
func (f *fields) longlong() uint64 { return binary.BigEndian.Uint64(f.take(8)) }
func (f *fields) text() string     { return string(f.take(int(f.octet()))) }

// send writes a method.
func (s *session) send(channel uint16, method uint32, args ...[]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.write(frameMethod, channel, append(long(method), join(args)...))
}

// message writes a method with the content that belongs to it, and nothing between them.
func (s *session) message(channel uint16, body []byte, method uint32, args ...[]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.write(frameMethod, channel, append(long(method), join(args)...))
	if err == nil {
		// Class, weight, size, no properties.
		err = s.write(frameHeader, channel, join([][]byte{short(uint16(method >> 16)), short(0), longlong(uint64(len(body))), short(0)}))
	}
	const most = frameMax - 8
	for len(body) > 0 && err == nil {
		n := min(len(body), most)
		err = s.write(frameBody, channel, body[:n])
		body = body[n:]
	}
	return err
}

func (s *session) heartbeat() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.write(frameHeartbeat, 0, nil)
}

// write writes one frame. The caller holds mu.
func (s *session) write(kind byte, channel uint16, payload []byte) error {
	_, err := s.w.Write(join([][]byte{octet(kind), short(channel), long(uint32(len(payload))), payload, octet(frameEnd)}))
	return err
}
