package glancebridge

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/confine"
	"github.com/novalet/novalet/glancebridge/layer"
)

// HelperCommand is the first argument by which the binary becomes one of the helpers: novalet image-helper ….
const HelperCommand = "image-helper"

// The descriptors of the helpers, in the order of exec.Cmd.ExtraFiles.
const (
	fdIn     = 3 // parse: notes on the image in lent memory or in the spool, or answers; apply: the entry stream
	fdOut    = 4 // parse: the entry stream; apply: the folder to write to
	fdReport = 5 // the result, as JSON
	fdSpool  = 6 // parse: an unlinked file

	// What the two pass contents by, and a pipe for the numbers of blocks that were written.
	fdApplyBack, fdApplyShared = 6, 7
	fdParseBack, fdParseShared = 7, 8

	// What the agent lends to the parser, and a pipe for the numbers of blocks that were read.
	fdLentBack, fdLent = 9, 10
)

// maxReport bounds the result of a helper in bytes.
const maxReport = 64 << 20

// parseRequest is what the parser is told. It holds nothing secret: it is passed as an argument.
type parseRequest struct {
	Arch       string       `json:"arch"`
	Ref        string       `json:"ref,omitempty"`
	Partition  int          `json:"partition,omitempty"`
	Limits     layer.Limits `json:"limits"`
	Known      []string     `json:"known,omitempty"`
	DiskFormat string       `json:"disk_format,omitempty"`
	// Spooled: the image of Size bytes is, or will be, in the spool.
	Spooled bool `json:"spooled,omitempty"`
	// Lent: the image comes by memory that the agent lends.
	Lent bool `json:"lent,omitempty"`
	// Index asks for the layers' places alone; the image of Size bytes is then read by asking for its parts.
	Index bool  `json:"index,omitempty"`
	Size  int64 `json:"size,omitempty"`
	// Trusted are the parts of the image that are left out of what is fed.
	Trusted []layer.IndexedLayer `json:"trusted,omitempty"`
}

// applyRequest is what the applier is told.
type applyRequest struct {
	Limits layer.Limits `json:"limits"`
	Owners bool         `json:"owners"`
	MaxID  uint32       `json:"max_id,omitempty"`
	// Shared: the content of files comes by memory that is shared with the parser.
	Shared bool `json:"shared,omitempty"`
}

// HelperMain runs one of the two helpers in this process and returns its exit status. The binary calls it when its
// first argument is HelperCommand, before anything else is set up; args are the arguments after that one. A
// helper has no rights beyond its descriptors, prints nothing and needs no configuration.
func HelperMain(args []string) int {
	if len(args) != 2 {
		return 2
	}
	// The bulk of the memory is buffers of a fixed size, and little is made beside them: to collect at every few megabytes, as
	// the default would have it, costs more than to wait, and a run is over soon. The limit bounds what is held back.
	debug.SetGCPercent(200)
	debug.SetMemoryLimit(44 << 20)
	report := os.NewFile(fdReport, "report")
	if args[0] != "userns" {
		go endWithParent()
	}
	var err error
	switch args[0] {
	case "userns":
		// Holds a user namespace until the parent has taken hold of it.
		_, _ = io.Copy(io.Discard, os.Stdin)
		return 0
	case "parse":
		err = parseMain(args[1], report)
	case "apply":
		err = applyMain(args[1], report)
	default:
		return 2
	}
	if err != nil {
		return 1
	}
	return 0
}

// endWithParent ends the helper when the agent has gone: nobody reads the report then, and the next agent clears away
// what is being written. A parent-death signal would not do: it comes when the parent's thread ends.
func endWithParent() {
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(3)
}

