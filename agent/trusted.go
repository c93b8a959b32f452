package agent

import (
	"context"
	"fmt"
)

// trustedCertificates are the certificates that the owner of an instance trusts for its images. Nova sends them with an
// instance that is made or rebuilt, and with other messages only when it happens to have them.
func (a *Agent) trustedCertificates(ctx context.Context, in *instance) ([]string, error) {
	if known := in.view().TrustedCertificates; known != nil {
		return known, nil
	}
	row, err := a.conductor.Instance(ctx, in.uuid)
	if err != nil {
		return nil, fmt.Errorf("read the trusted certificates of the instance: %w", err)
	}
	in.note(func(r *record) { r.Instance.TrustedCertificates = row.TrustedCertificates })
	return row.TrustedCertificates, nil
}
