package glancebridge

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge/layer"
)

const (
	// minPartial is the smallest image, in bytes, that is looked at for what need not be fetched; minSkip the smallest
	// layer that is left out: asking for its neighbours apart costs more.
	minPartial = 256 << 10
	minSkip    = 64 << 10
	// maxQuestions and maxAnswers bound what is fetched of an image before its layers are known.
	maxQuestions = 20_000
	maxAnswers   = 64 << 20 // bytes
	// maxSkipped bounds the layers left out, maxHolders the images that a user is asked to be able to read.
	maxSkipped = 300
	maxHolders = 20
)

// source is where the bytes of an image come from: all of them, or a part.
type source interface {
	io.ReadCloser
	// fetched may be called beside Read; failure is what ended the reading, io.EOF when that was the end.
	fetched() int64
	failure() error
}

var (
	_ source = (*download)(nil)
	_ source = (*partial)(nil)
)

// partial is an image of which only some parts are fetched: it gives, in order, all its bytes but those of the layers
// left out. It is not checked against the checksum of the record, which covers the whole; each layer that is fetched is
// checked by the digest in the image's config. Not safe for concurrent use but for fetched.
type partial struct {
	open  func(from, to int64) *download
	size  int64
	parts []part // what came as answers to questions, by place
	gaps  []layer.IndexedLayer
	pos   int64
	cur   *download
	done  atomic.Int64 // bytes fetched by what has ended
	curN  atomic.Int64
	err   error
}

type part struct {
	off  int64
	data []byte
}

// partial looks at the archive's members for layers that need not be fetched. nil when the image is to be fetched whole:
// there is nothing to leave out, or its store does not serve parts, or it is no such archive.
func (s *Store) partial(ctx context.Context, rc novalet.RequestContext, rec *ImageRecord, log interface {
	Info(string, ...any)
	Warn(string, ...any)
}) *partial {
	if s.o.WholeImages || rec.ContainerFormat != "docker" || rec.Size < minPartial || rc.AuthToken == "" || !s.maySpare(rec) {
		return nil
	}
	p := &partial{size: rec.Size}
	open := func(ctx context.Context) func(from, to int64) *download {
		return func(from, to int64) *download { return s.rangeOf(ctx, rc, rec, from, to, log.Warn) }
	}
	look, cancel := context.WithTimeoutCause(ctx, s.look, errors.New("looking at its members takes too long"))
	defer cancel()
	p.open = open(look)
	list, err := s.index(look, p, rec)
	p.open = open(ctx)
	if err != nil {
		if errors.Is(err, errNoRange) {
			s.mu.Lock()
			if len(s.noRange) >= 1000 {
				clear(s.noRange)
			}
			s.noRange[rec.ID] = true
			s.mu.Unlock()
		}
		log.Info("the image is fetched whole", "reason", err)
		return nil
	}
	asked := map[string]bool{}
	slices.SortFunc(list, func(a, b layer.IndexedLayer) int { return int(min(max(b.Size-a.Size, -1), 1)) })
	var left int64
	for _, l := range list {
		if l.Size >= minSkip && len(p.gaps) < maxSkipped && s.mayJoin(ctx, rc, rec, l.DiffID, asked) {
			p.gaps = append(p.gaps, l)
			left += l.Size
		}
	}
	if len(p.gaps) == 0 || !byPlace(p.gaps, rec.Size) {
		return nil
	}
	log.Info("layers that are stored already are not fetched", "layers", len(p.gaps), "bytes", left)
	return p
}

// maySpare reports whether it is worth looking: some stored image may have layers that this one may join. Its owner and
// visibility may have changed since; what counts is asked later.
func (s *Store) maySpare(rec *ImageRecord) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noRange[rec.ID] {
		return false
	}
	for _, r := range s.images {
		if r.HasConfig && (r.Owner == "" || r.Owner == rec.Owner || openToAll(r.Visibility)) {
			return true
		}
	}
	return false
}

func openToAll(visibility string) bool { return visibility == "public" || visibility == "community" }