func parseMain(arg string, report *os.File) error {
	var q parseRequest
	if err := json.Unmarshal([]byte(arg), &q); err != nil {
		return err
	}
	in, out, spool := io.Reader(pipeEnd(fdIn, "image")), pipeEnd(fdOut, "entries"), os.NewFile(fdSpool, "spool")
	enc := layer.NewEncoder(out)
	if !q.Index {
		mem, err := mapShared(fdParseShared, layer.SharedBytes, unix.PROT_READ|unix.PROT_WRITE)
		if err != nil {
			return writeReport(report, &layer.Result{Error: err.Error()})
		}
		enc = layer.NewSharedEncoder(out, mem, pipeEnd(fdParseBack, "blocks"))
	}
	if q.Lent {
		mem, err := mapShared(fdLent, lentBytes, unix.PROT_READ)
		if err != nil {
			return writeReport(report, &layer.Result{Error: err.Error()})
		}
		in = newLent(mem, in, pipeEnd(fdLentBack, "lent blocks"))
	}
	if err := confine.Apply(confine.Parser()); err != nil {
		return writeReport(report, &layer.Result{Error: "confine the parser: " + err.Error()})
	}
	res := parse(in, out, enc, spool, &q)
	// Closing tells the applier that nothing more comes, whole or not.
	out.Close()
	return writeReport(report, res)
}

func applyMain(arg string, report *os.File) error {
	var q applyRequest
	if err := json.Unmarshal([]byte(arg), &q); err != nil {
		return err
	}
	in, dir := pipeEnd(fdIn, "entries"), os.NewFile(fdOut, "layers")
	dec := layer.NewDecoder(in)
	if q.Shared {
		mem, err := mapShared(fdApplyShared, layer.SharedBytes, unix.PROT_READ)
		if err != nil {
			return writeReport(report, &layer.ApplyResult{Error: err.Error()})
		}
		dec = layer.NewSharedDecoder(in, mem, pipeEnd(fdApplyBack, "blocks"))
	}
	unix.Umask(0)
	if err := confine.Apply(confine.Applier(int(dir.Fd()))); err != nil {
		return writeReport(report, &layer.ApplyResult{Error: "confine the applier: " + err.Error()})
	}
	return writeReport(report, apply(dec, dir, &q, true))
}

// pipeEnd opens an end of a pipe, or a file in the place of one. Waiting in the runtime's poller costs less than in the
// kernel, from where a processor has to be taken away.
func pipeEnd(fd int, name string) *os.File {
	_ = unix.SetNonblock(fd, true)
	return os.NewFile(uintptr(fd), name)
}

func writeReport(w io.WriteCloser, v any) error {
	err := json.NewEncoder(w).Encode(v)
	return errors.Join(err, w.Close())
}

// parse reads an image and writes its entries. It never fails otherwise than by its result, and recovers from
// panics: foreign bytes must not show a stack trace as an answer.
func parse(in io.Reader, out io.Writer, enc *layer.Encoder, spool spoolFile, q *parseRequest) (res *layer.Result) {
	defer func() {
		if p := recover(); p != nil {
			res = &layer.Result{Refused: "the image is damaged in a way its reader did not expect", Error: fmt.Sprint("panic: ", p)}
		}
	}()
	if q.Index {
		return index(in, out, q)
	}
	res, err := parseImage(in, enc, spool, q)
	if err == nil {
		err = enc.Finish()
	}
	if err == nil {
		return res
	}
	return failed(err)
}

// failed is the result of a parser that came to no good end.
func failed(err error) *layer.Result {
	res := &layer.Result{}
	var refused *layer.RefusedError
	if errors.As(err, &refused) {
		res.Refused = refused.Text
	} else {
		res.Error = err.Error()
		res.Full = errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
	}
	return res
}

// apply writes a stream of entries below dir. exactModes says that the umask is 0.
func apply(in *layer.Decoder, dir *os.File, q *applyRequest, exactModes bool) (res *layer.ApplyResult) {
	res, err := layer.Apply(dir, in, layer.ApplyOptions{Limits: q.Limits, Owners: q.Owners, MaxID: q.MaxID,
		ExactModes: exactModes})
	if err == nil {
		return res
	}
	var refused *layer.RefusedError
	var large *layer.TooLargeError
	switch {
	case errors.As(err, &refused):
		res.Refused = refused.Text
	case errors.As(err, &large):
		res.TooLarge = true
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		res.Full = true
	case errors.Is(err, io.ErrUnexpectedEOF):
		res.Cut = true
	}
	res.Error = err.Error()
	return res
}
