package novalet

import (
	"errors"
	"fmt"
)

// The kinds of error that parts hand to one another. Each says what the caller should do; ask with
// errors.Is. novadriver/fault.go alone turns them into Nova exceptions.
var (
	// ErrNotFound: the thing named does not exist (any more). For a delete that is success.
	ErrNotFound = errors.New("not found")
	// ErrBusy: the thing is in a state or in use so that the operation cannot be done now.
	ErrBusy = errors.New("busy")
	// ErrTryAgain: a passing fault of the outside (broker, conductor, REST service); repeating may help.
	ErrTryAgain = errors.New("try again")
	// ErrUnsupported: this agent cannot do it, on any host.
	ErrUnsupported = errors.New("unsupported")
	// ErrReschedule: the build failed for a reason of this host; another one may manage.
	ErrReschedule = errors.New("reschedule")
	// ErrAbort: the build failed for a reason that another host would meet too; it must not be rescheduled.
	ErrAbort = errors.New("abort")
	// ErrInstanceGone: the conductor no longer has the instance, or it is being deleted. The operation
	// stops quietly and cleans up.
	ErrInstanceGone = errors.New("instance gone")
	// ErrTaskState: the conductor refused a save because the task_state was not among those expected.
	ErrTaskState = errors.New("unexpected task state")
	// ErrInvalidState: the instance is in no state in which this can be done.
	ErrInvalidState = errors.New("invalid state")
)

// Fault is an error with a text for the tenant: what went wrong and what to do about it. The text must name
// no host path, address or secret. Err, if any, is for the log alone.
type Fault struct {
	// Kind is one of the Err… values of this package.
	Kind error
	// Class is the Nova exception that says the same, such as "ImageUnacceptable"; empty lets the
	// driver choose by Kind.
	Class string
	// Text is shown by `openstack server show` (fault.message), at most 255 characters of it.
	Text string
	// Details are format arguments of the Nova exception (kwargs), such as image_id or reason.
	Details map[string]any
	// Err is the cause.
	Err error
}

// Error implements error: the tenant's text, then the cause.
func (f *Fault) Error() string {
	if f.Err != nil {
		return f.Text + ": " + f.Err.Error()
	}
	return f.Text
}

// Unwrap lets errors.Is find both the kind and the cause.
func (f *Fault) Unwrap() []error {
	if f.Err == nil {
		return []error{f.Kind}
	}
	return []error{f.Kind, f.Err}
}

// Faultf makes a Fault of a kind and Nova exception class with a formatted text.
func Faultf(kind error, class, format string, args ...any) *Fault {
	return &Fault{Kind: kind, Class: class, Text: fmt.Sprintf(format, args...)}
}

// FaultText returns the text meant for the tenant, if err carries one, else "".
func FaultText(err error) string {
	var f *Fault
	if errors.As(err, &f) {
		return f.Text
	}
	return ""
}
