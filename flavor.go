package novalet

// Flavor is the size of an instance, in Nova's units.
type Flavor struct {
	ID       int64  `json:"id"`
	FlavorID string `json:"flavorid"`
	Name     string `json:"name"`
	// MemoryMB and Swap are in MiB, RootGB and EphemeralGB in GiB. RootGB 0 means no limit of its own.
	MemoryMB    int64             `json:"memory_mb"`
	VCPUs       int64             `json:"vcpus"`
	RootGB      int64             `json:"root_gb"`
	EphemeralGB int64             `json:"ephemeral_gb"`
	Swap        int64             `json:"swap"`
	ExtraSpecs  map[string]string `json:"extra_specs,omitempty"`
}
