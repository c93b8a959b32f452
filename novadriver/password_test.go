package novadriver

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/novalet/novalet"
)

func TestSetAdminPassword(t *testing.T) {
	b := started(t, "zed")
	inst := b.instance(map[string]any{"task_state": "updating_password"})
	if _, err := b.call("set_admin_password", map[string]any{"instance": inst, "new_pass": "hunter2"}); err != nil {
		t.Fatal(err)
	}
	row := func() string { return string(b.conductor.Find("Instance", "uuid", instUUID)[0]["task_state"]) }
	if b.agent.user != "" || b.agent.password != "hunter2" || row() != "null" {
		t.Errorf("user %q, password %q, task_state %s", b.agent.user, b.agent.password.Reveal(), row())
	}
	for _, c := range []struct {
		err           error
		class, module string
	}{
		{novalet.ErrUnsupported, "NotImplementedError", "builtins"},
		{novalet.ErrInvalidState, "InstancePasswordSetFailed", "nova.exception"},
		{errors.New("hunter2"), "InstancePasswordSetFailed", "nova.exception"},
		{novalet.Faultf(novalet.ErrUnsupported, "SetAdminPasswdNotSupported", "not in this image"), "SetAdminPasswdNotSupported", "nova.exception"},
	} {
		b.agent.set(func() { b.agent.err = c.err })
		b.conductor.Change("Instance", "uuid", instUUID, map[string]any{"task_state": "updating_password"})
		e := b.refused("set_admin_password", map[string]any{"instance": inst, "new_pass": "hunter2"})
		if e.Class != c.class || e.Module != c.module || strings.Contains(e.Message, "hunter2") {
			t.Errorf("%v: %+v", c.err, e)
		}
		if row() != "null" {
			t.Errorf("%v: task_state %s", c.err, row())
		}
	}
	if strings.Contains(b.logs.b.String(), `new_pass`) {
		t.Error("the arguments are in the log")
	}
}

// TestPasswordKept: where the server has an RSA key the password is kept for its owner alone, beside what was kept already; else
// nothing of it is, and it is set all the same.
func TestPasswordKept(t *testing.T) {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	huge := &rsa.PublicKey{N: new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 8000), big.NewInt(1)), E: 65537}
	authorized := func(k *rsa.PublicKey) string {
		public, err := ssh.NewPublicKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(public))) + " user@example.org"
	}
	meta := map[string]any{"image_os_admin_user": "debian", "image_base_image_ref": "x", "password_0": "of another"}
	for name, c := range map[string]struct {
		key  string
		kept bool
		said int
	}{
		"RSA":            {authorized(&private.PublicKey), true, 0},
		"none":           {"", false, 0},
		"another kind":   {"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJHtLQgVb6bXZ1M6N1p6wKs0mZ5tqVIt5qp7Vw7hV8bY user@example.org", false, 0},
		"broken":         {"ssh-rsa AAAA user@example.org", false, 1},
		"too long a key": {authorized(huge), false, 1},
	} {
		t.Run(name, func(t *testing.T) {
			b := started(t, "zed")
			inst := b.instance(map[string]any{"task_state": "updating_password", "system_metadata": meta, "key_data": c.key})
			if _, err := b.call("set_admin_password", map[string]any{"instance": inst, "new_pass": "hunter2"}); err != nil {
				t.Fatal(err)
			}
			if b.agent.user != "debian" || b.agent.password != "hunter2" {
				t.Errorf("of %q: %q", b.agent.user, b.agent.password.Reveal())
			}
			row := b.conductor.Find("Instance", "uuid", instUUID)[0]
			var got map[string]string
			if err := json.Unmarshal(row["system_metadata"], &got); err != nil {
				t.Fatal(err)
			}
			if got["image_base_image_ref"] != "x" || string(row["task_state"]) != "null" {
				t.Errorf("task_state %s, system_metadata %v", row["task_state"], got)
			}
			if n := b.logs.count("os-server-password"); n != c.said {
				t.Errorf("%d lines of the log", n)
			}
			if strings.Contains(b.logs.b.String(), "hunter2") {
				t.Error("the password is in the log")
			}
			if !c.kept {
				if got["password_0"] != "of another" || got["password_1"] != "" {
					t.Errorf("kept: %v", got)
				}
				return
			}
			enc, err := base64.StdEncoding.DecodeString(got["password_0"] + got["password_1"] + got["password_2"] + got["password_3"])
			if err != nil {
				t.Fatal(err)
			}
			//lint:ignore SA1019 as Nova's clients read it
			if text, err := rsa.DecryptPKCS1v15(nil, private, enc); err != nil || string(text) != "hunter2" {
				t.Errorf("%q %v", text, err)
			}
			for i := range 4 {
				if v, ok := got["password_"+string(rune('0'+i))]; !ok || len(v) > 255 {
					t.Errorf("row %d: %d characters", i, len(v))
				}
			}
		})
	}
}
