package systemd_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/oslomsg/membus"
)

// This file is the broker: as much of an AMQP 0-9-1 server as oslo.messaging's RPC needs, in front of the in-memory bus
// that the embedded controller is on. The agent under test does not tell it from RabbitMQ, and nothing else has to be
// installed. Numbers are those of the specification (amqp0-9-1.xml): class<<16 | method.
const (
	connectionStart   = 10<<16 | 10
	connectionStartOK = 10<<16 | 11
	connectionTune    = 10<<16 | 30
	connectionTuneOK  = 10<<16 | 31
	connectionOpen    = 10<<16 | 40
	connectionClose   = 10<<16 | 50
	connectionCloseOK = 10<<16 | 51
	channelOpen       = 20<<16 | 10
	channelClose      = 20<<16 | 40
	channelCloseOK    = 20<<16 | 41
	exchangeDeclare   = 40<<16 | 10
	queueDeclare      = 50<<16 | 10
	queueBind         = 50<<16 | 20
	queueDelete       = 50<<16 | 40
	basicQos          = 60<<16 | 10
	basicConsume      = 60<<16 | 20
	basicPublish      = 60<<16 | 40
	basicReturn       = 60<<16 | 50
	basicDeliver      = 60<<16 | 60
	basicAck          = 60<<16 | 80
	basicNack         = 60<<16 | 120
	confirmSelect     = 85<<16 | 10

	frameMethod, frameHeader, frameBody, frameHeartbeat = 1, 2, 3, 8
	frameEnd                                            = 0xCE
	frameMax                                            = 128 << 10
)

// broker listens until the test ends.
type broker struct {
	t    *testing.T
	bus  *membus.Bus
	addr string
}

