package agent

import (
	"slices"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

// TestTrustedCertificates: an image is asked for with the certificates that the server's owner trusts, also when the message
// leaves them out and when this host has no record of the instance.
func TestTrustedCertificates(t *testing.T) {
	l := newLab(t)
	want := []string{"cert-1", "cert-2"}
	uuid := l.boot()
	l.world.SetRow(uuid, func(r *fake.Row) { r.Instance.TrustedCertificates = want })
	without := func(m novalet.Method, task novalet.TaskState, args novalet.OperationArgs, state novalet.VMState) {
		t.Helper()
		op := l.message(uuid, m, task, args)
		op.Instance.TrustedCertificates = nil
		l.submit(op)
		l.await(uuid, state)
	}
	check := func(when string) {
		t.Helper()
		if got := l.world.TrustedCertificates(); !slices.Equal(got, want) {
			t.Errorf("%s: %v", when, got)
		}
	}
	l.cast(uuid, novalet.MethodRebuild, novalet.TaskRebuilding, novalet.OperationArgs{Rebuild: &novalet.RebuildArgs{ImageRef: diskImage}})
	l.await(uuid, novalet.VMActive)
	check("rebuild")
	without(novalet.MethodRescue, novalet.TaskRescuing, novalet.OperationArgs{ImageID: diskImage}, novalet.VMRescued)
	check("rescue")
	without(novalet.MethodUnrescue, novalet.TaskUnrescuing, novalet.OperationArgs{}, novalet.VMActive)
	without(novalet.MethodShelve, novalet.TaskShelving, novalet.OperationArgs{ImageID: "shelf"}, novalet.VMShelvedOffloaded)
	eventually(t, "the record is gone", func() bool { _, err := l.agent.lookup(uuid); return err != nil })
	l.world.Allocate(uuid)
	without(novalet.MethodUnshelve, novalet.TaskUnshelving,
		novalet.OperationArgs{Build: &novalet.BuildArgs{Image: novalet.ImageMeta{ID: "shelf"}, Node: testHost}}, novalet.VMActive)
	check("unshelve")
}
