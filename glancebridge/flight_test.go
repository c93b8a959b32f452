package glancebridge

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

// gatedGlance counts downloads and holds them until it is opened.
type gatedGlance struct {
	*FileGlance
	gate  chan struct{}
	mu    sync.Mutex
	count int
}

func (g *gatedGlance) Download(ctx context.Context, rc novalet.RequestContext, id string, off int64) (io.ReadCloser, int64, error) {
	g.mu.Lock()
	g.count++
	g.mu.Unlock()
	r, start, err := g.FileGlance.Download(ctx, rc, id, off)
	if err != nil {
		return nil, 0, err
	}
	return &gatedReader{ctx, g.gate, r}, start, nil
}

type gatedReader struct {
	ctx  context.Context
	gate chan struct{}
	io.ReadCloser
}

func (r *gatedReader) Read(p []byte) (int, error) {
	select {
	case <-r.gate:
		return r.ReadCloser.Read(p)
	case <-r.ctx.Done():
		return 0, context.Cause(r.ctx)
	}
}

// waiters polls until n callers wait for a fetch.
func waiters(t *testing.T, s *Store, id string, n int) {
	t.Helper()
	for range 6000 {
		s.mu.Lock()
		f := s.flights[id]
		have := 0
		if f != nil {
			have = f.waiters
		}
		s.mu.Unlock()
		if have == n {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("no %d callers wait for the image", n)
}

func TestConcurrentBootsShareOneDownload(t *testing.T) {
	images := t.TempDir()
	id := addImage(t, images, rootTar(t), nil)
	g := &gatedGlance{FileGlance: NewFileGlance(images), gate: make(chan struct{})}
	s := openStore(t, images, func(o *Options) { o.Glance = g })
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() {
			_, errs[i] = s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-" + string(rune('a'+i))})
		})
	}
	// One more loses patience; the others are not to notice.
	ctx, cancel := context.WithCancel(context.Background())
	var gone error
	wg.Go(func() { _, gone = s.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-gone"}) })
	waiters(t, s, id, 9)
	list, err := s.List(context.Background())
	if err != nil || len(list) != 1 || list[0].ID != id {
		t.Errorf("while fetching the list is %+v, %v", list, err)
	}
	cancel()
	waiters(t, s, id, 8)
	close(g.gate)
	wg.Wait()
	if !errors.Is(gone, context.Canceled) {
		t.Errorf("the one that left got %v", gone)
	}
	for i, err := range errs {
		if err != nil {
			t.Errorf("caller %d: %v", i, err)
		}
	}
	if g.count != 1 {
		t.Errorf("%d downloads", g.count)
	}
	list, err = s.List(context.Background())
	if err != nil || len(list) != 1 || len(list[0].UsedBy) != 8 {
		t.Errorf("list is %+v, %v", list, err)
	}
}

func TestNobodyWaitsEndsTheFetch(t *testing.T) {
	images := t.TempDir()
	id := addImage(t, images, rootTar(t), nil)
	g := &gatedGlance{FileGlance: NewFileGlance(images), gate: make(chan struct{})}
	s := openStore(t, images, func(o *Options) { o.Glance = g })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		_, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
		done <- err
	}()
	waiters(t, s, id, 1)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	close(g.gate)
	if _, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-2"}); err != nil {
		t.Fatal(err)
	}
}

// TestSharedLayers: two images with one base keep it once, and Collect leaves what is in use.
func TestSharedLayers(t *testing.T) {
	ctx := context.Background()
	images := t.TempDir()
	cmd := map[string]any{"Cmd": []string{"/x"}}
	base := makeTar(t, member{name: "x", data: "base"})
	one := addImage(t, images, dockerArchive(t, cmd, base, makeTar(t, member{name: "one", data: "1"})), nil)
	two := addImage(t, images, dockerArchive(t, cmd, base, makeTar(t, member{name: "two", data: "2"})), nil)
	s := openStore(t, images, func(o *Options) { o.MinAge = time.Nanosecond })
	for i, id := range []string{one, two} {
		if _, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: []string{"a", "b"}[i]}); err != nil {
			t.Fatal(err)
		}
	}
	count := func(want int) {
		t.Helper()
		l, err := os.ReadDir(s.path("layers"))
		if err != nil || len(l) != want {
			t.Fatalf("%d layers, want %d (%v)", len(l), want, err)
		}
	}
	count(3)
	if _, err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	count(3)
	for range 2 {
		if err := s.Release(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	freed, err := s.Collect(ctx)
	if err != nil || freed != 1 {
		t.Errorf("freed %d, %v", freed, err)
	}
	count(2)
	if err := s.Release(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	if freed, err = s.Collect(ctx); err != nil || freed != 5 {
		t.Errorf("freed %d, %v", freed, err)
	}
	checkEmpty(t, s)
	if st, err := s.Cache(ctx, novalet.RequestContext{}, one); err != nil || st != "cached" {
		t.Errorf("cache says %s, %v", st, err)
	}
	if st, err := s.Cache(ctx, novalet.RequestContext{}, one); err != nil || st != "existing" {
		t.Errorf("cache says %s, %v", st, err)
	}
	if st, err := s.Cache(ctx, novalet.RequestContext{}, "no-such-image"); !errors.Is(err, novalet.ErrNotFound) || st != "error" {
		t.Errorf("cache says %s, %v", st, err)
	}
}

func TestHighWater(t *testing.T) {
	ctx := context.Background()
	images := t.TempDir()
	s := openStore(t, images, func(o *Options) { o.KeepUnused, o.HighWater, o.LowWater = true, 2500, 1500 })
	s.grace = 0
	var ids []string
	for _, c := range []string{"a", "b", "c"} {
		id := addImage(t, images, root(t, member{name: "etc/" + c, data: stringOf(c, 1000)}), nil)
		if _, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: id}); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	if _, err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	list, err := s.List(ctx)
	if err != nil || len(list) != 1 || list[0].ID != ids[2] {
		t.Errorf("left %+v, %v", list, err)
	}
}

func stringOf(s string, n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = s[0]
	}
	return string(b)
}

