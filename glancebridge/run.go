package glancebridge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/layer"
)

// helperResult is what both helpers reported.
type helperResult struct {
	parse *layer.Result
	apply *layer.ApplyResult
	// stopped: the parser read no further, so that the feeding ended before the download did.
	stopped bool
	// spool is why a disk could not be written to the spool.
	spool error
}

// pipeSize is what is asked for each pipe in bytes: the default of 64 KiB costs a switch of process for each.
const pipeSize = 1 << 20

// runInside runs the helpers as goroutines.
func runInside(in io.Reader, spool *os.File, layers string, q *parseRequest, aq *applyRequest) (out helperResult, err error) {
	dir, err := os.Open(layers)
	if err != nil {
		return out, err
	}
	defer dir.Close()
	var wg sync.WaitGroup
	pr, pw := io.Pipe()
	wg.Go(func() {
		out.apply = apply(layer.NewDecoder(pr), dir, aq, false)
		// The parser must not wait for a reader that has gone.
		_, _ = io.Copy(io.Discard, pr)
	})
	fr, fw := io.Pipe()
	parsed := make(chan bool, 1)
	wg.Go(func() {
		defer fw.Close()
		if !q.Spooled {
			_, _ = io.Copy(fw, in)
		} else if err := feedDisk(fw, spool, in, q.Size, func() bool { return <-parsed }); err != nil && !errors.Is(err, io.ErrClosedPipe) {
			out.spool = err
		}
	})
	out.parse = parse(fr, pw, layer.NewEncoder(pw), spool, q)
	parsed <- out.parse.OK()
	fr.Close()
	pw.Close()
	wg.Wait()
	out.stopped = !out.parse.OK()
	return out, nil
}

// runHelpers runs the helpers as processes, feeds the parser and collects both reports.
func (s *Store) runHelpers(ctx context.Context, in io.Reader, spool *os.File, layers string, q *parseRequest, aq *applyRequest) (out helperResult, err error) {
	var files openFiles
	defer files.close()
	image, fed, err := files.pipe(pipeSize)
	if err != nil {
		return out, err
	}
	entriesR, entriesW, err := files.pipe(pipeSize)
	if err != nil {
		return out, err
	}
	parseR, parseW, err := files.pipe(pipeSize)
	if err != nil {
		return out, err
	}
	applyR, applyW, err := files.pipe(pipeSize)
	if err != nil {
		return out, err
	}
	backR, backW, err := files.pipe(0)
	if err != nil {
		return out, err
	}
	shared, err := sharedMemory()
	if err != nil {
		return out, err
	}
	files = append(files, shared)
	var lend *lender
	var lentBack, lentMem *os.File
	if q.Lent = !q.Spooled; q.Lent {
		var r *os.File
		if r, lentBack, err = files.pipe(0); err != nil {
			return out, err
		}
		mem, f, err := lendMemory()
		if err != nil {
			return out, err
		}
		defer unix.Munmap(mem)
		files = append(files, f)
		lentMem, lend = f, newLender(mem, fed, r)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	given := []*os.File{image, entriesW, parseW, spool, backR, shared}
	if q.Lent {
		given = append(given, lentBack, lentMem)
	} else {
		// What is hashed out of the spool must be what was written there.
		if given[3], err = files.readOnly(spool); err != nil {
			return out, err
		}
	}
	parser, err := s.helper(ctx, "parse", q, given, s.parserAttr())
	if err != nil {
		return out, err
	}
	// Each pipe must be held by its two ends alone, or nobody sees an end.
	for _, f := range []*os.File{image, entriesW, parseW, backR, lentBack} {
		f.Close()
	}
	var wg sync.WaitGroup
	var feedErr, parseErr, parseExit, applyErr error
	out.parse, out.apply = &layer.Result{}, &layer.ApplyResult{}
	parsed := make(chan bool, 1)
	wg.Go(func() {
		if q.Lent {
			feedErr = lend.send(in)
		} else {
			feedErr = feedDisk(fed, spool, in, q.Size, func() bool { return <-parsed })
		}
		fed.Close()
	})
	wg.Go(func() {
		parseErr = readReport(parseR, out.parse)
		parsed <- parseErr == nil && out.parse.OK()
	})
	wg.Go(func() { parseExit = ignoreExit(parser.Wait()) })
	// The parser reads the beginning of the image meanwhile.
	aq.Shared = true
	var applier *exec.Cmd
	target, err := s.idmap.open(s, layers)
	if err == nil {
		files = append(files, target)
		applier, err = s.helper(ctx, "apply", aq, []*os.File{entriesR, target, applyW, backW, shared}, s.applierAttr())
	}
	for _, f := range []*os.File{entriesR, applyW, backW} {
		f.Close()
	}
	if err != nil {
		cancel()
		wg.Wait()
		return out, err
	}
	wg.Go(func() { applyErr = readReport(applyR, out.apply) })
	applyExit := ignoreExit(applier.Wait())
	wg.Wait()
	out.stopped = errors.Is(feedErr, unix.EPIPE)
	if q.Spooled && !out.stopped {
		out.spool = feedErr
	}
	if cause := context.Cause(ctx); cause != nil {
		return out, cause
	}
	// A helper without a report was killed: by the kernel for memory or a forbidden call, or by an operator.
	if err := errors.Join(parseErr, parseExit); err != nil && out.parse.Error == "" {
		out.parse.Refused = "the image is damaged or too demanding: its reader had to be stopped"
		out.parse.Error = "the parser gave no report: " + err.Error()
	}
	if err := errors.Join(applyErr, applyExit); err != nil && out.apply.Error == "" {
		out.apply.Error = "the applier gave no report: " + err.Error()
		out.apply.Cut = out.parse.Refused != ""
	}
	return out, nil
}

// helper starts one of the two.
func (s *Store) helper(ctx context.Context, name string, request any, files []*os.File, attr *syscall.SysProcAttr) (*exec.Cmd, error) {
	arg, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	argv := append(append([]string{}, s.o.Helper...), name, string(arg))
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = []string{"GOTRACEBACK=none", "GOMAXPROCS=4"}
	cmd.Dir = "/"
	cmd.ExtraFiles = files
	cmd.SysProcAttr = attr
	// Open as long as this process lives, or until Wait.
	if _, err := cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start image helper: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start image helper: %w", err)
	}
	return cmd, nil
}

// ignoreExit drops an exit status: the report says more.
func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return nil
	}
	return err
}

// readReport decodes one bounded JSON document.
func readReport(r io.Reader, v any) error {
	lr := &io.LimitedReader{R: r, N: maxReport}
	if err := json.NewDecoder(lr).Decode(v); err != nil {
		if lr.N <= 0 {
			return fmt.Errorf("report of more than %d bytes", maxReport)
		}
		return err
	}
	_, err := io.Copy(io.Discard, lr)
	return err
}
