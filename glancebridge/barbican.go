package glancebridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/novalet/novalet"
)

// maxCertificate bounds a certificate in bytes.
const maxCertificate = 64 << 10

// barbican speaks the key manager's API v1.
type barbican struct{ cloud Cloud }

// NewBarbican returns the certificates of a cloud's key manager. It reads with the user's token, as Nova does.
func NewBarbican(c Cloud) Certificates { return barbican{c} }

// Certificate implements Certificates.
func (b barbican) Certificate(ctx context.Context, rc novalet.RequestContext, id string) ([]byte, error) {
	c, err := b.client(ctx, rc)
	if err != nil {
		return nil, err
	}
	base := strings.TrimSuffix(c.Endpoint, "/")
	if !strings.HasSuffix(base, "/v1") {
		base += "/v1"
	}
	// Barbican gives a payload in the type that it was stored with, and 406 for any other.
	for _, accept := range []string{"application/octet-stream", "application/pkix-cert", "text/plain"} {
		req, err := newRequest(ctx, http.MethodGet, base+"/secrets/"+url.PathEscape(id)+"/payload", nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Accept", accept)
		resp, err := call(c, req, "read certificate", http.StatusOK)
		var ge *GlanceError
		if errors.As(err, &ge) && ge.Status == http.StatusNotAcceptable {
			continue
		}
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(io.LimitReader(resp.Body, maxCertificate))
		resp.Body.Close()
		if err != nil {
			return nil, fmt.Errorf("%w: read certificate: %w", novalet.ErrTryAgain, err)
		}
		return data, nil
	}
	return nil, fmt.Errorf("read certificate: the key manager has %s in no usable form", id)
}

func (b barbican) client(ctx context.Context, rc novalet.RequestContext) (*gophercloud.ServiceClient, error) {
	if rc.AuthToken == "" {
		return b.cloud.Client(ctx, "key-manager")
	}
	return b.cloud.UserClient(ctx, rc, "key-manager")
}
