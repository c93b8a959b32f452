package glancebridge

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"time"

	"github.com/novalet/novalet"
)

// trust is what a request asks of an image's signature. Not safe for concurrent use.
type trust struct {
	signed bool     // it has to have a valid one
	ids    []string // whose certificate leads to one of these; empty: any
	nobody bool     // it has to lead to one, and there is none
	// checked is the certificate that was found to do so.
	checked []byte
}

// trustOf is what holds for a request whose user trusts these certificates, as in nova/image/glance.py (_get_verifier).
func (s *Store) trustOf(ids []string) *trust {
	if len(ids) == 0 && s.o.ValidateCertificates {
		ids = s.o.TrustedCertificates
	}
	t := &trust{signed: s.o.VerifySignatures || len(ids) > 0, ids: ids}
	t.nobody = t.signed && len(ids) == 0 && s.o.ValidateCertificates
	return t
}

// key tells apart the fetches that may not stand for one another.
func (t *trust) key(imageID string) string {
	if !t.signed {
		return imageID
	}
	return imageID + "\x00" + strings.Join(t.ids, "\x00")
}

// vouch finds out whether a stored image, whose signature was verified when it was fetched, is trusted by this request too.
func (s *Store) vouch(ctx context.Context, rc novalet.RequestContext, id string, t *trust) error {
	if len(t.ids) == 0 {
		return nil
	}
	s.mu.Lock()
	rec := s.images[id]
	s.mu.Unlock()
	if rec == nil || len(rec.Signer) == 0 || bytes.Equal(rec.Signer, t.checked) {
		return nil
	}
	cert, err := x509.ParseCertificate(rec.Signer)
	if err == nil {
		err = s.validate(ctx, rc, cert, t.ids)
	}
	if errors.Is(err, novalet.ErrTryAgain) {
		return err
	}
	if err != nil {
		s.log.Warn("certificate of a signed image", "image", id, "err", err)
		return refused(id, "the image's signature cannot be verified: its certificate is not trusted here")
	}
	t.checked = rec.Signer
	return nil
}

// serves reports whether a stored image does for a request.
func (t *trust) serves(rec *imageRecord) bool {
	switch {
	case !t.signed:
		return true
	case t.nobody:
		return false
	case len(t.ids) == 0:
		return rec.Signed
	}
	return rec.Signed && len(rec.Signer) > 0 && bytes.Equal(rec.Signer, t.checked)
}

// validate follows a certificate to a self-signed one, over trusted ones alone (cursive/certificate_utils.py). Those that
// cannot be had or may not sign others do not count.
func (s *Store) validate(ctx context.Context, rc novalet.RequestContext, cert *x509.Certificate, trusted []string) error {
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: time.Now(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, id := range trusted {
		t, err := s.certificate(ctx, rc, id)
		switch {
		case errors.Is(err, novalet.ErrTryAgain):
			return err
		case err != nil:
			s.log.Warn("trusted certificate is left out", "certificate", cut(id), "err", err)
		case !t.BasicConstraintsValid || !t.IsCA || t.KeyUsage&x509.KeyUsageCertSign == 0:
			s.log.Warn("trusted certificate is left out", "certificate", cut(id), "err", "it may not sign others")
		case bytes.Equal(t.RawSubject, t.RawIssuer) && t.CheckSignatureFrom(t) == nil:
			o.Roots.AddCert(t)
		default:
			o.Intermediates.AddCert(t)
		}
	}
	_, err := cert.Verify(o)
	return err
}
