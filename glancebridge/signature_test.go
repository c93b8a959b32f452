package glancebridge

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

// certificates is a key manager in memory.
type certificates map[string][]byte

func (c certificates) Certificate(_ context.Context, _ novalet.RequestContext, id string) ([]byte, error) {
	if b, ok := c[id]; ok {
		return b, nil
	}
	return nil, fmt.Errorf("certificate %s: %w", id, novalet.ErrNotFound)
}

// issue makes a certificate of a key, signed by a parent or itself.
func issue(t *testing.T, name string, pub crypto.PublicKey, parent *x509.Certificate, by crypto.Signer) []byte {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: parent == nil, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, by)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestSignedImages(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := issue(t, "ca", ecKey.Public(), nil, ecKey)
	parsed, err := x509.ParseCertificate(ca)
	if err != nil {
		t.Fatal(err)
	}
	store := certificates{
		"rsa": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issue(t, "signer", rsaKey.Public(), parsed, ecKey)}),
		"ec":  issue(t, "ec", ecKey.Public(), nil, ecKey), "ca": ca, "junk": []byte("junk"),
		"other": issue(t, "other", rsaKey.Public(), nil, rsaKey),
	}
	data := rootTar(t)
	d256, d512 := sha256.Sum256(data), sha512.Sum512(data)
	// As cursive makes and takes them: the longest salt that fits.
	pss, err := rsa.SignPSS(rand.Reader, rsaKey, crypto.SHA256, d256[:], &rsa.PSSOptions{SaltLength: rsaKey.Size() - 2 - 32})
	if err != nil {
		t.Fatal(err)
	}
	ecc, err := ecdsa.SignASN1(rand.Reader, ecKey, d512[:])
	if err != nil {
		t.Fatal(err)
	}
	props := func(sig []byte, method, kind, cert string) map[string]string {
		return map[string]string{propSignature: base64.StdEncoding.EncodeToString(sig), propHashMethod: method, propKeyType: kind, propCertificate: cert}
	}
	good := props(pss, "SHA-256", "RSA-PSS", "rsa")
	with := func(k, v string) map[string]string {
		p := maps.Clone(good)
		p[k] = v
		return p
	}
	for _, c := range []struct {
		name    string
		props   map[string]string
		trusted []string
		want    string // in the refusal; "" boots
	}{
		{"rsa", good, nil, ""},
		{"ecc", props(ecc, "SHA-512", "ECC_SECP384R1", "ec"), nil, ""},
		{"trusted", good, []string{"ca"}, ""},
		{"trusted itself", props(ecc, "SHA-512", "ECC_SECP384R1", "ca"), []string{"ca"}, ""},
		{"unsigned", nil, nil, "no property img_signature"},
		{"no certificate", with(propCertificate, ""), nil, "img_signature_certificate_uuid"},
		{"of other data", props(append([]byte{1}, pss[1:]...), "SHA-256", "RSA-PSS", "rsa"), nil, "not what was signed"},
		{"of another key", with(propCertificate, "other"), []string{"ca"}, "not trusted"},
		{"nobody is trusted", good, []string{}, "there are none that are trusted"},
		{"of a certificate that is gone", with(propCertificate, "missing"), nil, "cannot be had"},
		{"of a broken certificate", with(propCertificate, "junk"), nil, "cannot be had"},
		{"with a path as id", with(propCertificate, "../x"), nil, "is no id"},
		{"method", with(propHashMethod, "MD5"), nil, "unknown"},
		{"wrong method", with(propHashMethod, "SHA-512"), nil, "not what was signed"},
		{"key type", with(propKeyType, "DSA"), nil, "DSA keys are not supported"},
		{"key type of another key", with(propKeyType, "ECC_SECP384R1"), nil, "not that of its certificate"},
		{"curve", props(ecc, "SHA-512", "ECC_SECP521R1", "ec"), nil, "not that of its certificate"},
		{"no base64", with(propSignature, "%"), nil, "base64"},
	} {
		t.Run(c.name, func(t *testing.T) {
			images := t.TempDir()
			id := addImage(t, images, data, func(r *ImageRecord) { r.Properties = c.props })
			s := openStore(t, images, func(o *Options) {
				o.VerifySignatures, o.Certificates = true, store
				o.ValidateCertificates, o.TrustedCertificates = c.trusted != nil, c.trusted
			})
			_, err := s.Prepare(t.Context(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantRefused(t, err, c.want)
			if l, err := s.List(t.Context()); err != nil || len(l) != 0 {
				t.Errorf("the store lists %v, %v", l, err)
			}
		})
	}
}

// TestSignaturesSwitchedOn: what was stored without a look at its signature is fetched again.
func TestSignaturesSwitchedOn(t *testing.T) {
	images := t.TempDir()
	id := addImage(t, images, rootTar(t), nil)
	s := openStore(t, images, nil)
	r := &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"}
	if _, err := s.Prepare(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	s.o.VerifySignatures, s.o.Certificates = true, certificates{}
	_, err := s.Prepare(t.Context(), r)
	wantRefused(t, err, "no property img_signature")
}

func TestBarbican(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/v1/secrets/away/payload":
			w.WriteHeader(http.StatusServiceUnavailable)
		case r.URL.Path != "/v1/secrets/cert/payload":
			w.WriteHeader(http.StatusNotFound)
		case r.Header.Get("Accept") != "text/plain":
			w.WriteHeader(http.StatusNotAcceptable)
		default:
			fmt.Fprint(w, "PEM for ", r.Header.Get("X-Auth-Token"))
		}
	}))
	defer srv.Close()
	b := NewBarbican(plainCloud{srv.URL})
	for token, want := range map[string]string{"": "service", "alice": "alice"} {
		got, err := b.Certificate(t.Context(), as(token), "cert")
		if err != nil || string(got) != "PEM for "+want {
			t.Errorf("got %q, %v", got, err)
		}
	}
	for id, want := range map[string]string{"missing": novalet.ErrNotFound.Error(), "away": novalet.ErrTryAgain.Error()} {
		if _, err := b.Certificate(t.Context(), as("alice"), id); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", id, err)
		}
	}
}
