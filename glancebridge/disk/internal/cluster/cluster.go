// Package cluster is what qcow2 and VMDK have in common: a disk cut into clusters, each of them stored as it is, stored
// compressed, or not stored at all. A read of several compressed clusters uses a few goroutines, which have ended when
// it returns.
package cluster

import (
	"runtime"
	"sync"

	"github.com/novalet/novalet/glancebridge/disk/internal/blockio"
	"github.com/novalet/novalet/glancebridge/disk/internal/verdict"
)

// Kind is how a cluster is stored.
type Kind uint8

// The kinds of cluster.
const (
	Zero Kind = iota
	Plain
	Compressed
)

// Cell is one cluster. At and Length are of the file, in bytes. A plain one shorter than a cluster ends with zeros.
type Cell struct {
	Kind   Kind
	At     int64
	Length int64
}

// Disk is a disk of clusters of 1 << bits bytes. It is not safe for concurrent use.
type Disk struct {
	file    blockio.Disk
	bits    uint
	cluster int64
	size    int64
	find    func(n int64) (Cell, error)
	load    func(c Cell, dst []byte) error
	kept    []kept // the last one was used last
	limit   int
}

// kept is a cluster that was inflated for a short read: many files are shorter than a cluster.
type kept struct {
	at   int64
	data []byte
}

const keepBytes = 4 << 20

// New makes a disk of size bytes. find looks up the cluster with number n; load inflates one, fills dst, and is called
// from several goroutines at a time.
func New(file blockio.Disk, bits uint, size int64, find func(n int64) (Cell, error), load func(c Cell, dst []byte) error) *Disk {
	d := &Disk{file: file, bits: bits, cluster: 1 << bits, size: size, find: find, load: load}
	d.limit = int(max(2, keepBytes/max(d.cluster, 64<<10)))
	return d
}

// Size is the virtual size in bytes.
func (d *Disk) Size() int64 { return d.size }

// Span goes on while clusters are all stored or all not.
func (d *Disk) Span(off, length int64) (int64, bool, error) {
	length = min(length, d.size-off)
	first, end := off>>d.bits, (off+length+d.cluster-1)>>d.bits
	c, err := d.find(first)
	if err != nil {
		return 0, false, err
	}
	data := c.Kind != Zero
	n := first + 1
	for ; n < end; n++ {
		if c, err = d.find(n); err != nil {
			return 0, false, err
		}
		if (c.Kind != Zero) != data {
			break
		}
	}
	return min(n<<d.bits-off, length), data, nil
}

// job is a part of one compressed cluster: the bytes from in on that fit dst.
type job struct {
	c   Cell
	dst []byte
	in  int64
}

// ReadAt reads all of p.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if !blockio.Inside(off, int64(len(p)), d.size) {
		return 0, verdict.Cut("%d bytes are wanted at byte %d of a disk of %d", len(p), off, d.size)
	}
	var jobs []job
	for done := 0; done < len(p); {
		in := (off + int64(done)) & (d.cluster - 1)
		n := int(min(int64(len(p)-done), d.cluster-in))
		c, err := d.find((off + int64(done)) >> d.bits)
		if err != nil {
			return done, err
		}
		switch c.Kind {
		case Zero:
			clear(p[done : done+n])
		case Compressed:
			jobs = append(jobs, job{c: c, dst: p[done : done+n], in: in})
		case Plain:
			if n, err = d.plain(p[done:], off+int64(done), in, c); err != nil {
				return done, err
			}
		}
		done += n
	}
	return len(p), d.run(jobs)
}

// plain reads a run of clusters that follow one another in the file.
func (d *Disk) plain(p []byte, off, in int64, c Cell) (int, error) {
	length := c.Length - in
	for length < int64(len(p)) && c.Length == d.cluster {
		next, err := d.find((off + length) >> d.bits)
		if err != nil {
			return 0, err
		}
		if next.Kind != Plain || next.At != c.At+in+length || next.Length < d.cluster {
			break
		}
		length += next.Length
	}
	n := min(max(length, d.cluster-in), int64(len(p)))
	stored := max(0, min(length, n))
	clear(p[stored:n])
	_, err := d.file.ReadAt(p[:stored], c.At+in)
	return int(n), err
}

// Workers is how many clusters are inflated at a time.
func Workers() int { return min(4, runtime.GOMAXPROCS(0)) }

// run does all jobs. Whole clusters are inflated in place and side by side; parts come from the clusters kept.
func (d *Disk) run(jobs []job) error {
	var whole []job
	for _, j := range jobs {
		if int64(len(j.dst)) == d.cluster {
			whole = append(whole, j)
		} else if err := d.part(j); err != nil {
			return err
		}
	}
	errs := make([]error, len(whole))
	Each(len(whole), func(k int) { errs[k] = d.load(whole[k].c, whole[k].dst) })
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// Each calls do for every number below n, from a few goroutines that have ended when it returns.
func Each(n int, do func(k int)) {
	workers := min(Workers(), n)
	if workers < 2 {
		for k := range n {
			do(k)
		}
		return
	}
	var wg sync.WaitGroup
	for k := range workers {
		wg.Go(func() {
			for ; k < n; k += workers {
				do(k)
			}
		})
	}
	wg.Wait()
}

func (d *Disk) part(j job) error {
	for k := len(d.kept) - 1; k >= 0; k-- {
		if d.kept[k].at == j.c.At {
			e := d.kept[k]
			copy(d.kept[k:], d.kept[k+1:])
			d.kept[len(d.kept)-1] = e
			copy(j.dst, e.data[j.in:])
			return nil
		}
	}
	var data []byte
	if len(d.kept) == d.limit {
		data = d.kept[0].data
		d.kept = append(d.kept[:0], d.kept[1:]...)
	} else {
		data = make([]byte, d.cluster)
	}
	if err := d.load(j.c, data); err != nil {
		return err
	}
	d.kept = append(d.kept, kept{at: j.c.At, data: data})
	copy(j.dst, data[j.in:])
	return nil
}
