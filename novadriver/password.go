package novadriver

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/novalet/novalet"
)

func setAdminPassword(ctx context.Context, d *Driver, r *request) (any, error) {
	return d.wrap(ctx, r, "set_admin_password", wraps{event: true, fault: true, revert: true}, func(inst *novalet.Instance) (any, error) {
		password := novalet.Secret(r.args.str("new_pass"))
		err := d.agent().SetAdminPassword(ctx, inst.UUID, inst.ImageProperty("os_admin_user"), password)
		if err == nil {
			fields := map[string]any{"task_state": novalet.TaskNone}
			if meta := d.passwordMetadata(inst, password); meta != nil {
				fields["system_metadata"] = meta
			}
			return nil, d.Conductor().SaveInstance(ctx, r.rc, &novalet.InstanceUpdate{
				UUID: inst.UUID, Fields: fields, Expected: []novalet.TaskState{novalet.TaskUpdatingPassword},
			})
		}
		var fault *novalet.Fault
		switch {
		case errors.Is(err, novalet.ErrUnsupported), errors.Is(err, novalet.ErrInstanceGone), errors.Is(err, novalet.ErrNotFound):
			return nil, err
		case errors.As(err, &fault) && fault.Class != "":
			return nil, err
		}
		reason := "error setting admin password"
		if errors.Is(err, novalet.ErrInvalidState) {
			reason = "instance " + inst.UUID + " is not running"
		}
		d.log.Error("set admin password", "instance", inst.UUID, "request_id", r.rc.RequestID, "err", err)
		return nil, novaError("InstancePasswordSetFailed", fmt.Sprintf("Failed to set admin password on %s because %s", inst.UUID, reason),
			map[string]any{"instance": inst.UUID, "reason": reason})
	})
}

// The rows of system_metadata that hold a password, and what fits into one (nova/api/metadata/password.py).
const (
	passwordRows = 4
	passwordRow  = 255
)

// passwordMetadata is the instance's system_metadata with the password encrypted for its key pair, from which its owner reads it
// (os-server-password), as Nova's libvirt driver writes it (nova/virt/libvirt/driver.py
// _save_instance_password_if_sshkey_present). It is nil where that cannot be: the password is set all the same.
func (d *Driver) passwordMetadata(inst *novalet.Instance, password novalet.Secret) map[string]string {
	if !strings.HasPrefix(inst.KeyData, "ssh-rsa ") || inst.SystemMetadata == nil {
		return nil
	}
	text, err := encryptFor(inst.KeyData, password)
	if err == nil && len(text) > passwordRows*passwordRow {
		err = fmt.Errorf("%d characters are more than Nova keeps: the key is too long", len(text))
	}
	if err != nil {
		d.log.Warn("the password is set, but cannot be kept for os-server-password", "instance", inst.UUID, "err", err)
		return nil
	}
	meta := maps.Clone(inst.SystemMetadata)
	for i := range passwordRows {
		n := min(len(text), passwordRow)
		meta[fmt.Sprintf("password_%d", i)] = text[:n]
		text = text[n:]
	}
	return meta
}

// encryptFor encrypts a password for the owner of an RSA key of OpenSSH's form, in base64. The padding is what Nova's clients expect
// (nova/crypto.py ssh_encrypt_text).
func encryptFor(key string, password novalet.Secret) (string, error) {
	parsed, _, _, _, err := ssh.ParseAuthorizedKey([]byte(key))
	if err != nil {
		return "", fmt.Errorf("read the key pair's key: %w", err)
	}
	public, ok := parsed.(ssh.CryptoPublicKey)
	if !ok {
		return "", fmt.Errorf("the key pair's key is a %s", parsed.Type())
	}
	rsaKey, ok := public.CryptoPublicKey().(*rsa.PublicKey)
	if !ok {
		return "", fmt.Errorf("the key pair's key is a %s", parsed.Type())
	}
	//lint:ignore SA1019 no other padding is read there
	enc, err := rsa.EncryptPKCS1v15(rand.Reader, rsaKey, []byte(password.Reveal()))
	if err != nil {
		return "", fmt.Errorf("encrypt the password for the key pair: %w", err)
	}
	return base64.StdEncoding.EncodeToString(enc), nil
}
