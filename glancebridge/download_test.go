package glancebridge

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// glanceServer behaves as Glance does, with faults to turn on.
type glanceServer struct {
	*httptest.Server
	data   []byte
	record string // JSON after "id"
	// ranges: 206 is served; else the answer is 400, or 200 when ignoreRange is set.
	ranges, ignoreRange bool
	// cutAfter ends the first answers after so many bytes each.
	cutAfter []int
	hang     bool // the first answer stops in the middle without an end
	lost     int  // the bytes after so many are lost: every answer stops there without an end

	mu       sync.Mutex
	requests []string
}

func newGlanceServer(t *testing.T, data []byte) *glanceServer {
	sum := sha512.Sum512(data)
	g := &glanceServer{data: data, ranges: true}
	g.record = fmt.Sprintf(`"status":"active","size":%d,"disk_format":"raw","container_format":"bare","os_hash_algo":"sha512","os_hash_value":%q,"min_disk":0,"os_command_line":"/x"`,
		len(data), hex.EncodeToString(sum[:]))
	g.Server = httptest.NewServer(g)
	t.Cleanup(g.Close)
	return g
}

func (g *glanceServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("X-Auth-Token") == "expired" {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	if !strings.HasSuffix(r.URL.Path, "/file") {
		fmt.Fprintf(w, `{"id":"img",%s}`, g.record)
		return
	}
	g.mu.Lock()
	g.requests = append(g.requests, r.Header.Get("Range"))
	n := len(g.requests)
	g.mu.Unlock()
	data, lost := g.data, g.lost
	if rg := r.Header.Get("Range"); rg != "" && !g.ignoreRange {
		if !g.ranges {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		var off int
		fmt.Sscanf(rg, "bytes=%d-", &off)
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, len(data)-1, len(data)))
		w.Header().Set("Content-Length", fmt.Sprint(len(data)-off))
		w.WriteHeader(http.StatusPartialContent)
		data, lost = data[off:], lost-off
	} else {
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
	}
	if g.lost > 0 {
		_, _ = w.Write(data[:max(lost, 0)])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return
	}
	if n == 1 && g.hang {
		_, _ = w.Write(data[:len(data)/2])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return
	}
	if n <= len(g.cutAfter) && g.cutAfter[n-1] < len(data) {
		_, _ = w.Write(data[:g.cutAfter[n-1]])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	_, _ = w.Write(data)
}

// plainCloud sends the tokens as they are.
type plainCloud struct{ url string }

func (c plainCloud) client(token string) *gophercloud.ServiceClient {
	p := &gophercloud.ProviderClient{HTTPClient: http.Client{Transport: tokenTransport{token}}}
	return &gophercloud.ServiceClient{ProviderClient: p, Endpoint: c.url + "/"}
}

func (c plainCloud) Client(context.Context, string) (*gophercloud.ServiceClient, error) {
	return c.client("service"), nil
}

func (c plainCloud) UserClient(_ context.Context, rc novalet.RequestContext, _ string) (*gophercloud.ServiceClient, error) {
	return c.client(rc.AuthToken.Reveal()), nil
}

type tokenTransport struct{ token string }

func (t tokenTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("X-Auth-Token", t.token)
	return http.DefaultTransport.RoundTrip(r)
}

func TestDownloadSurvives(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 20000)
	for _, c := range []struct {
		name     string
		set      func(*glanceServer)
		requests int
	}{
		{"whole", func(*glanceServer) {}, 1},
		{"cut twice, with ranges", func(g *glanceServer) { g.cutAfter = []int{1000, 100_000} }, 3},
		// The refused range request counts too.
		{"cut, store without ranges", func(g *glanceServer) { g.cutAfter = []int{100_000}; g.ranges = false }, 3},
		{"cut, range ignored", func(g *glanceServer) { g.cutAfter = []int{100_000}; g.ignoreRange = true }, 2},
		{"hanging", func(g *glanceServer) { g.hang = true }, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGlanceServer(t, data)
			c.set(g)
			client := NewGlance(plainCloud{g.URL})
			ctx := context.Background()
			rc := novalet.RequestContext{AuthToken: "expired"}
			rec, err := client.Get(ctx, rc, "img")
			if err != nil {
				t.Fatal(err)
			}
			idle := time.Minute
			if g.hang {
				idle = 300 * time.Millisecond
			}
			d := newDownload(ctx, client, rc, rec, idle, 5, time.Millisecond, func(string, ...any) {})
			got, err := io.ReadAll(d)
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("got %d bytes, %v", len(got), err)
			}
			if len(g.requests) != c.requests {
				t.Errorf("requests with ranges %q, want %d", g.requests, c.requests)
			}
		})
	}
}

