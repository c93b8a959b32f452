package network

import (
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/contracttest"
)

// The contract that all plugs keep.
func TestContract(t *testing.T) {
	contracttest.VIFPlugger(t, func(t *testing.T) *contracttest.PlugFixture {
		hostNS(t)
		return &contracttest.PlugFixture{Plugger: newPlugger(t, Options{}), NetNS: nsPath(newNS(t)), InstanceUUID: "aaaaaaaa-0000-4000-8000-000000000001",
			VIF: &novalet.VIF{ID: "bbbbbbbb-0000-4000-8000-000000000001", Address: "fa:16:3e:00:00:01", Type: "bridge", VNICType: "normal", DevName: "tapbbbbbbbb-00",
				Network: novalet.VIFNetwork{ID: "cccccccc-0000-4000-8000-000000000001", Bridge: "brqcccccccc-00", Meta: novalet.NetworkMeta{MTU: 1450},
					Subnets: []novalet.Subnet{{CIDR: "10.0.0.0/24", Version: 4, IPs: []novalet.FixedIP{{Address: "10.0.0.9", Version: 4, Type: "fixed"}}}}}}}
	})
}
