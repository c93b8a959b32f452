package agent

import (
	"context"

	"github.com/novalet/novalet"
)

// AttachInterface implements novalet.Compute.
func (a *Agent) AttachInterface(ctx context.Context, r *novalet.InterfaceRequest) (*novalet.VIF, error) {
	return nil, novalet.ErrUnsupported
}
