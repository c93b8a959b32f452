package novadriver

import (
	"slices"
	"testing"

	"github.com/novalet/novalet/novadriver/ovo"
)

// TestTrustedCertificatesOfInstances: a message that leaves the field out says something else than one in which it is null.
func TestTrustedCertificatesOfInstances(t *testing.T) {
	b := started(t, "zed")
	list := ovo.Releases()[0].Minimal("TrustedCerts", map[string]any{"ids": []string{"cert-1", "cert-2"}})
	for _, c := range []struct {
		fields map[string]any
		want   []string
	}{
		{nil, nil},
		{map[string]any{"trusted_certs": nil}, []string{}},
		{map[string]any{"trusted_certs": list}, []string{"cert-1", "cert-2"}},
	} {
		inst, err := b.driver.decodeInstance(mustJSON(t, b.instance(c.fields)))
		if err != nil {
			t.Fatal(err)
		}
		if got := inst.TrustedCertificates; !slices.Equal(got, c.want) || (got == nil) != (c.want == nil) {
			t.Errorf("%v: %#v", c.fields, got)
		}
	}
}