// mayJoin reports whether a stored layer may become part of an image without that image's own bytes for it. A digest is a
// name, not a right: whoever knows the digest of somebody else's layer could else boot from it. The requester's own token
// must be able to read an image that was read whole and has the layer, and the owner of this image too, since its other
// users get the layer from it: so that image is of the same project, or open to all.
func (s *Store) mayJoin(ctx context.Context, rc novalet.RequestContext, rec *ImageRecord, diffID string, asked map[string]bool) bool {
	s.mu.Lock()
	var holders []string
	if m := s.layers[diffID]; m != nil && m.corrupt == "" && m.DiffID == diffID {
		for _, r := range s.images {
			if slices.Contains(r.Layers, diffID) && !slices.Contains(r.Joined, diffID) {
				holders = append(holders, r.ID)
			}
		}
	}
	s.mu.Unlock()
	slices.Sort(holders)
	for _, id := range holders {
		ok, known := asked[id]
		if !known {
			if len(asked) >= maxHolders {
				continue
			}
			r, err := s.o.Glance.Readable(ctx, rc, id)
			ok = err == nil && r.Status == "active" && (openToAll(r.Visibility) || r.Owner != "" && r.Owner == rec.Owner)
			asked[id] = ok
		}
		if ok {
			return true
		}
	}
	return false
}

// rangeOf is the download of a part of an image, with all the patience of a whole one.
func (s *Store) rangeOf(ctx context.Context, rc novalet.RequestContext, rec *ImageRecord, from, to int64, warn func(string, ...any)) *download {
	d := newDownload(ctx, s.o.Glance, rc, rec, s.o.IdleTimeout, s.o.Tries, s.o.RetryDelay, warn)
	d.hash, d.limit = nil, to
	d.off.Store(from)
	d.openAt = func(ctx context.Context, off int64) (io.ReadCloser, int64, error) {
		body, err := s.o.Glance.Range(ctx, rc, rec.ID, off, to-off)
		return body, off, err
	}
	return d
}

// index runs the parser over the places that it asks for.
func (s *Store) index(ctx context.Context, p *partial, rec *ImageRecord) ([]layer.IndexedLayer, error) {
	// One question of our own settles whether parts are served at all, and whether it is a plain tar.
	head, err := p.answer(0, minWindow)
	if err != nil {
		return nil, err
	}
	if f, err := layer.Detect(head); err != nil || f != layer.FormatTar {
		return nil, errors.New("it is no plain archive")
	}
	q := &parseRequest{Arch: s.o.Arch, Ref: rec.Properties["novalet_image_ref"], Limits: layer.Limits{Entries: s.o.MaxEntries},
		Index: true, Size: rec.Size}
	var files openFiles
	defer files.close()
	questionsR, questionsW, err := files.pipe(0)
	if err != nil {
		return nil, err
	}
	answersR, answersW, err := files.pipe(0)
	if err != nil {
		return nil, err
	}
	res := &layer.Result{}
	var wg sync.WaitGroup
	var helperErr error
	if s.o.Unconfined {
		wg.Go(func() {
			res = index(answersR, questionsW, q)
			questionsW.Close()
			answersR.Close()
		})
	} else {
		reportR, reportW, err := files.pipe(0)
		if err != nil {
			return nil, err
		}
		spool, err := unlinkedFile(s.path("ingest"))
		if err != nil {
			return nil, err
		}
		files = append(files, spool)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		cmd, err := s.helper(ctx, "parse", q, []*os.File{answersR, questionsW, reportW, spool}, s.parserAttr())
		if err != nil {
			return nil, err
		}
		answersR.Close()
		questionsW.Close()
		reportW.Close()
		wg.Go(func() { helperErr = errors.Join(readReport(reportR, res), ignoreExit(cmd.Wait())) })
	}
	err = p.serve(questionsR, answersW)
	questionsR.Close()
	answersW.Close()
	wg.Wait()
	switch {
	case context.Cause(ctx) != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		return nil, err
	case helperErr != nil:
		return nil, fmt.Errorf("the parser gave no report: %w", helperErr)
	case res.Refused != "":
		return nil, errors.New(res.Refused)
	case res.Error != "":
		return nil, errors.New(res.Error)
	}
	return res.Index, nil
}