func TestDownloadFaults(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 2000)
	for _, c := range []struct {
		name string
		set  func(*glanceServer)
		kind error
		text string
	}{
		{"another content", func(g *glanceServer) { g.data = bytes.Repeat([]byte("x"), len(data)) }, novalet.ErrAbort, "checksum"},
		{"shorter than the record", func(g *glanceServer) { g.data = data[:1000]; g.ranges = false }, novalet.ErrAbort, "ends after 1000 of"},
		{"longer than the record", func(g *glanceServer) { g.data = append(bytes.Clone(data), 'x') }, novalet.ErrAbort, "more data"},
		{"the rest is lost in the store", func(g *glanceServer) { g.lost = 1000 }, novalet.ErrAbort, "ends after 1000 of"},
		{"the rest is lost, no ranges", func(g *glanceServer) { g.lost, g.ignoreRange = 1000, true }, novalet.ErrAbort, "ends after 1000 of"},
		{"always cut", func(g *glanceServer) { g.cutAfter = []int{0, 0, 0, 0, 0, 0} }, novalet.ErrTryAgain, ""},
		{"MD5 of an old image", func(g *glanceServer) {
			g.record = fmt.Sprintf(`"status":"active","size":%d,"checksum":"00000000000000000000000000000000"`, len(data))
		}, novalet.ErrAbort, "checksum"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGlanceServer(t, data)
			c.set(g)
			client := NewGlance(plainCloud{g.URL})
			ctx := context.Background()
			rec, err := client.Get(ctx, novalet.RequestContext{}, "img")
			if err != nil {
				t.Fatal(err)
			}
			idle := time.Minute
			if g.lost > 0 {
				idle = 300 * time.Millisecond
			}
			d := newDownload(ctx, client, novalet.RequestContext{}, rec, idle, 3, time.Millisecond, func(string, ...any) {})
			_, err = io.Copy(io.Discard, d)
			if !errors.Is(err, c.kind) || !strings.Contains(novalet.FaultText(err), c.text) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func TestGlanceAnswers(t *testing.T) {
	for status, want := range map[int]error{404: novalet.ErrNotFound, 503: novalet.ErrTryAgain, 500: novalet.ErrTryAgain} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
		_, err := NewGlance(plainCloud{srv.URL}).Get(context.Background(), novalet.RequestContext{}, "img")
		if !errors.Is(err, want) {
			t.Errorf("%d gives %v", status, err)
		}
		srv.Close()
		// The server has gone now.
		if _, err := NewGlance(plainCloud{srv.URL}).Get(context.Background(), novalet.RequestContext{}, "img"); !errors.Is(err, novalet.ErrTryAgain) {
			t.Errorf("no server gives %v", err)
		}
	}
	for in, want := range map[string]string{"http://h:9292": "http://h:9292/v2/", "http://h/image/": "http://h/image/v2/",
		"http://h/image/v2": "http://h/image/v2/", "http://h/v2/": "http://h/v2/"} {
		if got := imageBase(in); got != want {
			t.Errorf("base of %s is %s, want %s", in, got, want)
		}
	}
}

// TestFaultKinds: each failure says who has to do something.
func TestFaultKinds(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer func(w http.ResponseWriter, r *http.Request)
		kind   error
		class  string
	}{
		{"gone", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) }, novalet.ErrAbort, "ImageNotFound"},
		{"forbidden", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) }, novalet.ErrAbort, "ImageNotAuthorized"},
		{"broken", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, novalet.ErrTryAgain, ""},
		{"queued", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"id":"img","status":"queued"}`) }, novalet.ErrAbort, "ImageNotActive"},
		{"deactivated", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"id":"img","status":"deactivated"}`) }, novalet.ErrAbort, "ImageNotActive"},
		{"no data", func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/file") {
				w.WriteHeader(204)
				return
			}
			fmt.Fprint(w, `{"id":"img","status":"active","size":0}`)
		}, novalet.ErrAbort, "ImageUnacceptable"},
		{"too large", func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, `{"id":"img","status":"active","size":99999999999999}`)
		}, novalet.ErrAbort, "ImageUnacceptable"},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(c.answer))
			defer srv.Close()
			s := openStore(t, "", func(o *Options) { o.Glance = NewGlance(plainCloud{srv.URL}) })
			_, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: "img", InstanceUUID: "a"})
			var f *novalet.Fault
			if !errors.Is(err, c.kind) || c.class != "" && (!errors.As(err, &f) || f.Class != c.class || f.Text == "") {
				t.Errorf("got %v", err)
			}
			checkEmpty(t, s)
		})
	}
	// A failure of this host: its helpers cannot be started.
	hosttest.RequireRoot(t)
	images := t.TempDir()
	id := addImage(t, images, rootTar(t), nil)
	s := openStore(t, images, func(o *Options) { o.Unconfined, o.Helper = false, []string{"/does/not/exist"} })
	if _, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "a"}); !errors.Is(err, novalet.ErrReschedule) {
		t.Errorf("got %v", err)
	}
}
