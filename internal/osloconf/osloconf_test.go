package osloconf

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// parse reads one text.
func parse(t *testing.T, text string) *Config {
	t.Helper()
	c := New()
	if err := c.Add("/etc/nova/nova.conf", []byte(text)); err != nil {
		t.Fatal(err)
	}
	return c
}

// The expected values are those that oslo.config 10.7 gives.
func TestText(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"plain", "a = 1", "1"},
		{"colon", "a: x = y", "x = y"},
		{"equals first", "a=x:y", "x:y"},
		{"last wins", "a = 1\na=2", "2"},
		{"spaces", "a =   x y  ", "x y"},
		{"double quotes", `a = "x "`, "x "},
		{"single quotes", "a = ' x'", " x"},
		{"unlike quotes", `a = "x'`, `"x'`},
		{"quotes at both ends", `a = "x" "y"`, `x" "y`},
		{"lone quote", `a = "`, ""},
		{"empty", "a =", ""},
		{"continuation", "a = x\n  y\n\tz", "x\ny\nz"},
		{"indented comment is a part", "a = x\n  # y", "x\n# y"},
		{"comment ends", "a = x\n# y\n; z\nb = 1", "x"},
		{"carriage returns", "a = x\r\n  y\r\n", "x\ny"},
		{"hash inside", "a = x # y", "x # y"},
		{"reference", "b = 1\na = $b/x", "1/x"},
		{"braces", "b = 1\na = ${b}x", "1x"},
		{"nested", "c = 1\nb = $c.x\n[c]\nx = 2\n[DEFAULT]\na = z$b", "z2"},
		{"section", "a = http://$neutron.Host:80\n[neutron]\nHost = h", "http://h:80"},
		{"own section first", "b = 1\na = 0\n[s]\nb = 2", "0"},
		{"escapes", `a = \$b $$b $ $5 $`, "$b $b $ $5 $"},
		{"later assignment", "a = $b\nb = 1\nb = 2", "2"},
		{"not set", "b = 1", "def"},
	} {
		cfg := parse(t, "[DEFAULT]\n"+c.text)
		if got := cfg.String("DEFAULT", "a", "def"); got != c.want || cfg.Err() != nil {
			t.Errorf("%s: got %q (%v), want %q", c.name, got, cfg.Err(), c.want)
		}
	}
}

func TestSections(t *testing.T) {
	cfg := parse(t, "[DEFAULT]\nhost = h\nurl = d\n[Neutron]\nurl = $host\nself = $url\n[default]\nlower = 1\n[NEUTRON]\nmore = 1")
	for _, c := range []struct{ section, name, want string }{
		{"neutron", "url", "h"},  // from DEFAULT, as neutron has no host
		{"Neutron", "self", "h"}, // its own url, not DEFAULT's
		{"neutron", "more", "1"}, // the case of a section does not matter
		{"neutron", "host", "-"}, // nothing is inherited
		{"DEFAULT", "lower", "-"},
		{"default", "lower", "1"},
		{"DEFAULT", "URL", "-"}, // that of an option does
	} {
		if got := cfg.String(c.section, c.name, "-"); got != c.want {
			t.Errorf("[%s] %s: got %q, want %q", c.section, c.name, got, c.want)
		}
	}
	if err := cfg.Err(); err != nil {
		t.Error(err)
	}
}

