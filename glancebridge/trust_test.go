package glancebridge

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"math/big"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

// authority is a certificate with its key.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// certify makes one below a parent, or a root; change is what is odd about it.
func certify(t *testing.T, name string, parent *authority, ca bool, change func(*x509.Certificate)) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: ca, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature}
	if ca {
		c.KeyUsage |= x509.KeyUsageCertSign
	}
	if change != nil {
		change(c)
	}
	over, by := c, key
	if parent != nil {
		over, by = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, over, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

// TestTrustedChains: as cursive does it, a chain leads over trusted certificates to one that signed itself, each of which
// may sign others now.
func TestTrustedChains(t *testing.T) {
	root := certify(t, "root", nil, true, nil)
	middle := certify(t, "middle", root, true, nil)
	leaf := certify(t, "leaf", middle, false, nil)
	narrow := certify(t, "narrow", nil, true, func(c *x509.Certificate) { c.MaxPathLenZero = true })
	below := certify(t, "below narrow", narrow, true, nil)
	plain := certify(t, "plain", nil, false, nil)
	old := certify(t, "old", nil, true, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	impostor := certify(t, "root", nil, true, nil)
	noSign := certify(t, "no sign", nil, true, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature })
	silent := certify(t, "silent", nil, true, func(c *x509.Certificate) { c.KeyUsage = 0 })
	keys := certificates{"junk": []byte("junk")}
	for name, a := range map[string]*authority{"root": root, "middle": middle, "narrow": narrow, "below": below, "plain": plain,
		"old": old, "impostor": impostor, "noSign": noSign, "silent": silent} {
		keys[name] = a.cert.Raw
	}
	s := openStore(t, t.TempDir(), func(o *Options) { o.Certificates = keys })
	for _, c := range []struct {
		name    string
		cert    *authority
		trusted []string
		ok      bool
	}{
		{"whole chain", leaf, []string{"root", "middle"}, true},
		{"in another order, with others", leaf, []string{"junk", "missing", "../x", "middle", "old", "root"}, true},
		{"without the root", leaf, []string{"middle"}, false},
		{"without the middle", leaf, []string{"root"}, false},
		{"another root of the same name", leaf, []string{"impostor", "middle"}, false},
		{"the root itself", root, []string{"root"}, true},
		{"itself, but may not sign", plain, []string{"plain"}, false},
		{"itself, untrusted", plain, []string{"root"}, false},
		{"too long for its root", certify(t, "x", below, false, nil), []string{"narrow", "below"}, false},
		{"short enough", certify(t, "x", narrow, false, nil), []string{"narrow"}, true},
		{"expired root", certify(t, "x", old, false, nil), []string{"old"}, false},
		{"expired itself", certify(t, "x", root, false, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), []string{"root"}, false},
		{"below one that may not sign", certify(t, "x", noSign, false, nil), []string{"noSign"}, false},
		{"below one that does not say that it may sign", certify(t, "x", silent, false, nil), []string{"silent"}, false},
		{"nobody", leaf, nil, false},
	} {
		if err := s.validate(t.Context(), novalet.RequestContext{}, c.cert.cert, c.trusted); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestTrustOfServers: the list that a user names with a server counts whatever the options say, and for every server by
// itself, also where the image is stored already.
func TestTrustOfServers(t *testing.T) {
	root, other := certify(t, "root", nil, true, nil), certify(t, "other", nil, true, nil)
	signer := certify(t, "signer", root, false, nil)
	keys := certificates{"root": root.cert.Raw, "other": other.cert.Raw, "signer": signer.cert.Raw}
	data := rootTar(t)
	sum := sha512.Sum512(data)
	sig, err := signer.key.Sign(rand.Reader, sum[:], crypto.SHA512)
	if err != nil {
		t.Fatal(err)
	}
	images := t.TempDir()
	signed := addImage(t, images, data, func(r *ImageRecord) {
		r.Properties = map[string]string{propSignature: base64.StdEncoding.EncodeToString(sig), propHashMethod: "SHA-512",
			propKeyType: "ECC_SECP384R1", propCertificate: "signer"}
	})
	unsigned := addImage(t, images, data, nil)
	s := openStore(t, images, func(o *Options) { o.Certificates = keys })
	step := func(name, id, want string, trusted ...string) {
		t.Helper()
		_, err := s.Prepare(t.Context(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1", TrustedCertificates: trusted})
		if want == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			return
		}
		wantRefused(t, err, want)
	}
	step("not trusted, not stored", signed, "not trusted here", "other")
	step("nobody asks", signed, "")
	step("not trusted, stored unseen", signed, "not trusted here", "other")
	step("trusted", signed, "", "root")
	if rec := s.images[signed]; !rec.Signed || len(rec.Signer) == 0 {
		t.Error("the signature was not looked at")
	}
	step("not trusted, stored and seen", signed, "not trusted here", "other")
	step("one of two", signed, "", "other", "root")
	step("nobody asks any more", signed, "")
	step("unsigned", unsigned, "no property img_signature", "root")
	s.o.ValidateCertificates = true
	step("no list", signed, "")
	s.o.VerifySignatures = true
	step("no list, and signatures count", signed, "none that are trusted")
	step("no list for a new image", unsigned, "none that are trusted")
	s.o.TrustedCertificates = []string{"other"}
	step("the default list", signed, "not trusted here")
	step("the user's list before the default one", signed, "", "root")
	s.o.Certificates = nil
	step("no key manager", unsigned, "no key manager", "root")
}
