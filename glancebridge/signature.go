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
	"time"

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
	valid func(digest []byte) bool
}

// verify reports whether what was written is what was signed.
func (s *signature) verify() bool { return s.valid(s.Sum(nil)) }

// signature prepares the check of an image, as nova/image/glance.py (_get_verifier) does. Everything that keeps an image
// from being checked refuses it.
func (s *Store) signature(ctx context.Context, rc novalet.RequestContext, rec *ImageRecord) (*signature, error) {
	no := func(format string, args ...any) (*signature, error) {
		return nil, refused(rec.ID, "the image's signature cannot be verified: "+fmt.Sprintf(format, args...))
	}
	for _, p := range []string{propSignature, propHashMethod, propKeyType, propCertificate} {
		if rec.Properties[p] == "" {
			return no("it has no property %s, and this cloud boots signed images only", p)
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
	if s.o.TrustedCertificates != nil {
		if err := s.validate(ctx, rc, cert); errors.Is(err, novalet.ErrTryAgain) {
			return nil, err
		} else if err != nil {
			s.log.Warn("certificate of a signed image", "image", rec.ID, "certificate", id, "err", err)
			return no("its certificate %s is not trusted here", id)
		}
	}
	c := &signature{Hash: h.New()}
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
	b, err := s.o.Certificates.Certificate(ctx, rc, id)
	if err != nil {
		return nil, err
	}
	if p, _ := pem.Decode(b); p != nil {
		b = p.Bytes
	}
	return x509.ParseCertificate(b)
}

// validate follows a certificate to one of the trusted ones (cursive/certificate_utils.py).
func (s *Store) validate(ctx context.Context, rc novalet.RequestContext, cert *x509.Certificate) error {
	roots := x509.NewCertPool()
	for _, id := range s.o.TrustedCertificates {
		t, err := s.certificate(ctx, rc, id)
		if err != nil {
			return fmt.Errorf("trusted certificate %s: %w", id, err)
		}
		roots.AddCert(t)
	}
	_, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err
}
