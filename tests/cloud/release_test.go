package cloud_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/gophercloud/gophercloud/v2/openstack/placement/v1/resourceproviders"

	"github.com/novalet/novalet/novadriver/ovo"
)

// fingerprint is what testdata/fingerprint.py says of the Nova that is installed.
type fingerprint struct {
	Service, Oldest int
	Compute         string            `json:"compute"`
	ComputeTask     string            `json:"compute_task"`
	Objects         map[string]string // name → version
	Methods         []string          // what it sends to computes
}

// TestRelease: the cloud's Nova speaks what the table in novadriver/ovo says of its release, every method it sends to a
// compute is in docs/compute-api.md, and the agent found out which release it is: it reports that one's service version,
// with the trait that goes with it. What a new release changed is what this test shows.
func TestRelease(t *testing.T) {
	settings, err := os.ReadFile(filepath.Join(state(t), "settings"))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`SAVED_RELEASE=(\S+)`).FindSubmatch(settings)
	if m == nil {
		t.Fatalf("no SAVED_RELEASE in %q", settings)
	}
	name := string(m[1])
	want, err := ovo.ReleaseNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	out, err := sh(context.Background(), "env", "STATE="+state(t), "bash", "-c", `. ../../devstack/vars.sh; exec "$PYTHON" -W ignore testdata/fingerprint.py`)
	if err != nil {
		t.Fatal(err)
	}
	var got fingerprint
	// Beside it there may be warnings of the libraries.
	line := regexp.MustCompile(`(?m)^\{.*\}$`).FindString(out)
	if err := json.Unmarshal([]byte(line), &got); err != nil {
		t.Fatalf("%v in %q", err, tail(out, 300))
	}
	if got.Service != want.Service || got.Oldest != want.Oldest || got.Compute != want.ComputeRPC || got.ComputeTask != want.ComputeTask {
		t.Errorf("Nova: service version %d, computes from %d, compute RPC %s, compute_task %s; the table: %+v",
			got.Service, got.Oldest, got.Compute, got.ComputeTask, want)
	}
	objects := want.Objects()
	maps.DeleteFunc(got.Objects, func(n, _ string) bool { return objects[n] == "" })
	if diff := cmp.Diff(objects, got.Objects); diff != "" {
		t.Errorf("object versions (-table +Nova):\n%s", diff)
	}
	doc, err := os.ReadFile("../../docs/compute-api.md")
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Methods) < 60 {
		t.Errorf("only %d methods found in Nova: %v", len(got.Methods), got.Methods)
	}
	for _, method := range got.Methods {
		if !strings.Contains(string(doc), "\n| `"+method+"` |") {
			t.Errorf("Nova sends %s, which docs/compute-api.md does not have", method)
		}
	}

	log, err := os.ReadFile(filepath.Join(state(t), "log", "novalet.log"))
	if err != nil {
		t.Fatal(err)
	}
	found := fmt.Sprintf("release=%s controllers=%d reporting=%d\n", name, got.Service, got.Service)
	if lines := regexp.MustCompile(`msg="controllers found" .*\n`).FindAllString(string(log), -1); len(lines) == 0 || !strings.HasSuffix(lines[len(lines)-1], found) {
		t.Errorf("the agent says %q, want %q", lines, found)
	}
	traits, err := resourceproviders.GetTraits(t.Context(), as(t, "admin").placement, providerID(t)).Extract()
	if err != nil {
		t.Fatal(err)
	}
	if has, should := slices.Contains(traits.Traits, "OWNER_NOVA"), got.Service >= 73; has != should {
		t.Errorf("the provider has OWNER_NOVA: %v; at service version %d it should be %v", has, got.Service, should)
	}
}
