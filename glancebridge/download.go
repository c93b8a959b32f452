package glancebridge

import (
	"context"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"github.com/novalet/novalet"
)

// download is the data of one image as a stream that survives cut connections: it goes on where it stopped, or, from
// a service without ranges, reads up to there again. Everything it gives is hashed once, in order, so the
// verdict at the end covers exactly the bytes given. Not safe for concurrent use but for progress.
type download struct {
	ctx   context.Context
	rec   *ImageRecord
	idle  time.Duration
	tries int
	delay time.Duration // before the second try; doubled with each
	log   func(msg string, args ...any)

	// limit is where the data ends, 0 when the record does not say. openAt begins a request there or earlier.
	limit  int64
	openAt func(ctx context.Context, off int64) (body io.ReadCloser, start int64, err error)

	off    atomic.Int64
	body   io.ReadCloser
	stop   context.CancelCauseFunc
	timer  *time.Timer
	failed int // tries since the last byte
	// stalled is where the data stopped coming, 0 before it did.
	stalled int64
	hash    hash.Hash
	sig     *signature // nil unless the image's signature counts
	trail   *trail     // which hashes what is given, unless Read does
	want    string
	err     error
}

var errIdle = errors.New("no data came for too long")

func newDownload(ctx context.Context, g Glance, rc novalet.RequestContext, rec *ImageRecord, idle time.Duration, tries int,
	delay time.Duration, log func(string, ...any)) *download {
	d := &download{ctx: ctx, rec: rec, idle: idle, tries: tries, delay: delay, log: log, limit: max(rec.Size, 0)}
	d.openAt = func(ctx context.Context, off int64) (io.ReadCloser, int64, error) {
		return g.Download(ctx, rc, rec.ID, off)
	}
	d.hash, d.want = recordHash(rec)
	return d
}

// recordHash is the strongest digest the record has: os_hash_value, else the MD5 of images older than that. nil when
// there is none or its kind is unknown.
func recordHash(rec *ImageRecord) (hash.Hash, string) {
	if rec.HashValue != "" {
		want := strings.ToLower(rec.HashValue)
		switch strings.ToLower(rec.HashAlgo) {
		case "sha512":
			return sha512.New(), want
		case "sha384":
			return sha512.New384(), want
		case "sha256":
			return sha256.New(), want
		case "sha1":
			return sha1.New(), want
		case "md5":
			return md5.New(), want
		}
	}
	if rec.Checksum != "" {
		return md5.New(), strings.ToLower(rec.Checksum)
	}
	return nil, ""
}

// Read implements io.Reader. io.EOF means that all bytes of the record's size were given and match its digest.
func (d *download) Read(p []byte) (int, error) {
	if d.err != nil {
		return 0, d.err
	}
	for {
		if err := context.Cause(d.ctx); err != nil {
			return 0, d.end(err)
		}
		if d.body == nil {
			if err := d.open(); err != nil {
				if !d.again(err) {
					return 0, d.end(err)
				}
				continue
			}
		}
		// Only the waiting counts: whoever reads from us may be slow.
		d.timer.Reset(d.idle)
		n, err := d.body.Read(p)
		d.timer.Stop()
		if n > 0 {
			d.failed = 0
			off := d.off.Add(int64(n))
			if d.trail == nil {
				_, _ = d.sums().Write(p[:n])
			}
			if d.limit > 0 && off > d.limit {
				return 0, d.end(d.refuse("Glance gives more data than the image's record says; upload the image again"))
			}
			return n, nil
		}
		switch {
		case err == nil:
			continue
		case err == io.EOF && (d.limit == 0 || d.off.Load() == d.limit):
			d.closeBody()
			return 0, d.end(d.verify())
		case err == io.EOF:
			err = d.cutFault()
		case errors.Is(context.Cause(d.ctx), err):
		case d.stalledAgain(err):
			return 0, d.end(d.cutFault())
		default:
			err = fmt.Errorf("%w: download image %s: %w", novalet.ErrTryAgain, d.rec.ID, err)
		}
		d.closeBody()
		if !d.again(err) {
			return 0, d.end(err)
		}
	}
}

// stalledAgain says that the data stopped where it stopped before: a store that has lost the rest of an image keeps the
// connection and sends no more, however often it is asked.
func (d *download) stalledAgain(err error) bool {
	if !errors.Is(err, errIdle) {
		return false
	}
	off := d.off.Load()
	before := d.stalled
	d.stalled = off
	return off > 0 && before == off
}

