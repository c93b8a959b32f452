package agent

import (
	"context"
	"errors"

	"github.com/novalet/novalet"
)

// tell tells others than Nova how the instance stands; change adds what the action is about.
func (a *Agent) tell(in *instance, rc novalet.RequestContext, action novalet.Action, phase novalet.Phase, change ...func(*novalet.Notification)) {
	if a.notifier == nil {
		return
	}
	n := &novalet.Notification{Context: rc, Action: action, Phase: phase}
	in.mu.Lock()
	inst := in.rec.Instance
	inst.PowerState = in.power
	n.Instance = &inst
	if in.rec.Build != nil {
		n.BlockDevices = in.rec.Build.BlockDevices
	}
	in.mu.Unlock()
	for _, f := range change {
		f(n)
	}
	a.notifier.Notify(n)
}

// withError adds why an action failed.
func withError(err error) func(*novalet.Notification) {
	return func(n *novalet.Notification) { n.Err = err }
}

// withImage adds the image an action is about.
func withImage(id, name string) func(*novalet.Notification) {
	return func(n *novalet.Notification) { n.ImageID, n.ImageName = id, name }
}

// tellStart tells that an operation begins. Where the use of the instance changes with it, what it was until now is
// told first, as in Nova.
func (a *Agent) tellStart(in *instance, op *novalet.Operation, m *method) {
	if m.action == "" {
		return
	}
	if m.action == novalet.ActionRebuild {
		a.tell(in, op.Context, novalet.ActionExists, novalet.PhaseNone)
	}
	a.tell(in, op.Context, m.action, novalet.PhaseStart, withImage(op.Args.ImageID, ""))
}

// tellEnd tells how it ended. What the agent's own end interrupted goes on later.
func (a *Agent) tellEnd(ctx context.Context, in *instance, op *novalet.Operation, m *method, err error) {
	if m.action == "" || err != nil && errors.Is(context.Cause(ctx), errShutdown) {
		return
	}
	image := withImage(op.Args.ImageID, "")
	switch {
	case err == nil || m.tellAlways:
		if m.action == novalet.ActionRescue {
			a.tell(in, op.Context, novalet.ActionExists, novalet.PhaseNone)
		}
		a.tell(in, op.Context, m.action, novalet.PhaseEnd, image)
	case m.tellError:
		a.tell(in, op.Context, m.action, novalet.PhaseError, image, withError(err))
	}
}
