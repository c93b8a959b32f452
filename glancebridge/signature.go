package glancebridge

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"

	"github.com/novalet/novalet"
)

// Certificates gives X.509 certificates by their id in the key manager, in DER or PEM. Errors: novalet.ErrNotFound;
// novalet.ErrTryAgain when the key manager cannot be reached; another one when it refuses.
type Certificates interface {
	Certificate(ctx context.Context, rc novalet.RequestContext, id string) ([]byte, error)
}

// The image properties of a signature (cursive/signature_utils.py).
const (
	propSignature   = "img_signature"
	propHashMethod  = "img_signature_hash_method"
	propKeyType     = "img_signature_key_type"
	propCertificate = "img_signature_certificate_uuid"
)

var signatureHashes = map[string]crypto.Hash{"SHA-224": crypto.SHA224, "SHA-256": crypto.SHA256, "SHA-384": crypto.SHA384, "SHA-512": crypto.SHA512}

var signatureCurves = map[string]elliptic.Curve{"ECC_SECP384R1": elliptic.P384(), "ECC_SECP521R1": elliptic.P521()}

// signature is a check of an image's data against the signature in its properties. Not safe for concurrent use.
type signature struct {
	hash.Hash
	cert  []byte // the certificate of the key, in DER
	valid func(digest []byte) bool
}

// verify reports whether what was written is what was signed.
func (s *signature) verify() bool { return s.valid(s.Sum(nil)) }

// signature prepares the check of an image, as nova/image/glance.py (_get_verifier) does. Everything that keeps an image
// from being checked refuses it.
func (s *Store) signature(ctx context.Context, rc novalet.RequestContext, rec *ImageRecord, t *trust) (*signature, error) {
	no := func(format string, args ...any) (*signature, error) {
		return nil, refused(rec.ID, "the image's signature cannot be verified: "+fmt.Sprintf(format, args...))
	}
	if s.o.Certificates == nil {
		return no("this cloud's hosts have no key manager to ask for its certificate")
	}
	if t.nobody {
		return no("its certificate has to be validated, and there are none that are trusted; name some with the server " +
			"(trusted_image_certificates)")
	}
	for _, p := range []string{propSignature, propHashMethod, propKeyType, propCertificate} {
		if rec.Properties[p] == "" {
			return no("it has no property %s, and only signed images are booted here or for this server", p)
		}
	}
	sig, err := base64.StdEncoding.DecodeString(rec.Properties[propSignature])
	if err != nil {
		return no("%s is no base64", propSignature)
	}
	method, kind := rec.Properties[propHashMethod], rec.Properties[propKeyType]
	h, ok := signatureHashes[method]
	if !ok {
		return no("%s %q is unknown", propHashMethod, cut(method))
	}
	id := rec.Properties[propCertificate]
	if !validID(id) {
		return no("%s %q is no id", propCertificate, cut(id))
	}
	cert, err := s.certificate(ctx, rc, id)
	if errors.Is(err, novalet.ErrTryAgain) {
		return nil, err
	}
	if err != nil {
		s.log.Warn("certificate of a signed image", "image", rec.ID, "certificate", id, "err", err)
		return no("its certificate %s cannot be had", id)
	}
	if len(t.ids) > 0 {
		if err := s.validate(ctx, rc, cert, t.ids); errors.Is(err, novalet.ErrTryAgain) {
			return nil, err
		} else if err != nil {
			s.log.Warn("certificate of a signed image", "image", rec.ID, "certificate", id, "err", err)
			return no("its certificate %s is not trusted here", id)
		}
	}
	t.checked = cert.Raw
	if kind == "DSA" {
		return no("DSA keys are not supported here; sign it with RSA-PSS, ECC_SECP384R1 or ECC_SECP521R1")
	}
	c := &signature{Hash: h.New(), cert: cert.Raw}
	curve := signatureCurves[kind]
	switch key := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		if kind == "RSA-PSS" {
			c.valid = func(digest []byte) bool {
				return rsa.VerifyPSS(key, h, digest, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto}) == nil
			}
		}
	case *ecdsa.PublicKey:
		if curve != nil && key.Curve == curve {
			c.valid = func(digest []byte) bool { return ecdsa.VerifyASN1(key, digest, sig) }
		}
	}
	if c.valid == nil {
		return no("%s %q is not that of its certificate, or not supported", propKeyType, cut(kind))
	}
	return c, nil
}

// certificate fetches and parses one.
func (s *Store) certificate(ctx context.Context, rc novalet.RequestContext, id string) (*x509.Certificate, error) {
	if !validID(id) {
		return nil, fmt.Errorf("read certificate: %q is no id", cut(id))
	}
	b, err := s.o.Certificates.Certificate(ctx, rc, id)
	if err != nil {
		return nil, err
	}
	if p, _ := pem.Decode(b); p != nil {
		b = p.Bytes
	}
	return x509.ParseCertificate(b)
}
