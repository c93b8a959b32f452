package cloud_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/image/v2/images"
	"github.com/gophercloud/gophercloud/v2/openstack/keymanager/v1/secrets"
)

// certificate is what an owner of images has: a key, and the certificate that a key manager keeps.
type certificate struct {
	id     string
	key    *rsa.PrivateKey
	parsed *x509.Certificate
}

// certify makes a certificate, signed by a parent or itself, and stores it as a user.
func certify(t *testing.T, keys *gophercloud.ServiceClient, name string, by *certificate) *certificate {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: by == nil, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	parent, signer := c, key
	if by != nil {
		parent, signer = by.parsed, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	must(t, err)
	parsed, err := x509.ParseCertificate(der)
	must(t, err)
	// The way Nova's documentation has it: base64 of what is in the file. Glance reads PEM alone.
	data := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	s, err := secrets.Create(t.Context(), keys, secrets.CreateOpts{Name: name, SecretType: secrets.CertificateSecret, Algorithm: "RSA",
		Payload: base64.StdEncoding.EncodeToString(data), PayloadContentType: "application/octet-stream", PayloadContentEncoding: "base64"}).Extract()
	must(t, err)
	id := path.Base(s.SecretRef)
	t.Cleanup(func() { _ = secrets.Delete(t.Context(), keys, id).ExtractErr() })
	return &certificate{id: id, key: key, parsed: parsed}
}

// TestSignedImage: with verify_glance_signatures a server is made from what the certificate in Barbican vouches for, as its
// user reads it, and from nothing else; with certificates that are trusted, only from what leads to one of them.
func TestSignedImage(t *testing.T) {
	u := as(t, "demo")
	keys, err := openstack.NewKeyManagerV1(u.compute.ProviderClient, gophercloud.EndpointOpts{Region: u.env["OS_REGION_NAME"]})
	if err != nil {
		t.Skip("the cloud has no key manager: WITH_BARBICAN=1")
	}
	ca := certify(t, keys, "novalet-test-ca", nil)
	signer := certify(t, keys, "novalet-test-signer", ca)
	stranger := certify(t, keys, "novalet-test-stranger", nil)
	data := dockerArchive(t, busyboxRoot(t), appConfig())
	digest := sha256.Sum256(data)
	sign := func(c *certificate) map[string]string {
		sig, err := rsa.SignPSS(rand.Reader, c.key, crypto.SHA256, digest[:], &rsa.PSSOptions{SaltLength: c.key.Size() - 2 - sha256.Size})
		must(t, err)
		return map[string]string{"img_signature": base64.StdEncoding.EncodeToString(sig), "img_signature_hash_method": "SHA-256",
			"img_signature_key_type": "RSA-PSS", "img_signature_certificate_uuid": c.id}
	}
	spec := imageSpec{name: "novalet-test-signed", container: "docker", disk: "raw", props: sign(signer)}
	// Glance itself looks at the signature of what comes with one.
	good := upload(t, u, spec, bytes.NewReader(data))
	spec.name, spec.props = "novalet-test-unsigned", nil
	unsigned := upload(t, u, spec, bytes.NewReader(data))
	// And not at one that comes later.
	forged := upload(t, u, spec, bytes.NewReader(data))
	props := sign(signer)
	props["img_signature_certificate_uuid"] = stranger.id
	var changes images.UpdateOpts
	for k, v := range props {
		changes = append(changes, images.UpdateImageProperty{Op: images.AddOp, Name: k, Value: v})
	}
	_, err = images.Update(t.Context(), u.image, forged, changes).Extract()
	must(t, err)

	refused := func(o bootOpts, why string) {
		t.Helper()
		o.noNet = true
		s := create(t, u, o)
		if got := waitStatus(t, u, s.ID, "ERROR"); !strings.Contains(got.Fault.Message, why) {
			t.Errorf("fault %q, want %q", got.Fault.Message, why)
		}
		remove(t, u, s.ID)
	}
	boots := func(o bootOpts) {
		t.Helper()
		o.noNet = true
		remove(t, u, boot(t, u, o).ID)
	}
	withOptions(t, "glance", "verify_glance_signatures = true")
	boots(bootOpts{name: "signed", image: good})
	refused(bootOpts{image: unsigned}, "no property img_signature")
	refused(bootOpts{image: forged}, "not what was signed")
	boots(bootOpts{name: "trusted", image: good, trusted: []string{ca.id}})
	refused(bootOpts{image: good, trusted: []string{stranger.id}}, "not trusted")
}
