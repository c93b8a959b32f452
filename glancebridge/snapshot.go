package glancebridge

import (
	"context"
	"fmt"

	"github.com/novalet/novalet"
)

// Snapshot implements novalet.ImageStore.
func (s *Store) Snapshot(ctx context.Context, r *novalet.SnapshotRequest) error {
	return fmt.Errorf("snapshot instance: %w", novalet.ErrUnsupported)
}