func (d *download) end(err error) error {
	d.closeBody()
	d.err = err
	return err
}

// verify gives io.EOF for data that is what the record says.
func (d *download) verify() error {
	if d.off.Load() == 0 {
		return d.refuse("the image is empty; upload its data")
	}
	if err := d.hashInline(); err != nil {
		return err
	}
	if d.hash != nil {
		if got := hex.EncodeToString(d.hash.Sum(nil)); got != d.want {
			f := d.refuse("the image's data does not match the checksum in its record, so it was damaged in store or on the way; " +
				"upload the image again")
			f.Err = fmt.Errorf("image %s: digest %s, record says %s", d.rec.ID, got, d.want)
			return f
		}
	}
	if d.sig != nil && !d.sig.verify() {
		return d.refuse("the image's data is not what was signed; sign the image again, or ask who altered it")
	}
	return io.EOF
}

// sums is what all data has to go to, in order.
func (d *download) sums() io.Writer {
	switch {
	case d.hash != nil && d.sig != nil:
		return io.MultiWriter(d.hash, d.sig)
	case d.hash != nil:
		return d.hash
	case d.sig != nil:
		return d.sig
	}
	return io.Discard
}

// hashBehind has what is given from now on hashed out of the file that it is written to, beside everything else. Who calls it
// sees to it that nobody else can write there, tells the trail what was written, and does so for everything before it reads
// on at the end of the data.
func (d *download) hashBehind(at io.ReaderAt) *trail {
	d.trail = newTrail(at, d.off.Load(), d.sums())
	return d.trail
}

// hashInline ends that: Read hashes what it gives.
func (d *download) hashInline() error {
	if d.trail == nil {
		return nil
	}
	err := d.trail.finish()
	d.trail = nil
	return err
}

func (d *download) refuse(text string) *novalet.Fault { return refused(d.rec.ID, text) }

func (d *download) cutFault() *novalet.Fault {
	return refused(d.rec.ID, fmt.Sprintf("the image's download ends after %d of %d bytes, also when repeated; upload the image again",
		d.off.Load(), d.limit))
}

// open starts a request at the current offset.
func (d *download) open() error {
	ctx, stop := context.WithCancelCause(d.ctx)
	timer := time.AfterFunc(d.idle, func() { stop(errIdle) })
	off := d.off.Load()
	body, start, err := d.openAt(ctx, off)
	if err == nil && start != off {
		if start != 0 {
			err = fmt.Errorf("download image: asked for offset %d, got %d", off, start)
		} else {
			_, err = io.CopyN(io.Discard, &kick{body, timer, d.idle}, off)
		}
		if err != nil {
			body.Close()
		}
	}
	if err != nil {
		if errors.Is(context.Cause(ctx), errIdle) {
			err = errIdle
		}
		timer.Stop()
		stop(err)
		return err
	}
	timer.Stop()
	d.body, d.stop, d.timer = body, stop, timer
	return nil
}

// kick keeps the idle timer from firing while bytes come.
type kick struct {
	r     io.Reader
	timer *time.Timer
	idle  time.Duration
}

func (k *kick) Read(p []byte) (int, error) {
	n, err := k.r.Read(p)
	if n > 0 {
		k.timer.Reset(k.idle)
	}
	return n, err
}

// again waits before another try, or says that there is none.
func (d *download) again(err error) bool {
	var ge *GlanceError
	if errors.Is(err, novalet.ErrNotFound) || errors.Is(err, errNoRange) || errors.As(err, &ge) || context.Cause(d.ctx) != nil {
		return false
	}
	if d.failed++; d.failed >= d.tries {
		return false
	}
	d.log("download cut, trying again", "image", d.rec.ID, "offset", d.off.Load(), "try", d.failed+1, "err", err)
	t := time.NewTimer(min(d.delay<<min(d.failed-1, 6), 5*time.Second))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-d.ctx.Done():
		return false
	}
}

func (d *download) closeBody() {
	if d.body == nil {
		return
	}
	d.timer.Stop()
	d.stop(nil)
	d.body.Close()
	d.body = nil
}

// Close ends the download early.
func (d *download) Close() error {
	d.closeBody()
	if d.trail != nil {
		d.trail.stop()
	}
	return nil
}

// fetched is how many bytes came so far. It may be called beside Read.
func (d *download) fetched() int64 { return d.off.Load() }

// failure is what ended the download, io.EOF when it came to its end well.
func (d *download) failure() error { return d.err }
