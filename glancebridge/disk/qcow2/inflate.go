package qcow2

import (
	"bytes"
	"errors"
	"io"
	"runtime"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

// job is a part of one compressed cluster: the bytes from in on that fit dst.
type job struct {
	c   cell
	dst []byte
	in  int64
}

// inflater undoes compression and keeps the clusters that were used last, for the many short reads of small files.
type inflater struct {
	cluster int64
	zdec    *zstd.Decoder
	pool    sync.Pool
	kept    []kept // the last one was used last
	limit   int
}

type kept struct {
	at   int64
	data []byte
}

type scratch struct {
	in   []byte
	out  []byte
	r    bytes.Reader
	flat io.ReadCloser
}

const keepBytes = 4 << 20

func newInflater(cluster int64, zst bool) (*inflater, error) {
	f := &inflater{cluster: cluster, limit: int(max(2, keepBytes/max(cluster, 64<<10)))}
	if zst {
		dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(workers()),
			zstd.WithDecoderMaxMemory(uint64(max(cluster, 64<<10))), zstd.WithDecoderMaxWindow(8<<20), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, err
		}
		f.zdec = dec
	}
	return f, nil
}

// workers is how many clusters are inflated at a time.
func workers() int { return min(4, runtime.GOMAXPROCS(0)) }

// run does all jobs. Whole clusters are inflated in place and side by side; parts come from the clusters kept.
func (f *inflater) run(file blockio.Disk, jobs []job) error {
	var whole []job
	for _, j := range jobs {
		if int64(len(j.dst)) == f.cluster {
			whole = append(whole, j)
		} else if err := f.part(file, j); err != nil {
			return err
		}
	}
	if len(whole) < 2 {
		for _, j := range whole {
			if err := f.cell(file, j.c, j.dst); err != nil {
				return err
			}
		}
		return nil
	}
	var wg sync.WaitGroup
	n := min(workers(), len(whole))
	errs := make([]error, n)
	for w := range n {
		wg.Go(func() {
			for k := w; k < len(whole) && errs[w] == nil; k += n {
				errs[w] = f.cell(file, whole[k].c, whole[k].dst)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (f *inflater) part(file blockio.Disk, j job) error {
	for k := len(f.kept) - 1; k >= 0; k-- {
		if f.kept[k].at == j.c.at {
			e := f.kept[k]
			copy(f.kept[k:], f.kept[k+1:])
			f.kept[len(f.kept)-1] = e
			copy(j.dst, e.data[j.in:])
			return nil
		}
	}
	var data []byte
	if len(f.kept) == f.limit {
		data = f.kept[0].data
		f.kept = append(f.kept[:0], f.kept[1:]...)
	} else {
		data = make([]byte, f.cluster)
	}
	if err := f.cell(file, j.c, data); err != nil {
		return err
	}
	f.kept = append(f.kept, kept{at: j.c.at, data: data})
	copy(j.dst, data[j.in:])
	return nil
}

// cell inflates a cluster into dst, which it fills.
func (f *inflater) cell(file blockio.Disk, c cell, dst []byte) error {
	s, _ := f.pool.Get().(*scratch)
	if s == nil {
		s = &scratch{}
	}
	defer f.pool.Put(s)
	if int64(cap(s.in)) < c.length {
		s.in = make([]byte, max(c.length, f.cluster))
	}
	in := s.in[:c.length]
	if _, err := file.ReadAt(in, c.at); err != nil {
		return err
	}
	if f.zdec != nil {
		return f.zstd(c, in, dst)
	}
	s.r.Reset(in)
	if s.flat == nil {
		s.flat = flate.NewReader(&s.r)
	} else if err := s.flat.(flate.Resetter).Reset(&s.r, nil); err != nil {
		return err
	}
	if _, err := io.ReadFull(s.flat, dst); err != nil {
		return broken(c)
	}
	return nil
}

func broken(c cell) error {
	return verdict.Damaged("qcow2: the compressed data at byte %d does not unpack", c.at)
}

// zstd undoes as many frames as fill dst. What follows them is the next cluster's.
func (f *inflater) zstd(c cell, in, dst []byte) error {
	for done := 0; done < len(dst); {
		n := frame(in)
		if n <= 0 {
			return broken(c)
		}
		out, err := f.zdec.DecodeAll(in[:n], dst[done:done:len(dst)])
		if err != nil || len(out) == 0 || len(out) > len(dst)-done {
			return broken(c)
		}
		done += len(out)
		in = in[n:]
	}
	return nil
}

// frame is the length of the zstd frame that in begins with; 0 when it has none (RFC 8878, section 3.1.1).
func frame(in []byte) int {
	var h zstd.Header
	if err := h.Decode(in); err != nil || h.Skippable {
		return 0
	}
	at := h.HeaderSize
	for {
		if at+3 > len(in) {
			return 0
		}
		b := int(in[at]) | int(in[at+1])<<8 | int(in[at+2])<<16
		at += 3
		if b>>1&3 == 1 {
			at++ // one byte, repeated
		} else {
			at += b >> 3
		}
		if b&1 != 0 {
			break
		}
	}
	if h.HasCheckSum {
		at += 4
	}
	if at > len(in) {
		return 0
	}
	return at
}
