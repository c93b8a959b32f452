// Package placement keeps this host's resource provider in Nova's Placement: its inventory, its traits and the
// allocations of instances that end here. It follows what stock nova-compute sends (microversions 1.6 to 1.30, all
// present in every Placement since Stein). What others put on the provider (aggregates, their traits, inventories of
// other classes, allocation ratios set through the API) is left as it is.
//
// It starts no goroutine and keeps nothing on disk.
package placement
