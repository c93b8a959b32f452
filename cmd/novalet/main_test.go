package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet/glancebridge"
)

// asProgram in the environment makes the test binary the program.
const asProgram = "NOVALET_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
	}
	if len(os.Args) > 1 && os.Args[1] == glancebridge.HelperCommand {
		os.Exit(glancebridge.HelperMain(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// cli runs the command line without a process.
func cli(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = run(t.Context(), args, &out, &errOut)
	return code, out.String(), errOut.String()
}

func TestHelpNamesEveryOption(t *testing.T) {
	for _, c := range commands() {
		code, out, _ := cli(t, "help", c.name)
		if code != exitOK || !strings.HasPrefix(out, "Usage: novalet "+c.name) || !strings.Contains(out, c.summary) {
			t.Errorf("help %s: %d\n%s", c.name, code, out)
		}
		again, same, _ := cli(t, c.name, "--help")
		if again != exitOK || same != out {
			t.Errorf("%s --help differs from help %s", c.name, c.name)
		}
	}
	code, out, _ := cli(t, "help")
	for _, n := range names() {
		if code != exitOK || !strings.Contains(out, "\n  "+n+" ") {
			t.Errorf("help does not list %s", n)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{nil, exitUsage, "Usage: novalet COMMAND"},
		{[]string{"fly"}, exitUsage, `no command "fly"`},
		{[]string{"ps", "--nope"}, exitUsage, "unknown flag"},
		{[]string{"logs"}, exitUsage, "want one instance"},
		{[]string{"exec", "x"}, exitUsage, "want an instance and a command"},
		{[]string{"images", "burn"}, exitUsage, "want ls, tree, gc, verify, or import"},
		{[]string{"completion", "fish"}, exitUsage, "want bash or zsh"},
		{[]string{"agent", "now"}, exitUsage, "takes no arguments"},
		{[]string{"ps", "--socket", "/nonexistent/sock"}, exitNoAgent, "is `novalet agent` running here"},
		{[]string{"agent", "--config-file", "/nonexistent/nova.conf"}, exitConfig, "/nonexistent/nova.conf"},
	} {
		code, _, stderr := cli(t, c.args...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%q: exit code %d, %q; want %d and %q", c.args, code, stderr, c.code, c.want)
		}
	}
}

// TestCompletionIsValid: bash takes the script, and completes from it.
func TestCompletionIsValid(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("no bash here")
	}
	script := filepath.Join(t.TempDir(), "novalet")
	if err := os.WriteFile(script, []byte(bashCompletion()), 0o600); err != nil {
		t.Fatal(err)
	}
	complete := func(words ...string) string {
		args := append([]string{"-c", `. "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _novalet; echo "${COMPREPLY[*]}"`, script}, words...)
		out, err := exec.Command(bash, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	if got := complete("novalet", "lo"); got != "logs" {
		t.Errorf("lo completes to %q", got)
	}
	if got := complete("novalet", "ps", "--j"); got != "--json" {
		t.Errorf("ps --j completes to %q", got)
	}
}

func writeConfig(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nova.conf")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const minimal = `[DEFAULT]
host = c1
transport_url = rabbit://u:p@h/
[neutron]
auth_url = http://k
auth_type = password
username = neutron
password = s3cret
project_name = service
user_domain_name = Default
project_domain_name = Default
[placement]
auth_url = http://k
auth_type = password
username = placement
password = s3cret
project_name = service
user_domain_name = Default
project_domain_name = Default
`

func TestSampleConfiguration(t *testing.T) {
	s, err := readSettings([]string{filepath.Join("..", "..", "configs", "nova.conf.sample")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if s.host != "compute1" || s.socket != "/run/novalet/novalet.sock" || !s.driver.SerialConsole || s.agent.Serial.ProxyclientAddress != "192.0.2.11" ||
		s.agent.VIFPluggingTimeout != 5*time.Minute || s.agent.Serial.Allowed[0] != "192.0.2.10" || s.glance.EndpointOverride != "http://controller:9292" {
		t.Errorf("settings: %+v", s)
	}
	if s.imageHigh != 90 || s.imageLow != 80 || s.imageMax != 0 {
		t.Errorf("marks of the image cache: %d, %d, %d", s.imageHigh, s.imageLow, s.imageMax)
	}
}

func TestImageSignatures(t *testing.T) {
	read := func(text string) *settings {
		t.Helper()
		s, err := readSettings([]string{writeConfig(t, minimal+text)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	const signed = "[glance]\nverify_glance_signatures = true\ndefault_trusted_certificate_ids = a,b\n"
	if s := read(""); s.imageSigned || s.imageValidated || s.imageTrusted != nil || !s.keyManager {
		t.Errorf("by default: %v, %v, %v, %v", s.imageSigned, s.imageValidated, s.imageTrusted, s.keyManager)
	}
	if s := read(signed + "[barbican]\nbarbican_endpoint = http://b\n"); !s.imageSigned || s.imageTrusted != nil || s.barbican != "http://b" {
		t.Errorf("signatures: %v, %v, %q", s.imageSigned, s.imageTrusted, s.barbican)
	}
	if s := read(signed + "enable_certificate_validation = true\n"); !s.imageValidated || len(s.imageTrusted) != 2 {
		t.Errorf("validated: %v, %v", s.imageValidated, s.imageTrusted)
	}
	if s := read("[glance]\nenable_certificate_validation = true\n"); s.imageSigned || !s.imageValidated || len(s.imageTrusted) != 0 {
		t.Errorf("validated where a user asks for it: %v, %v, %v", s.imageSigned, s.imageValidated, s.imageTrusted)
	}
	if s := read("[key_manager]\nbackend = vault\n"); s.keyManager {
		t.Error("another key manager counts as Barbican")
	}
	if _, err := readSettings([]string{writeConfig(t, minimal+signed+"[key_manager]\nbackend = vault\n")}, nil); err == nil {
		t.Error("another key manager is taken")
	}
}

func TestImageMarks(t *testing.T) {
	s, err := readSettings([]string{writeConfig(t, minimal+"[novalet]\nimage_cache_high_watermark_percent = 70\nimage_cache_max_gb = 3\n")}, nil)
	if err != nil || s.imageHigh != 70 || s.imageLow != 70 || s.imageMax != 3<<30 {
		t.Errorf("got %+v, %v", s, err)
	}
}

// TestWrongConfiguration: what is missing or wrong is named with its file and line, and no secret is shown.
func TestWrongConfiguration(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"missing bus", strings.Replace(minimal, "transport_url", "transport_urk", 1), "[DEFAULT] transport_url"},
		{"missing section", strings.Split(minimal, "[placement]")[0], "[placement] auth_url"},
		{"not a number", minimal + "[DEFAULT]\nmax_concurrent_builds = many\n", "nova.conf:21"},
		{"bad range", minimal + "[serial_console]\nport_range = 5\n", "[serial_console] port_range"},
		{"unknown own option", minimal + "[novalet]\nstate_dri = /x\n", "state_dri (nova.conf:21) is unknown"},
		{"marks crossed", minimal + "[novalet]\nimage_cache_low_watermark_percent = 95\n", "image_cache_low_watermark_percent"},
		{"no percentage", minimal + "[novalet]\nimage_cache_high_watermark_percent = 101\n", "image_cache_high_watermark_percent"},
		{"bad host", strings.Replace(minimal, "host = c1", "host = a b", 1), "[DEFAULT] host"},
	} {
		_, err := readSettings([]string{writeConfig(t, c.text)}, nil)
		var ee *exitError
		if !errors.As(err, &ee) || ee.code != exitConfig || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want exit code 5 and %q", c.name, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: the error shows a password: %v", c.name, err)
		}
	}
}

func TestStateDirMovesSockets(t *testing.T) {
	s, err := readSettings([]string{writeConfig(t, minimal+"[novalet]\nstate_dir = /srv/x\n")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if s.socket != "/srv/x/novalet.sock" || s.runDir != "/srv/x/run" {
		t.Errorf("socket %s, run dir %s", s.socket, s.runDir)
	}
}

func TestHypervisorVersion(t *testing.T) {
	for v, want := range map[string]int{"1.2.3": 1002003, "0.1.0-dev": 1000, "2": 2000000, "x": 0} {
		if got := hypervisorVersion(v); got != want {
			t.Errorf("%s: %d, want %d", v, got, want)
		}
	}
}

func TestPrintableKeepsTheTerminalSafe(t *testing.T) {
	if got := printable("a\x1b[2Jb\u009bc"); got != "a?[2Jb?c" {
		t.Errorf("%q", got)
	}
}

// TestEveryConfigOptionIsDocumented: docs/configuration.md has a row for each option of [novalet].
func TestEveryConfigOptionIsDocumented(t *testing.T) {
	src, err := os.ReadFile("config.go")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, part := range strings.Split(string(src), `("novalet", "`)[1:] {
		name, _, _ := strings.Cut(part, `"`)
		if !strings.Contains(string(doc), "| `"+name+"` |") {
			t.Errorf("option %s is not in docs/configuration.md", name)
		}
		n++
	}
	if n < 8 {
		t.Errorf("only %d options found in the source", n)
	}
}