// serve answers questions until there are no more.
func (p *partial) serve(questions io.Reader, answers io.Writer) error {
	total := int64(0)
	for n := 0; ; n++ {
		var b [askLen]byte
		if _, err := io.ReadFull(questions, b[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("read question: %w", err)
		}
		off, want := binary.BigEndian.Uint64(b[:]), int64(binary.BigEndian.Uint32(b[8:]))
		if total += want; n >= maxQuestions || total > maxAnswers {
			return errors.New("its members are too many to look at one by one")
		}
		if off > uint64(p.size) || want <= 0 || want > maxWindow || want > p.size-int64(off) {
			return fmt.Errorf("question for %d bytes at %d", want, off)
		}
		data, err := p.answer(int64(off), want)
		if err != nil {
			return err
		}
		if _, err := answers.Write(data); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
	}
}

// answer fetches a part, or takes it from what has been fetched, and keeps it.
func (p *partial) answer(off, n int64) ([]byte, error) {
	i, _ := slices.BinarySearchFunc(p.parts, off, func(q part, off int64) int { return int(min(max(q.off-off, -1), 1)) })
	if i < len(p.parts) && p.parts[i].off == off && int64(len(p.parts[i].data)) >= n {
		return p.parts[i].data[:n], nil
	}
	d := p.open(off, off+n)
	defer d.Close()
	data := make([]byte, n)
	if _, err := io.ReadFull(d, data); err != nil {
		return nil, err
	}
	p.done.Add(n)
	p.parts = slices.Insert(p.parts, i, part{off, data})
	return data, nil
}

// Read implements io.Reader.
func (p *partial) Read(b []byte) (int, error) {
	for p.err == nil {
		if p.pos >= p.size {
			p.err = io.EOF
			break
		}
		if g := p.gapAt(p.pos); g != nil && p.cur == nil {
			p.pos = g.Off + g.Size
			continue
		}
		if p.cur == nil {
			if data := p.kept(p.pos); len(data) > 0 {
				n := copy(b, data)
				p.pos += int64(n)
				return n, nil
			}
			p.cur = p.open(p.pos, p.next(p.pos))
		}
		n, err := p.cur.Read(b)
		p.pos += int64(n)
		p.curN.Add(int64(n))
		if err == io.EOF {
			p.Close()
			continue
		}
		if err != nil {
			p.err = err
			break
		}
		return n, nil
	}
	return 0, p.err
}

func (p *partial) gapAt(pos int64) *layer.IndexedLayer {
	for i := range p.gaps {
		if g := &p.gaps[i]; pos >= g.Off && pos < g.Off+g.Size {
			return g
		}
	}
	return nil
}

// kept gives what is there already from a place on, up to the next gap.
func (p *partial) kept(pos int64) []byte {
	for _, q := range p.parts {
		if end := q.off + int64(len(q.data)); pos >= q.off && pos < end {
			for _, g := range p.gaps {
				if g.Off > pos {
					end = min(end, g.Off)
				}
			}
			return q.data[pos-q.off : end-q.off]
		}
	}
	return nil
}

// next is where something begins that is not to be fetched.
func (p *partial) next(pos int64) int64 {
	to := p.size
	for _, g := range p.gaps {
		if g.Off > pos {
			to = min(to, g.Off)
		}
	}
	for _, q := range p.parts {
		if q.off > pos {
			to = min(to, q.off)
		}
	}
	return to
}

// Close ends the reading early.
func (p *partial) Close() error {
	if p.cur != nil {
		p.cur.Close()
		p.cur = nil
		p.done.Add(p.curN.Swap(0))
	}
	return nil
}

func (p *partial) fetched() int64 { return p.done.Load() + p.curN.Load() }

func (p *partial) failure() error { return p.err }
