//go:build standin

package sriov

import "os"

// sysfsRoot is the folder with the stand-in's devices.
func sysfsRoot() string { return os.Getenv("NOVALET_STANDIN_SYSFS") }
