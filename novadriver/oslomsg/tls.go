package oslomsg

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
)

// versions returns the lowest and highest version of TLS that ssl_version
// allows; 0 is Go's choice.
func (o TLSOptions) versions() ([2]uint16, error) {
	switch strings.ToLower(strings.ReplaceAll(o.Version, ".", "_")) {
	case "", "sslv23", "tls":
		return [2]uint16{tls.VersionTLS12, 0}, nil
	case "tlsv1":
		return [2]uint16{tls.VersionTLS10, tls.VersionTLS10}, nil
	case "tlsv1_1":
		return [2]uint16{tls.VersionTLS11, tls.VersionTLS11}, nil
	case "tlsv1_2":
		return [2]uint16{tls.VersionTLS12, tls.VersionTLS12}, nil
	case "tlsv1_3":
		return [2]uint16{tls.VersionTLS13, tls.VersionTLS13}, nil
	}
	return [2]uint16{}, fmt.Errorf("%q is not supported", clip(o.Version, 20))
}

// config makes the client's side of TLS to host. It reads the files each time,
// so that a renewed certificate is taken up with the next connection.
func (o TLSOptions) config(host string) (*tls.Config, error) {
	v, err := o.versions()
	if err != nil {
		return nil, err
	}
	c := &tls.Config{ServerName: host, MinVersion: v[0], MaxVersion: v[1]}
	if o.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("load client certificate: %w", err)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	if o.CAFile == "" {
		// What oslo.messaging does: encrypted, not verified.
		c.InsecureSkipVerify = true
		return c, nil
	}
	pem, err := os.ReadFile(o.CAFile)
	if err != nil {
		return nil, fmt.Errorf("read CA file: %w", err)
	}
	c.RootCAs = x509.NewCertPool()
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("read CA file: %s holds no certificate", o.CAFile)
	}
	if o.SkipHostname {
		c.InsecureSkipVerify = true // replaced by the check of the chain alone
		c.VerifyConnection = func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("the broker shows no certificate")
			}
			opts := x509.VerifyOptions{Roots: c.RootCAs, Intermediates: x509.NewCertPool()}
			for _, cert := range s.PeerCertificates[1:] {
				opts.Intermediates.AddCert(cert)
			}
			_, err := s.PeerCertificates[0].Verify(opts)
			return err
		}
	}
	return c, nil
}