func newBroker(t *testing.T) *broker {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &broker{t: t, bus: membus.New(), addr: l.Addr().String()}
	var running sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			running.Go(func() {
				if err := b.serve(c); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
					t.Logf("broker: %v", err)
				}
				c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return b
}

// session is one connection of a client.
type session struct {
	r    *bufio.Reader
	conn *membus.Conn
	// exchange is what each queue is bound to.
	exchange map[string]string
	channels map[uint16]*channel

	mu sync.Mutex // guards writing: deliveries come from goroutines of their own
	w  net.Conn
}

// channel is one of its channels.
type channel struct {
	id        uint16
	consumers []oslomsg.Consumer
	published uint64 // messages, which are confirmed by their number
	incoming  *incoming

	mu      sync.Mutex // guards what follows
	tag     uint64
	unacked map[uint64]*oslomsg.Message
}

// incoming is a message whose body has not come whole.
type incoming struct {
	oslomsg.Publishing
	left uint64
}

func (c *channel) close() {
	for _, s := range c.consumers {
		_ = s.Close()
	}
	c.consumers = nil
}

func (b *broker) serve(c net.Conn) error {
	s := &session{r: bufio.NewReader(c), w: c, conn: b.bus.Connect(), exchange: map[string]string{}, channels: map[uint16]*channel{}}
	defer s.conn.Close()
	hello := make([]byte, 8)
	if _, err := io.ReadFull(s.r, hello); err != nil {
		return err
	}
	if string(hello) != "AMQP\x00\x00\x09\x01" {
		return fmt.Errorf("greeting %q", hello)
	}
	if err := s.send(0, connectionStart, octet(0), octet(9), emptyTable(), longText("PLAIN AMQPLAIN"), longText("en_US")); err != nil {
		return err
	}
	done := make(chan struct{})
	defer close(done)
	go func() { // heartbeats, more often than anybody asks for
		for {
			select {
			case <-done:
				return
			case <-time.After(5 * time.Second):
				_ = s.heartbeat()
			}
		}
	}()
	for {
		var head [7]byte
		if _, err := io.ReadFull(s.r, head[:]); err != nil {
			return err
		}
		id, size := binary.BigEndian.Uint16(head[1:]), binary.BigEndian.Uint32(head[3:])
		if size > frameMax {
			return fmt.Errorf("a frame of %d bytes", size)
		}
		payload := make([]byte, size+1)
		if _, err := io.ReadFull(s.r, payload); err != nil {
			return err
		}
		if payload[size] != frameEnd {
			return errors.New("a frame without its end")
		}
		payload = payload[:size]
		var err error
		switch head[0] {
		case frameMethod:
			if len(payload) < 4 {
				return errors.New("a method without a number")
			}
			err = s.method(id, binary.BigEndian.Uint32(payload), &fields{payload[4:]})
		case frameHeader, frameBody:
			err = s.content(id, head[0], payload)
		}
		if err != nil {
			return err
		}
	}
}

// method answers one method.
func (s *session) method(id uint16, m uint32, a *fields) error {
	c := s.channels[id]
	if c == nil && id != 0 && m != channelOpen {
		return fmt.Errorf("method %d.%d on channel %d, which is not open", m>>16, m&0xffff, id)
	}
	switch m {
	case connectionStartOK:
		return s.send(0, connectionTune, short(1000), long(frameMax), short(60))
	case connectionTuneOK:
		return nil
	case connectionOpen:
		return s.send(0, connectionOpen+1, octet(0))
	case connectionClose:
		if err := s.send(0, connectionCloseOK); err != nil {
			return err
		}
		return io.EOF
	case channelOpen:
		s.channels[id] = &channel{id: id, unacked: map[uint64]*oslomsg.Message{}}
		return s.send(id, channelOpen+1, long(0))
	case channelClose:
		c.close()
		delete(s.channels, id)
		return s.send(id, channelCloseOK)
	case exchangeDeclare, basicQos, confirmSelect:
		return s.send(id, m+1)
	case queueDeclare:
		a.short()
		return s.send(id, m+1, text(a.text()), long(0), long(0))
	case queueBind:
		a.short()
		name := a.text()
		s.exchange[name] = a.text()
		return s.send(id, m+1)
	case queueDelete:
		a.short()
		delete(s.exchange, a.text())
		return s.send(id, m+1, long(0))
	case basicConsume:
		a.short()
		return s.consume(c, a.text(), a.text())
	case basicPublish:
		a.short()
		c.incoming = &incoming{Publishing: oslomsg.Publishing{Exchange: a.text(), RoutingKey: a.text()}}
		c.incoming.Mandatory = a.octet()&1 != 0
		return nil
	case basicAck, basicNack:
		tag := a.longlong()
		c.mu.Lock()
		msg := c.unacked[tag]
		delete(c.unacked, tag)
		c.mu.Unlock()
		switch {
		case msg == nil:
			return fmt.Errorf("message %d is settled, and was not delivered", tag)
		case m == basicAck:
			return msg.Ack()
		}
		return msg.Requeue()
	}
	return fmt.Errorf("method %d.%d is not known here", m>>16, m&0xffff)
}

// consume delivers the messages of a queue to a channel.
func (s *session) consume(c *channel, queue, tag string) error {
	if tag == "" {
		tag = fmt.Sprintf("c%d", len(c.consumers))
	}
	q := oslomsg.Queue{Name: queue, Exchange: s.exchange[queue], Kind: oslomsg.TopicQueue}
	switch {
	case q.Exchange == "":
		q.Kind = oslomsg.ReplyQueue
	case strings.HasSuffix(q.Exchange, "_fanout"):
		q.Kind = oslomsg.FanoutQueue
	}
	if err := s.send(c.id, basicConsume+1, text(tag)); err != nil {
		return err
	}
	got, err := s.conn.Consume(q, func(m *oslomsg.Message) {
		c.mu.Lock()
		c.tag++
		n := c.tag
		c.unacked[n] = m
		c.mu.Unlock()
		again := octet(0)
		if m.Redelivered {
			again = octet(1)
		}
		// What is not delivered goes back when the consumer is closed, as the connection will be.
		_ = s.message(c.id, m.Body, basicDeliver, text(tag), longlong(n), again, text(m.Exchange), text(m.RoutingKey))
	})
	if err == nil {
		c.consumers = append(c.consumers, got)
	}
	return err
}

// content takes the header and the body of a message, and publishes it when it is whole.
func (s *session) content(id uint16, kind byte, payload []byte) error {
	c := s.channels[id]
	if c == nil || c.incoming == nil {
		return errors.New("content without a message")
	}
	in := c.incoming
	if kind == frameHeader {
		if len(payload) < 12 {
			return errors.New("a short header")
		}
		in.left = binary.BigEndian.Uint64(payload[4:])
	} else {
		if uint64(len(payload)) > in.left {
			return errors.New("a body that is too long")
		}
		in.Body = append(in.Body, payload...)
		in.left -= uint64(len(payload))
	}
	if in.left > 0 {
		return nil
	}
	c.incoming = nil
	c.published++
	// It never waits: this bus is never cut.
	err := s.conn.Publish(context.Background(), in.Publishing)
	if err != nil && in.Mandatory {
		if err := s.message(id, in.Body, basicReturn, short(312), text("NO_ROUTE"), text(in.Exchange), text(in.RoutingKey)); err != nil {
			return err
		}
	}
	return s.send(id, basicAck, longlong(c.published), octet(0))
}
