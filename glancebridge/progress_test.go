package glancebridge

import (
	"bytes"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// slowSource is a download of which a test says how far it came.
type slowSource struct {
	io.Reader
	n atomic.Int64
}

func (s *slowSource) Close() error   { return nil }
func (s *slowSource) fetched() int64 { return s.n.Load() }
func (s *slowSource) failure() error { return nil }

// TestProgress: while an image comes the log tells every ten seconds how far it is, List at any time, and both are silent
// when it is there.
func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Store{flights: map[string]*flight{}}
		f, src := &flight{id: "11111111-2222-3333-4444-555555555555", name: "debian"}, &slowSource{}
		f.total.Store(100 << 20)
		s.flights[f.id] = f
		var out bytes.Buffer
		stop := s.watch(t.Context(), f, src, 100<<20, slog.New(slog.NewTextHandler(&out, nil)))
		seen := func(want int64, lines int) {
			t.Helper()
			synctest.Wait()
			l, err := s.List(t.Context())
			if err != nil || len(l) != 1 || l[0].Name != "debian" || l[0].Progress != want || l[0].Total != 100<<20 {
				t.Errorf("the store lists %+v, %v", l, err)
			}
			if n := strings.Count(out.String(), "fetching image"); n != lines {
				t.Errorf("%d lines in the log, want %d:\n%s", n, lines, out.String())
			}
		}
		src.n.Store(7 << 20)
		time.Sleep(time.Second)
		seen(7<<20, 0)
		src.n.Store(40 << 20)
		time.Sleep(20 * time.Second)
		seen(40<<20, 2)
		if !strings.Contains(out.String(), "done=41943040 bytes=104857600") {
			t.Errorf("the log says %s", out.String())
		}
		stop()
		src.n.Store(100 << 20)
		time.Sleep(time.Minute)
		seen(40<<20, 2)
	})
}
