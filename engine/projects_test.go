package engine

import (
	"errors"
	"math"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/rootfs"
)

// table is a quota that holds what it is told.
type table map[uint32]rootfs.Usage

func (q table) Get(project uint32) (rootfs.Usage, error) { return q[project], nil }
func (q table) Close() error                             { return nil }

func (q table) Next(from uint32) (uint32, rootfs.Usage, bool, error) {
	best := uint32(math.MaxUint32)
	for p := range q {
		if p >= from {
			best = min(best, p)
		}
	}
	u, ok := q[best]
	return best, u, ok, nil
}

func (q table) Set(project uint32, bytes, inodes int64) error {
	u := q[project]
	u.MaxBytes, u.MaxInodes = bytes, inodes
	if q[project] = u; u == (rootfs.Usage{}) {
		delete(q, project)
	}
	return nil
}

func TestProjects(t *testing.T) {
	const first = 1 << 30
	q := table{first: {MaxBytes: 1}, first + 1: {Inodes: 1}, first + 3: {MaxInodes: 5}, first - 1: {MaxBytes: 7}, first + projectRange: {MaxBytes: 7}}
	p := &projects{quota: q, first: first}
	if got, err := p.free(); err != nil || got != first+2 {
		t.Errorf("free: %d %v", got, err)
	}
	if got, err := p.free(); err != nil || got != first+4 {
		t.Errorf("the next: %d %v", got, err)
	}
	q[first+1] = rootfs.Usage{Inodes: 1, MaxBytes: 9}
	if done, err := p.drop(first + 1); err != nil || done {
		t.Errorf("a project in use was dropped: %v %v", done, err)
	}
	if err := p.dropEmpty(); err != nil {
		t.Fatal(err)
	}
	want := table{first + 1: {Inodes: 1, MaxBytes: 9}, first - 1: {MaxBytes: 7}, first + projectRange: {MaxBytes: 7}}
	for project := range q {
		if q[project] != want[project] {
			t.Errorf("project %d has %+v", project, q[project])
		}
	}
	if len(q) != len(want) {
		t.Errorf("left: %v", q)
	}
	p.next = projectRange - 1
	if got, _ := p.free(); got != first+projectRange-1 {
		t.Errorf("the last: %d", got)
	}
	if got, _ := p.free(); got != first {
		t.Errorf("after the last: %d", got)
	}
	for i := range uint32(projectRange) {
		q[first+i] = rootfs.Usage{Inodes: 1}
	}
	if got, err := p.free(); err == nil {
		t.Errorf("a project of a full range: %d", got)
	}
}

// TestRootLimits: without quota, disks hold the limit, and asking for quota is an error.
func TestRootLimits(t *testing.T) {
	dir := t.TempDir()
	q, err := rootfs.OpenQuota(dir)
	if err == nil {
		q.Close()
		t.Skip("the file system of the tests has project quota")
	}
	if !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EXDEV) {
		t.Errorf("no quota, because: %v", err)
	}
	for limits, ok := range map[RootLimits]bool{"": true, LimitAuto: true, LimitPool: true, LimitQuota: false, "other": false} {
		p, err := openProjects(dir, limits)
		if (err == nil) != ok || ok && (p.trees || p.quota != nil) {
			t.Errorf("%q: %+v %v", limits, p, err)
		}
	}
	for in, want := range map[[2]int64]int64{{0, 0}: 0, {1 << 30, 0}: 1 << 16, {64 << 20, 0}: 1 << 14, {1 << 30, 7}: 7} {
		if got := inodesFor(in[0], in[1]); got != want {
			t.Errorf("inodes of %v: %d", in, got)
		}
	}
}
