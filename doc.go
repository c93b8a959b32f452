// Package novalet holds the words and contracts that the parts of the agent share: the domain types
// (instance, flavor, image, vif, container) and, beside each, the interface through which one part uses
// another. It does no I/O and starts no goroutine.
//
// The parts are novadriver (Nova's bus), agent (the life of each instance), glancebridge (images),
// network (ports and plugs) and engine (containers). They import this package and never one another;
// cmd joins them:
//
//	novadriver  --Compute-->  agent  --Conductor, Placement-->  novadriver
//	                            |----ImageStore----> glancebridge
//	                            |----NetworkAPI----> network/neutron (or the embedded controller)
//	                            |----VIFPlugger----> network
//	                            '----Runtime-------> engine
//
// Names are Nova's up to agent (instance, flavor, vif, host, task_state) and OCI's below it (layer,
// diffID, container, process).
package novalet
