// Package oslomsg speaks oslo.messaging's RPC protocol over RabbitMQ, as the
// rabbit driver of oslo.messaging 14.0 (Zed) to 18 does: the same exchanges and
// queues, the same JSON-in-JSON envelope, replies, failures, call-monitor
// heartbeats and duplicate suppression.
//
// A [Transport] moves bytes: [Dial] gives the one over AMQP 0-9-1, package
// membus one inside the process. Everything above it is the same for both, so
// that what runs without a broker sends and reads the very same messages.
//
//   - [Client] calls, casts and fans out.
//   - [Server] consumes the queues of one host and dispatches to [Endpoint]s.
//
// # Goroutines
//
// Dial starts one goroutine for each of its two connections, one for each
// consumer, and two for each exchange published to. A Server starts one for each queue, one for each delivery that is
// being handled (bounded), and one for each reply on its way. Close and
// Shutdown wait for all of them. Nothing is kept on disk.
package oslomsg
