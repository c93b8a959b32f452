package guest

import "testing"

func TestTimeAtExec(t *testing.T) {
	for release, want := range map[string]bool{"6.1.0-56-cloud-amd64": false, "5.15.0-100-generic": false, "6.2.9": false, "6.3.0": true, "6.12.1+deb13": true,
		"7.0-rc1": true, "": false, "x": false} {
		if got := timeAtExec(release); got != want {
			t.Errorf("%q: %v", release, got)
		}
	}
}
