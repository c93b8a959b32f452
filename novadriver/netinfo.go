package novadriver

import (
	"encoding/json"
	"slices"

	"github.com/novalet/novalet"
)

// wholeInfo returns the network info with empty lists and dicts in the place of nil ones: Nova's model fails on a null
// there ("meta": null), and then every reader of the instance does.
func wholeInfo(info novalet.NetworkInfo) novalet.NetworkInfo {
	out := make(novalet.NetworkInfo, len(info))
	for i := range info {
		out[i] = wholeVIF(info[i])
	}
	return out
}

func wholeVIF(v novalet.VIF) novalet.VIF {
	for _, m := range []*map[string]json.RawMessage{&v.Details, &v.Profile, &v.Meta} {
		if *m == nil {
			*m = map[string]json.RawMessage{}
		}
	}
	v.Network.Subnets = orEmpty(v.Network.Subnets)
	for i := range v.Network.Subnets {
		s := &v.Network.Subnets[i]
		s.DNS, s.IPs, s.Routes = orEmpty(s.DNS), orEmpty(s.IPs), orEmpty(s.Routes)
	}
	return v
}

// orEmpty copies a list and makes an empty one of nil.
func orEmpty[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return slices.Clone(l)
}
