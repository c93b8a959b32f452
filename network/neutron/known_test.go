package neutron

import (
	"slices"
	"strings"
	"testing"

	"github.com/novalet/novalet"
)

// What was seen of an instance's ports saves the look before they are deleted, and is believed only as long as Neutron says
// that nothing has changed.
func TestKnownPorts(t *testing.T) {
	const own, users = "7ed59832-79d2-4d5a-922b-37f4f21d695a", "7ed59832-79d2-4d5a-922b-37f4f21d695b"
	tests := []struct {
		name   string
		exts   []string
		change func(f *fakeNeutron) // since the look
		info   novalet.NetworkInfo
		unsure bool
		left   []string // ports
		looks  int
	}{
		{name: "nothing changed", exts: []string{revisionIfMatch}, info: novalet.NetworkInfo{{ID: own}}, unsure: true, left: []string{users}},
		{name: "gone meanwhile", exts: []string{revisionIfMatch}, info: novalet.NetworkInfo{{ID: own}}, unsure: true, left: []string{users},
			change: func(f *fakeNeutron) { delete(f.ports, own) }},
		{name: "given to another server", exts: []string{revisionIfMatch}, info: novalet.NetworkInfo{{ID: own}}, left: []string{own, users}, looks: 1,
			change: func(f *fakeNeutron) { f.update(f.ports[own], object{"device_id": "another"}) }},
		{name: "renamed", exts: []string{revisionIfMatch}, info: novalet.NetworkInfo{{ID: own}}, left: []string{users}, looks: 1,
			change: func(f *fakeNeutron) { f.update(f.ports[own], object{"name": "mine"}) }},
		{name: "one more", exts: []string{revisionIfMatch}, info: novalet.NetworkInfo{{ID: own}, {ID: users}}, looks: 1,
			change: func(f *fakeNeutron) { f.ports[users]["device_id"] = instUUID }},
		{name: "the user's own", exts: []string{revisionIfMatch}, info: novalet.NetworkInfo{{ID: own, PreserveOnDelete: true}}, left: []string{own, users}, looks: 1},
		{name: "a neutron without conditions", info: novalet.NetworkInfo{{ID: own}}, left: []string{own, users}, looks: 1,
			change: func(f *fakeNeutron) { f.update(f.ports[own], object{"device_id": "another"}) }},
		{name: "no interfaces", exts: []string{revisionIfMatch}, left: []string{users}, looks: 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFake(t)
			f.exts = append(f.exts, tt.exts...)
			f.port(own, netB, projectID)["device_id"] = instUUID
			f.port(users, netB, projectID)
			a := newAPI(t, f)
			if err := a.Remember(t.Context(), userContext(), instance()); err != nil {
				t.Fatal(err)
			}
			if tt.change != nil {
				tt.change(f)
			}
			f.requests() // those so far
			free, err := a.Deallocation(t.Context(), userContext(), instance(), tt.info)
			if err != nil {
				t.Fatal(err)
			}
			unsure, err := free(t.Context())
			if err != nil || unsure != tt.unsure {
				t.Errorf("unsure %v, %v; want %v", unsure, err, tt.unsure)
			}
			looks := 0
			seen := f.requests()
			for _, r := range seen {
				if strings.HasSuffix(r, " GET ports") {
					looks++
				}
			}
			if looks != tt.looks {
				t.Errorf("%d looks, want %d: %q", looks, tt.looks, seen)
			}
			var left []string
			for id := range f.ports {
				left = append(left, id)
			}
			slices.Sort(left)
			if !slices.Equal(left, tt.left) {
				t.Errorf("ports left: %q, want %q", left, tt.left)
			}
			if len(a.known.revisions) > 0 {
				t.Errorf("remembered after the end: %v", a.known.revisions)
			}
		})
	}
}
