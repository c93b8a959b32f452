// Package novadriver is the bus side of the agent. (In Nova "driver" is the hypervisor side; here the driver is
// what lets Nova drive us.) It registers this host with Nova as a compute service, serves the compute RPC API 6.0
// to 6.5, keeps the ComputeNode record and the Placement provider true, and gives the agent the conductor as
// [novalet.Conductor].
//
//	nova-api, conductor --call, cast--> Server --Submit, …--> novalet.Compute (agent)
//	agent --novalet.Conductor--> object_action & co. --> nova-conductor
//
// Casts become operations: one is decoded, handed to Compute.Submit, and acked only when Submit has recorded it. Calls
// are answered from a goroutine of their own and never wait for an instance's queue. What cannot be done is refused
// with the exception that nova-api turns into the right HTTP answer; docs/compute-api.md lists every method.
//
// # Goroutines
//
// Start runs the start-up to its end and then starts the heartbeat, the resource tracker, the release watch, the
// casts to the schedulers, the look for lost builds and the audit of use, one goroutine each. New starts the one that
// sends notifications, when there are any. Close waits for all of them.
//
// # On disk
//
// The file compute_id in the state directory holds the ComputeNode's uuid, as stock nova-compute does.
package novadriver