func TestTypes(t *testing.T) {
	cfg := parse(t, strings.Join([]string{
		"[DEFAULT]", "yes = Yes", "on=ON", "one = 1", "no = no", "off = off", "zero=0", "bad = maybe",
		"n = 42", "neg = -3", "blank = ", "float = 1.5", "nan = nan", "big = 1e300",
		"list = a, b ,,c,", "nolist =", "dict = a:1, b: x:y", "baddict = a", "f = 0.25",
		"m = 1", "m = $n", "word = c",
	}, "\n"))
	check := func(name string, got, want any) {
		t.Helper()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	for _, n := range []string{"yes", "on", "one"} {
		check(n, cfg.Bool("DEFAULT", n, false), true)
	}
	for _, n := range []string{"no", "off", "zero"} {
		check(n, cfg.Bool("DEFAULT", n, true), false)
	}
	check("absent bool", cfg.Bool("DEFAULT", "none", true), true)
	check("n", cfg.Int("DEFAULT", "n", 1), 42)
	check("neg", cfg.Int("DEFAULT", "neg", 1), -3)
	check("blank", cfg.Int("DEFAULT", "blank", 7), 7)
	check("float", cfg.Float("DEFAULT", "float", 0), 1.5)
	check("seconds", cfg.Seconds("DEFAULT", "f", 0), 250*time.Millisecond)
	check("whole seconds", cfg.Seconds("DEFAULT", "n", 0), 42*time.Second)
	check("list", cfg.List("DEFAULT", "list", nil), []string{"a", "b", "", "c"})
	check("empty list", cfg.List("DEFAULT", "nolist", []string{"x"}), []string{})
	check("absent list", cfg.List("DEFAULT", "none", []string{"x"}), []string{"x"})
	check("dict", cfg.Dict("DEFAULT", "dict", nil), map[string]string{"a": "1", "b": "x:y"})
	check("multi", cfg.Multi("DEFAULT", "m"), []string{"1", "42"})
	check("absent multi", cfg.Multi("DEFAULT", "none"), []string(nil))
	check("choice", cfg.Choice("DEFAULT", "word", "a", "a", "c"), "c")
	check("secret", cfg.Secret("DEFAULT", "word").Reveal(), "c")
	if err := cfg.Err(); err != nil {
		t.Fatal(err)
	}

	check("bad bool", cfg.Bool("DEFAULT", "bad", true), true)
	check("bad int", cfg.Int("DEFAULT", "float", 5), 5)
	check("range", cfg.IntRange("DEFAULT", "n", 5, 1, 10), 5)
	check("nan", cfg.Float("DEFAULT", "nan", 5), 5.0)
	check("too long", cfg.Seconds("DEFAULT", "big", 5), time.Duration(5))
	check("bad dict", cfg.Dict("DEFAULT", "baddict", nil), map[string]string(nil))
	check("bad choice", cfg.Choice("DEFAULT", "word", "a", "a", "b"), "a")
	cfg.Bool("DEFAULT", "bad", true) // said once
	want := strings.Join([]string{
		`option [DEFAULT] bad: "maybe" is neither true nor false (nova.conf:8)`,
		`option [DEFAULT] float: "1.5" is no whole number (nova.conf:12)`,
		`option [DEFAULT] n: 42 is not from 1 to 10 (nova.conf:9)`,
		`option [DEFAULT] nan: "nan" is no number (nova.conf:13)`,
		`option [DEFAULT] big: "1e300" seconds are too many (nova.conf:14)`,
		`option [DEFAULT] baddict: "a" is no pair key:value (nova.conf:18)`,
		`option [DEFAULT] word: "c" is none of a, b (nova.conf:22)`,
	}, "\n")
	check("complaints", fmt.Sprint(cfg.Err()), want)
}

func TestRequiredAndReferences(t *testing.T) {
	cfg := parse(t, "[neutron]\nauth_url =\npassword = pa$word\na = $b\nb = x${a}\nok = $state_path/x\n[DEFAULT]\nhost = $hostname")
	cfg.SetDefault("DEFAULT", "state_path", "/var/lib/nova")
	cfg.SetDefault("DEFAULT", "hostname", "h1")
	cfg.SetDefault("DEFAULT", "my_ip", "$hostname.ip")
	if got := cfg.Required("neutron", "ok"); got != "/var/lib/nova/x" {
		t.Errorf("ok: %q", got)
	}
	if got := cfg.Required("DEFAULT", "host"); got != "h1" {
		t.Errorf("host: %q", got)
	}
	cfg.Required("neutron", "auth_url")
	cfg.Required("neutron", "region")
	cfg.Required("neutron", "password")
	cfg.String("neutron", "a", "")
	cfg.Errorf("neutron", "ok", "no such directory")
	want := strings.Join([]string{
		"option [neutron] auth_url: must not be empty (nova.conf:2)",
		"option [neutron] region: is required (not set in /etc/nova/nova.conf)",
		"option [neutron] password: refers to $word, which is not set (write $$ for a dollar sign) (nova.conf:3)",
		"option [neutron] a: refers to itself through $a (nova.conf:4)",
		"option [neutron] ok: no such directory (nova.conf:6)",
	}, "\n")
	if diff := cmp.Diff(want, fmt.Sprint(cfg.Err())); diff != "" {
		t.Errorf("complaints (-want +got):\n%s", diff)
	}
	if got := cfg.Where("neutron", "ok"); got != "nova.conf:6" {
		t.Errorf("where: %q", got)
	}
	if cfg.Has("DEFAULT", "state_path") || !cfg.Has("Neutron", "ok") {
		t.Error("Has counts defaults, or misses a value")
	}
}

func TestUnread(t *testing.T) {
	cfg := parse(t, "[novalet]\nb = $c\na = 1\nc = 1\n[nova]\nz = 1")
	cfg.String("novalet", "b", "")
	if diff := cmp.Diff([]string{"a (nova.conf:3)"}, cfg.Unread("novalet")); diff != "" {
		t.Errorf("unread:\n%s", diff)
	}
	if diff := cmp.Diff([]string{"a", "b", "c"}, cfg.Options("novalet")); diff != "" {
		t.Errorf("options:\n%s", diff)
	}
}

func TestDamaged(t *testing.T) {
	for text, want := range map[string]string{
		"a = 1":                     "f.conf:1: assignment before the first section",
		"[DEFAULT]\nnonsense":       "f.conf:2: neither a section nor an assignment: it has no = and no colon",
		"[DEFAULT]\n= 1":            "f.conf:2: assignment without a name",
		"[DEFAULT\na = 1":           "f.conf:1: section does not end with ]",
		"[]":                        "f.conf:1: section without a name",
		"[DEFAULT]\n a = 1":         "f.conf:2: unexpected continuation line",
		"[DEFAULT]\na = 1\n\n b":    "f.conf:4: unexpected continuation line",
		"[DEFAULT]\na = 1\n# c\n b": "f.conf:4: unexpected continuation line",
		"[DEFAULT]\na = \xff":       "f.conf: not UTF-8",
	} {
		c := New()
		if err := c.Add("f.conf", []byte(text)); err == nil || err.Error() != want {
			t.Errorf("%q: error %v, want %s", text, err, want)
		}
		if c.Has("DEFAULT", "a") {
			t.Errorf("%q: part of a damaged file counts", text)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	one := write("one.conf", "[DEFAULT]\nhost = one\nmulti = 1\nonly = x")
	two := write("two.conf", "[DEFAULT]\nhost = two\nmulti = 2")
	write("d/20-b.conf", "[DEFAULT]\nhost = b\nmulti = b")
	write("d/10-a.conf", "[DEFAULT]\nhost = a\nmulti = a")
	write("d/ignored.txt", "nonsense")
	write("d/sub.conf/x", "nonsense")

	cfg, err := Load([]string{one, two}, []string{filepath.Join(dir, "d")})
	if err != nil {
		t.Fatal(err)
	}
	if got := cfg.String("DEFAULT", "host", ""); got != "b" {
		t.Errorf("host %q: the last file does not win", got)
	}
	if diff := cmp.Diff([]string{"1", "2", "a", "b"}, cfg.Multi("DEFAULT", "multi")); diff != "" {
		t.Errorf("multi (-want +got):\n%s", diff)
	}
	if got := cfg.Where("DEFAULT", "only"); got != "one.conf:4" {
		t.Errorf("where %q", got)
	}

	bad := write("bad.conf", "x")
	_, err = Load([]string{bad, filepath.Join(dir, "none.conf")}, []string{filepath.Join(dir, "nodir")})
	for _, want := range []string{"bad.conf:1: ", "none.conf: no such file", "nodir: no such file"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not say %q", err, want)
		}
	}
}

func TestExpansionIsBounded(t *testing.T) {
	var text strings.Builder
	text.WriteString("[DEFAULT]\na0 =\nb0 = " + strings.Repeat("x", 4000) + "\n")
	text.WriteString("long =")
	for range 400 {
		text.WriteString(" $b0")
	}
	text.WriteString("\n")
	for i := range 60 {
		fmt.Fprintf(&text, "a%d = $a%d$a%d\n", i+1, i, i)
	}
	for _, name := range []string{"a60", "long"} {
		cfg := parse(t, text.String())
		if got := cfg.String("DEFAULT", name, "def"); got != "def" || cfg.Err() == nil {
			t.Errorf("%s: %d bytes, %v", name, len(got), cfg.Err())
		}
	}
}

func FuzzConfig(f *testing.F) {
	for _, s := range []string{
		"[DEFAULT]\na = $b\nb = ${a}\n", "[a]\nb: 'c'\n  d\n# e\n", "[DEFAULT]\ntransport_url = rabbit://u:p@h\n[x]\ny = $x.y.z $$ \\$",
		"[s]\nl = a,b,,\nd = a:b,c\nn = 1_0\nt = 1e9",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c := New()
		if c.Add("f", text) != nil {
			return
		}
		for o := range c.values {
			s := c.String(o.section, o.name, "")
			m := c.Multi(o.section, o.name)
			if c.Err() == nil && (len(m) == 0 || m[len(m)-1] != s) {
				t.Fatalf("[%s] %s: %q is not the last of %q", o.section, o.name, s, m)
			}
			c.Int(o.section, o.name, 0)
			c.Seconds(o.section, o.name, 0)
			c.List(o.section, o.name, nil)
			c.Dict(o.section, o.name, nil)
			c.Bool(o.section, o.name, false)
			if c.Where(o.section, o.name) == "" {
				t.Fatalf("[%s] %s is nowhere", o.section, o.name)
			}
		}
		_ = c.Err()
	})
}
