package glancebridge

import (
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

// liveGlance serves the part of Glance's API v2 that is used here, over HTTP: records with JSON patches, pages, data with
// the states that an upload leads through, ranges, owners.
type liveGlance struct {
	*httptest.Server
	t *testing.T
	// page is api_limit_max. noRange is a store that cannot begin in the middle.
	page    int
	noRange bool
	// put, when set, is asked before each upload: a status to answer with after so many bytes, or a cut after so many
	// bytes; -1 is the end.
	put func(n int, r *http.Request) putFault
	// cut, when set, is asked before each download after how many bytes it is cut; -1 is not at all.
	cut func(n int) int
	// hang, when set, picks downloads that give nothing until the client leaves.
	hang func(r *http.Request) bool
	// lenient takes a body that ends early for whole, as servers do that read it to its end only.
	lenient bool

	mu      sync.Mutex
	images  map[string]*liveImage
	order   []string // ids, oldest first
	puts    int
	served  int64 // bytes of data
	gets    int
	tokens  map[string]string // token → project; "" may do anything
	deletes []string
	settle  func(id string) // called before a record is read
}

type liveImage struct {
	rec  map[string]any
	data []byte
}

// putFault is what happens to one upload.
type putFault struct {
	after  int64 // bytes
	status int   // answered then; 0 cuts the connection
	hang   bool  // the record stays in saving, as when the process that stored it was killed
}

func newLiveGlance(t *testing.T) *liveGlance {
	g := &liveGlance{t: t, page: 1000, images: map[string]*liveImage{}, tokens: map[string]string{"service": ""}}
	g.Server = httptest.NewServer(g)
	t.Cleanup(g.Close)
	return g
}

// add puts an image into the service; data nil is one in status queued.
func (g *liveGlance) add(id, owner string, data []byte, fields map[string]any) {
	g.mu.Lock()
	defer g.mu.Unlock()
	rec := map[string]any{"id": id, "name": id, "status": "queued", "owner": owner, "visibility": "private", "disk_format": nil,
		"container_format": nil, "min_disk": 0, "min_ram": 0, "protected": false,
		"created_at": fmt.Sprintf("2026-01-02T%02d:%02d:%02dZ", len(g.order)/3600, len(g.order)/60%60, len(g.order)%60)}
	for k, v := range fields {
		rec[k] = v
	}
	im := &liveImage{rec: rec}
	if data != nil {
		rec["disk_format"], rec["container_format"] = "raw", "docker"
		im.store(data)
	}
	g.images[id] = im
	g.order = append(g.order, id)
}

func (im *liveImage) store(data []byte) {
	sum := sha512.Sum512(data)
	im.data = data
	im.rec["status"], im.rec["size"] = "active", len(data)
	im.rec["os_hash_algo"], im.rec["os_hash_value"] = "sha512", hex.EncodeToString(sum[:])
}

func (g *liveGlance) get(id string) (rec map[string]any, data []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if im := g.images[id]; im != nil {
		return maps.Clone(im.rec), im.data
	}
	return nil, nil
}

func (g *liveGlance) set(id, key string, value any) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.images[id].rec[key] = value
}

func (g *liveGlance) replace(id string, data []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.images[id].store(data)
}

func (g *liveGlance) remove(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.images, id)
}

// uploads counts those that were begun.
func (g *liveGlance) uploads() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.puts
}

// idle waits until the service has seen the end of an upload.
func (g *liveGlance) idle(id string) map[string]any {
	g.t.Helper()
	for range 6000 {
		if rec, _ := g.get(id); rec == nil || rec["status"] != "saving" {
			return rec
		}
		time.Sleep(10 * time.Millisecond)
	}
	g.t.Fatal("an upload does not end")
	return nil
}

// project gives the project of a request's token.
func (g *liveGlance) project(r *http.Request) (string, bool) {
	p, ok := g.tokens[r.Header.Get("X-Auth-Token")]
	return p, ok
}

// may reports whether a project may read an image. g.mu is held.
func (im *liveImage) may(project string) bool {
	return project == "" || im.rec["owner"] == project || im.rec["visibility"] != "private"
}

