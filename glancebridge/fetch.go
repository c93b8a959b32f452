package glancebridge

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge/layer"
)

// fetch brings one image into the store: record, bytes, entries, layers, and the record last.
func (s *Store) fetch(ctx context.Context, f *flight, rc novalet.RequestContext, meta novalet.ImageMeta) (err error) {
	log := s.log.With("image", f.id, "request_id", rc.RequestID)
	defer func() {
		switch {
		case err == nil || errors.As(err, new(*novalet.Fault)):
		case context.Cause(ctx) != nil:
			err = context.Cause(ctx)
		case !errors.Is(err, novalet.ErrTryAgain) && !errors.Is(err, novalet.ErrNotFound):
			// Neither the image nor Glance: something is wrong with this host.
			err = fmt.Errorf("%w: %w", novalet.ErrReschedule, err)
		}
	}()
	select {
	case s.slots <- struct{}{}:
		f.leave = sync.OnceFunc(func() { <-s.slots })
		defer f.leave()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	rec, err := s.o.Glance.Get(ctx, rc, f.id)
	if err != nil {
		return glanceFault(f.id, err)
	}
	if err := s.admit(rec); err != nil {
		return err
	}
	// Before its bytes are fetched: they would be in vain.
	if err := fits(&novalet.ImageRequest{MaxBytes: f.maxBytes}, f.id, needs{bytes: max(rec.Size, rec.VirtualSize)}); err != nil {
		return err
	}
	f.total.Store(rec.Size)
	log.Info("fetching image", "name", rec.Name, "bytes", rec.Size)
	var sig *signature
	if f.trust.signed {
		if sig, err = s.signature(ctx, rc, rec, f.trust); err != nil {
			return err
		}
	} else if p := s.partial(ctx, rc, rec, log); p != nil {
		err := s.fetchFrom(ctx, f, rc, p, p.gaps, nil, rec, meta, log)
		p.Close()
		if err == nil || context.Cause(ctx) != nil || errors.Is(err, errBase) {
			return err
		}
		// The whole of it has the last word, and its checksum.
		log.Warn("fetching the missing layers alone did not succeed, the image is fetched whole", "err", err)
	}
	d := newDownload(ctx, s.o.Glance, rc, rec, s.o.IdleTimeout, s.o.Tries, s.o.RetryDelay, log.Warn)
	d.sig = sig
	defer d.Close()
	var signer []byte
	if sig != nil {
		signer = sig.cert
	}
	return s.fetchFrom(ctx, f, rc, d, nil, signer, rec, meta, log)
}

// fetchFrom unpacks and stores an image from a source that leaves out the layers in gaps, or that checks a signature by the
// certificate signer.
func (s *Store) fetchFrom(ctx context.Context, f *flight, rc novalet.RequestContext, src source, gaps []layer.IndexedLayer, signer []byte, rec *ImageRecord, meta novalet.ImageMeta, log *slog.Logger) error {
	start := time.Now()
	work, err := os.MkdirTemp(s.path("ingest"), "")
	if err != nil {
		return diskError(fmt.Errorf("make ingest folder: %w", err))
	}
	defer func() {
		if e := removeTree(work); e != nil {
			log.Warn("remove ingest folder", "err", e)
		}
	}()
	stopWatch := s.watch(ctx, f, src, rec.Size, log)
	defer stopWatch()
	res, applied, err := s.unpack(ctx, src, gaps, rec, f, meta, work)
	if err != nil {
		return err
	}
	atStage("unpacked")
	f.progress.Store(src.fetched())
	for _, w := range res.Warnings {
		log.Warn("image", "warning", w)
	}
	var base *imageRecord
	if res.Base != nil {
		if base, err = s.fetchBase(ctx, f, rc, res.Base); err != nil {
			return err
		}
	}
	if err := s.publish(ctx, rec, res, applied, base, gaps, signer, work); err != nil {
		return diskError(err)
	}
	log.Info("image ready", "format", res.Format, "layers", len(res.Order), "bytes", src.fetched(),
		"duration", time.Since(start).Round(time.Millisecond))
	return nil
}

// maxKnown bounds the layers that the parser is told of; with maxSkipped they fit into one argument of a process.
const maxKnown = 1000

// admit refuses what the record alone tells.
func (s *Store) admit(rec *ImageRecord) error {
	switch {
	case rec.Status == "queued" || rec.Status == "saving" || rec.Status == "uploading" || rec.Status == "importing":
		return &novalet.Fault{Kind: novalet.ErrAbort, Class: "ImageNotActive", Details: map[string]any{"image_id": rec.ID},
			Text: "the image has no data yet (status " + rec.Status + "); wait until it is active"}
	case rec.Status != "active":
		return &novalet.Fault{Kind: novalet.ErrAbort, Class: "ImageNotActive", Details: map[string]any{"image_id": rec.ID},
			Text: "the image cannot be used in status " + strconv.Quote(rec.Status)}
	case rec.Size > s.o.MaxDownloadBytes:
		return refused(rec.ID, fmt.Sprintf("the image is larger than the %d GiB this cloud accepts", s.o.MaxDownloadBytes>>30))
	}
	return nil
}

// glanceFault turns an answer of Glance into what the tenant is told.
func glanceFault(id string, err error) error {
	var ge *GlanceError
	switch {
	case errors.Is(err, novalet.ErrNotFound):
		return &novalet.Fault{Kind: novalet.ErrAbort, Class: "ImageNotFound", Text: "the image does not exist any more", Err: err,
			Details: map[string]any{"image_id": id}}
	case errors.As(err, &ge) && (ge.Status == 401 || ge.Status == 403):
		return &novalet.Fault{Kind: novalet.ErrAbort, Class: "ImageNotAuthorized", Text: "the image may not be read by you", Err: err,
			Details: map[string]any{"image_id": id}}
	case errors.As(err, &ge) && ge.Status == 204:
		return refused(id, "the image is empty; upload its data")
	case errors.As(err, &ge):
		f := refused(id, fmt.Sprintf("Glance does not give the image's data (status %d); ask its operator, or upload the image again", ge.Status))
		f.Err = err
		return f
	}
	return err
}

// watch reports the progress of a long fetch.
func (s *Store) watch(ctx context.Context, f *flight, src source, size int64, log *slog.Logger) (stop func()) {
	done := make(chan struct{})
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		last := time.Now()
		for {
			select {
			case <-done:
				return
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			f.progress.Store(src.fetched())
			if time.Since(last) >= 10*time.Second {
				last = time.Now()
				log.Info("fetching image", "done", src.fetched(), "bytes", size)
			}
		}
	}()
	return func() { close(done); <-finished }
}

// unpack runs the two helpers over the bytes of an image. What it returns is verified: all bytes were read and match
// the record.
func (s *Store) unpack(ctx context.Context, src source, gaps []layer.IndexedLayer, rec *ImageRecord, f *flight, meta novalet.ImageMeta, work string) (*layer.Result, *layer.ApplyResult, error) {
	br := bufio.NewReaderSize(src, 256<<10)
	head, err := br.Peek(layer.DetectLen)
	if err != nil && err != io.EOF {
		return nil, nil, glanceFault(rec.ID, err)
	}
	q := &parseRequest{Arch: s.o.Arch, Ref: rec.Properties["novalet_image_ref"], Limits: layer.Limits{Entries: s.o.MaxEntries}, Trusted: gaps}
	q.Partition, _ = strconv.Atoi(rec.Properties["novalet_root_partition"])
	limit := s.o.MaxImageBytes
	if f.maxBytes > 0 {
		limit = min(limit, f.maxBytes)
	}
	s.mu.Lock()
	for id, m := range s.layers {
		if m.DiffID == id && m.corrupt == "" && len(q.Known) < maxKnown {
			q.Known = append(q.Known, id)
		}
	}
	s.mu.Unlock()
	slices.Sort(q.Known)
	spool, err := unlinkedFile(work)
	if err != nil {
		return nil, nil, diskError(err)
	}
	defer spool.Close()
	in := beyond(br, src)
	format, derr := layer.Detect(head)
	if derr == nil {
		derr = checkDeclared(rec, format)
	}
	if derr != nil {
		var r *layer.RefusedError
		if errors.As(derr, &r) {
			return nil, nil, refused(rec.ID, r.Text)
		}
		return nil, nil, derr
	}
	if format.IsDisk() {
		q.Spooled, q.Size = true, rec.Size
		if rec.Size <= 0 {
			// Where the disk ends is known at its end.
			if q.Size, err = copySparse(spool, in, 0, nil); err != nil {
				return nil, nil, diskError(glanceFault(rec.ID, err))
			}
			in = nil
		} else {
			in = behind(in, src, spool)
		}
	}
	layers := filepath.Join(work, "layers")
	if err := os.Mkdir(layers, 0o755); err != nil {
		return nil, nil, diskError(err)
	}
	aq := &applyRequest{Limits: layer.Limits{Entries: s.o.MaxEntries, Bytes: limit}, Owners: !s.o.Unconfined, MaxID: s.o.IDSize}
	var out helperResult
	if s.o.Unconfined {
		out, err = runInside(in, spool, layers, q, aq)
	} else {
		out, err = s.runHelpers(ctx, in, spool, layers, q, aq)
	}
	if err != nil {
		return nil, nil, err
	}
	if err := s.verdict(&out, rec, src, f, limit); err != nil {
		return nil, nil, err
	}
	return out.parse, out.apply, nil
}

// checkDeclared holds the content against what the owner declared (CVE-2024-40767): disk formats have to agree, since
// other services trust the declaration. raw stands for everything that has no name of its own.
func checkDeclared(rec *ImageRecord, got layer.Format) error {
	declared := rec.DiskFormat
	if rec.ContainerFormat == "compressed" && got.IsWrapper() {
		return nil // Glance's own word for a disk within a compression
	}
	switch declared {
	case "", "raw", "ami", "root-tar", "tar", "oci", "docker":
		switch got {
		case layer.FormatQcow2, layer.FormatVmdk:
			return layer.Refuse("the image is declared as %s but is %s; set disk_format to %s", strconv.Quote(declared), got, got)
		}
		return nil
	case "squashfs":
		if got != layer.FormatSquash {
			return layer.Refuse("the image is declared as squashfs but is not; upload it with its real disk_format")
		}
		return nil
	case "qcow2", "vmdk":
		if string(got) != declared {
			return layer.Refuse("the image is declared as %s but is not; upload it with its real disk_format", declared)
		}
		return nil
	}
	return layer.Refuse("the image's disk_format %q cannot be booted here; use raw (archives and disks), qcow2 or vmdk", declared)
}

// verdict finds, among what the helpers and the download say, the one thing to tell. The order matters: each failure
// makes the ones downstream of it fail too.
func (s *Store) verdict(out *helperResult, rec *ImageRecord, src source, f *flight, limit int64) error {
	p, a, ended := out.parse, out.apply, src.failure()
	switch {
	case ended != nil && ended != io.EOF && !out.stopped:
		return glanceFault(rec.ID, ended)
	case out.spool != nil:
		return diskError(out.spool)
	case a.Full || p.Full:
		return diskError(unix.ENOSPC)
	case a.TooLarge && f.maxBytes > 0 && limit == f.maxBytes:
		return tooSmall(rec.ID, fmt.Sprintf("the image unpacks to more than the flavor's disk of %d MiB; choose a larger flavor", limit>>20))
	case a.TooLarge:
		return refused(rec.ID, fmt.Sprintf("the image unpacks to more than the %d GiB this cloud accepts", limit>>30))
	case a.Refused != "":
		return refused(rec.ID, a.Refused)
	case p.Refused != "":
		err := refused(rec.ID, p.Refused)
		if p.Error != "" {
			err.Err = errors.New(p.Error)
		}
		return err
	case a.Error != "" && !a.Cut:
		return fmt.Errorf("unpack image: %s", a.Error)
	case p.Error != "":
		return fmt.Errorf("read image: %s", p.Error)
	case a.Error != "":
		return fmt.Errorf("unpack image: %s", a.Error)
	case ended != io.EOF:
		return fmt.Errorf("read image: its reader stopped at %d of %d bytes", src.fetched(), rec.Size)
	}
	return nil
}

// unlinkedFile gives a file that is gone when it is closed.
func unlinkedFile(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), "spool"), nil
	}
	f, err := os.CreateTemp(dir, "spool-*")
	if err != nil {
		return nil, fmt.Errorf("make spool file: %w", err)
	}
	return f, os.Remove(f.Name())
}
