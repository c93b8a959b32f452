//go:build !standin

package sriov

// sysfsRoot is where the kernel shows its devices.
func sysfsRoot() string { return "/sys" }