// TestReopen: what was stored is there after a restart; what was half done is not.
func TestReopen(t *testing.T) {
	ctx := context.Background()
	images := t.TempDir()
	id := addImage(t, images, rootTar(t), nil)
	dir := filepath.Join(t.TempDir(), "store")
	open := func() *Store { return openStore(t, images, func(o *Options) { o.Dir = dir }) }
	s := open()
	img, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Options{Dir: dir, Glance: NewFileGlance(images), Unconfined: true}); !errors.Is(err, novalet.ErrBusy) {
		t.Errorf("a second open store: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	layer := filepath.Dir(img.Layers[0].Path)
	if _, err := os.Stat(filepath.Join(layer, "durable")); err != nil {
		t.Errorf("after Close the layer is not marked durable: %v", err)
	}
	for _, junk := range []string{"ingest/abc/layers/0/etc", "layers/" + stringOf("0", 64) + "/fs", "layers/nonsense"} {
		if err := os.MkdirAll(filepath.Join(dir, junk), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, junk := range []string{"images/damaged.json", "leases/damaged.json", "images/.x.json.tmp-123"} {
		if err := os.WriteFile(filepath.Join(dir, junk), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = open()
	list, err := s.List(ctx)
	if err != nil || len(list) != 1 || len(list[0].UsedBy) != 1 {
		t.Fatalf("list is %+v, %v", list, err)
	}
	for d, want := range map[string]int{"ingest": 0, "layers": 1, "images": 1, "leases": 1} {
		if l, err := os.ReadDir(s.path(d)); err != nil || len(l) != want {
			t.Errorf("%s holds %v, %v", d, l, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// A loss of power before the layer was safe: the next boot of the host must not trust it.
	if err := os.Remove(filepath.Join(layer, "durable")); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(layer, "meta.json"))
	if err != nil {
		t.Fatal(err)
	}
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(layer, "meta.json"), []byte(strings.ReplaceAll(string(b), boot, "another-boot")), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open()
	if list, err = s.List(ctx); err != nil || len(list) != 0 {
		t.Errorf("after a loss of power the list is %+v, %v", list, err)
	}
	if _, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: "a"}); err != nil {
		t.Fatal(err)
	}
}

// TestDiskMarks: the marks of the file system, at once after a fetch; what is leased or was just asked for stays.
func TestDiskMarks(t *testing.T) {
	images := t.TempDir()
	s := openStore(t, images, func(o *Options) { o.HighPercent, o.LowPercent = 90, 80 })
	var ids []string
	prepare := func(n int, instance string) {
		t.Helper()
		id := addImage(t, images, root(t, member{name: "etc/" + string(rune('a'+n)), data: stringOf("abcdefgh"[n:], 1000)}), nil)
		if _, err := s.Prepare(t.Context(), &novalet.ImageRequest{ImageID: id, InstanceUUID: instance}); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	left := func() (list []string) {
		t.Helper()
		all, err := s.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, st := range all {
			list = append(list, st.ID)
		}
		return list
	}
	prepare(0, "inst-a")
	for n := 1; n < 5; n++ {
		prepare(n, "")
	}
	// 91 % of a disk, of which each image is about 2 %.
	var used atomic.Int64
	used.Store(45_500)
	s.usage = func() (int64, int64, error) { return 50_000, used.Load(), nil }
	if _, err := s.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := left(); len(got) != 5 {
		t.Errorf("images asked for a moment ago went: %v of %v are left", got, ids)
	}
	s.grace = 0
	used.Store(42_000) // 84 %: between the marks
	if _, err := s.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := left(); len(got) != 5 {
		t.Errorf("below the high mark images went: %v of %v are left", got, ids)
	}
	used.Store(45_100)
	s.o.LowPercent = 87 // 1600 bytes to go: two images
	if _, err := s.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := left(); !slices.Equal(got, []string{ids[0], ids[3], ids[4]}) {
		t.Errorf("left are %v of %v", got, ids)
	}
	// A fetch that crosses the mark makes room by itself.
	s.o.LowPercent = 0
	prepare(5, "inst-b")
	for range 6000 {
		if got := left(); slices.Equal(got, []string{ids[0], ids[5]}) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("left are %v of %v", left(), ids)
}