func (g *liveGlance) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	project, ok := g.project(r)
	g.mu.Unlock()
	if !ok {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	path := strings.TrimPrefix(r.URL.Path, "/v2/images")
	if path == "" {
		g.list(w, r, project)
		return
	}
	id, rest, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	if g.settle != nil && rest == "" && r.Method == http.MethodGet {
		g.settle(id)
	}
	g.mu.Lock()
	im := g.images[id]
	if im == nil || !im.may(project) {
		g.mu.Unlock()
		w.WriteHeader(http.StatusNotFound)
		return
	}
	g.mu.Unlock()
	switch {
	case rest == "file" && r.Method == http.MethodPut:
		g.upload(w, r, im)
	case rest == "file":
		g.download(w, r, im)
	case r.Method == http.MethodGet:
		g.mu.Lock()
		b, _ := json.Marshal(im.rec)
		g.mu.Unlock()
		_, _ = w.Write(b)
	case r.Method == http.MethodPatch:
		g.patch(w, r, im)
	case r.Method == http.MethodDelete:
		g.mu.Lock()
		defer g.mu.Unlock()
		if im.rec["protected"] == true {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		delete(g.images, id)
		g.deletes = append(g.deletes, id)
		w.WriteHeader(http.StatusNoContent)
	}
}

// list gives pages, newest first, and filters by any other key of the query.
func (g *liveGlance) list(w http.ResponseWriter, r *http.Request, project string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	q := r.URL.Query()
	limit, _ := strconv.Atoi(q.Get("limit"))
	limit = min(limit, g.page)
	marker := q.Get("marker")
	var out []map[string]any
	for _, id := range slices.Backward(g.order) {
		im := g.images[id]
		if im == nil || !im.may(project) {
			continue
		}
		if marker != "" {
			if id == marker {
				marker = ""
			}
			continue
		}
		match := true
		for k := range q {
			switch k {
			case "limit", "marker", "sort_key", "sort_dir":
			default:
				match = match && fmt.Sprint(im.rec[k]) == q.Get(k)
			}
		}
		if match {
			out = append(out, im.rec)
		}
	}
	doc := map[string]any{"images": out}
	if len(out) > limit {
		doc["images"] = out[:limit]
	}
	// As Glance does, a full page names a next one, which may be empty.
	if len(out) >= limit && limit > 0 {
		doc["next"] = "/v2/images?marker=" + fmt.Sprint(out[limit-1]["id"])
	}
	_ = json.NewEncoder(w).Encode(doc)
}

func (g *liveGlance) patch(w http.ResponseWriter, r *http.Request, im *liveImage) {
	var ops []struct {
		Op, Path string
		Value    any
	}
	if err := json.NewDecoder(r.Body).Decode(&ops); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if im.rec["status"] != "queued" {
		for _, o := range ops {
			if o.Path == "/disk_format" || o.Path == "/container_format" {
				w.WriteHeader(http.StatusForbidden) // Glance: not once the image has left queued
				return
			}
		}
	}
	for _, o := range ops {
		im.rec[strings.TrimPrefix(o.Path, "/")] = o.Value
	}
	_, _ = w.Write([]byte("{}"))
}

func (g *liveGlance) upload(w http.ResponseWriter, r *http.Request, im *liveImage) {
	g.mu.Lock()
	g.puts++
	n := g.puts
	if im.rec["status"] != "queued" || im.rec["disk_format"] == nil {
		g.mu.Unlock()
		w.WriteHeader(http.StatusConflict)
		return
	}
	im.rec["status"] = "saving"
	g.mu.Unlock()
	f := putFault{after: -1}
	if g.put != nil {
		f = g.put(n, r)
	}
	finish := func(fn func()) {
		g.mu.Lock()
		fn()
		g.mu.Unlock()
	}
	if f.after >= 0 {
		part := make([]byte, f.after)
		k, _ := io.ReadFull(r.Body, part)
		finish(func() {
			switch {
			case f.hang:
			case g.lenient && f.status == 0:
				im.store(part[:k])
			default:
				im.rec["status"] = "queued"
			}
		})
		if f.status == 0 {
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(f.status)
		return
	}
	data, err := io.ReadAll(r.Body)
	if err != nil && !g.lenient {
		finish(func() { im.rec["status"] = "queued" })
		return
	}
	finish(func() { im.store(data) })
	w.WriteHeader(http.StatusNoContent)
}

func (g *liveGlance) download(w http.ResponseWriter, r *http.Request, im *liveImage) {
	if g.hang != nil && g.hang(r) {
		<-r.Context().Done()
		return
	}
	data, status := im.data, http.StatusOK
	if rg := r.Header.Get("Range"); rg != "" {
		if g.noRange {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		from, to, err := parseRange(rg, int64(len(data)))
		if err != nil {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(data)))
		data, status = data[from:to], http.StatusPartialContent
	}
	g.mu.Lock()
	g.gets++
	at := -1
	if g.cut != nil {
		at = g.cut(g.gets)
	}
	g.mu.Unlock()
	w.Header().Set("Content-Length", fmt.Sprint(len(data)))
	w.WriteHeader(status)
	cut := at >= 0 && at < len(data)
	if cut {
		data = data[:at]
	}
	// Counted first: the client may be done before this goroutine goes on.
	g.mu.Lock()
	g.served += int64(len(data))
	g.mu.Unlock()
	_, _ = w.Write(data)
	if cut {
		panic(http.ErrAbortHandler)
	}
}

// parseRange reads "bytes=a-b" and "bytes=a-".
func parseRange(s string, size int64) (from, to int64, err error) {
	a, b, ok := strings.Cut(strings.TrimPrefix(s, "bytes="), "-")
	from, err = strconv.ParseInt(a, 10, 64)
	to = size
	if err == nil && b != "" {
		to, err = strconv.ParseInt(b, 10, 64)
		to = min(to+1, size)
	}
	if err == nil && (!ok || from >= to) {
		err = errors.New("not satisfiable")
	}
	return from, to, err
}

// as is the context of a request with a token.
func as(token string) novalet.RequestContext {
	return novalet.RequestContext{AuthToken: novalet.Secret(token)}
}
