package layer

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

type part struct {
	name, data, link string
	typ              byte
	pax              map[string]string
}

func tarOf(t testing.TB, parts ...part) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, p := range parts {
		h := &tar.Header{Name: p.name, Typeflag: p.typ, Linkname: p.link, Size: int64(len(p.data)), Mode: 0o755,
			ModTime: time.Unix(1700000000, 0), PAXRecords: p.pax}
		if p.typ == 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, p.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// FuzzTarReader feeds any bytes through reader, encoder, decoder and applier. Whatever they are, nothing may panic,
// appear outside the folder or hang, what the reader accepts the applier must take as the same entries, and archive/tar alone
// must read the same.
func FuzzTarReader(f *testing.F) {
	f.Add(tarOf(f, part{name: "a/b", data: "x"}, part{name: "a", typ: tar.TypeSymlink, link: "/"}, part{name: "a/c", data: "y"}))
	f.Add(tarOf(f, part{name: ".wh.x"}, part{name: "d/.wh..wh..opq"}, part{name: "l", typ: tar.TypeLink, link: "a"}))
	f.Add(tarOf(f, part{name: "x", data: strings.Repeat("\x00", 9000), pax: map[string]string{"SCHILY.xattr.user.a": "b",
		"SCHILY.acl.access": "user::rwx,user:1:r--,group::r--,mask::rwx,other::---"}}))
	for _, data := range headers(f) {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<20 {
			return
		}
		sameMembers(t, data)
		top := t.TempDir()
		dir := top + "/in"
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		var stream bytes.Buffer
		enc := NewEncoder(&stream)
		if err := enc.Begin(0, FlagWhiteouts); err != nil {
			t.Fatal(err)
		}
		entries := int64(0)
		_, err := ReadTar(bytes.NewReader(data), TarOptions{MaxEntries: 1000}, func(e *Entry, r io.Reader) error {
			if e.Size > 1<<20 {
				return Refuse("too large for a test")
			}
			entries++
			return enc.Entry(e, r)
		})
		if err != nil {
			return
		}
		if err := errors.Join(enc.End(), enc.Finish()); err != nil {
			t.Fatal(err)
		}
		d, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		res, err := Apply(d, NewDecoder(&stream), ApplyOptions{})
		if errors.Is(err, errFrame) {
			t.Fatalf("the stream of a readable tar: %v", err)
		}
		if err == nil && res.Layers[0].Entries != entries {
			t.Fatalf("%d entries were sent, %d arrived", entries, res.Layers[0].Entries)
		}
		left, err := os.ReadDir(top)
		if err != nil || len(left) != 1 {
			t.Fatalf("outside the folder lie %v, %v", left, err)
		}
	})
}

// FuzzManifest feeds documents of container archives.
func FuzzManifest(f *testing.F) {
	l := tarOf(f, part{name: "x", data: "x"})
	hex := strings.TrimPrefix(digest(l), "sha256:")
	f.Add([]byte(`[{"Config":"c.json","Layers":["l.tar"]}]`), []byte(`{"os":"linux","rootfs":{"diff_ids":["sha256:`+hex+`"]}}`), []byte(`{}`), []byte(``))
	f.Add([]byte(``), []byte(`{"config":{"digest":"sha256:00"},"layers":[]}`), []byte(`{"manifests":[{"digest":"sha256:`+hex+`"}]}`), []byte(``))
	f.Add([]byte(`[null]`), []byte(`{"manifests":[]}`), []byte(`{"manifests":[],"layers":[{}]}`), []byte(`{}`))
	f.Add([]byte(`[{"Config":"c.json","Layers":["l.tar"]}]`), []byte(`{"rootfs":{"diff_ids":["sha256:00","sha256:`+hex+`"]}}`), []byte(``),
		[]byte(`{"version":1,"image":"x","os_hash_algo":"sha256","os_hash_value":"`+hex+`"}`))
	f.Fuzz(func(t *testing.T, manifest, config, index, delta []byte) {
		parts := []part{{name: "l.tar", data: string(l)}, {name: "c.json", data: string(config)}, {name: "oci-layout", data: "{}"},
			{name: "blobs/sha256/" + strings.TrimPrefix(digest(config), "sha256:"), data: string(config)}}
		if len(manifest) > 0 {
			parts = append(parts, part{name: "manifest.json", data: string(manifest)})
		}
		if len(index) > 0 {
			parts = append(parts, part{name: "index.json", data: string(index)})
		}
		if len(delta) > 0 {
			parts = append(parts, part{name: DeltaName, data: string(delta)})
		}
		res, err := readContainer(bytes.NewReader(tarOf(t, parts...)), NewEncoder(io.Discard), ArchiveOptions{Arch: "amd64", Limits: Limits{}.withDefaults()})
		var refused *RefusedError
		if err != nil && !errors.As(err, &refused) {
			t.Fatalf("an error that is no refusal: %v", err)
		}
		if err == nil && len(res.Order) == 0 {
			t.Fatal("an image without layers was accepted")
		}
		if err == nil && res.Base == nil && bytes.HasPrefix(delta, []byte("{")) {
			t.Fatal("a delta was taken for whole")
		}
		if err == nil && res.Base != nil && (!res.Base.Strong() || res.Base.Image == "") {
			t.Fatalf("a delta that names no base was accepted: %+v", res.Base)
		}
	})
}

// FuzzDetect: any beginning of an image gets one verdict, and the same when more of it is seen.
func FuzzDetect(f *testing.F) {
	f.Add([]byte("QFI\xfb"))
	f.Add(tarOf(f, part{name: "x", data: "y"}))
	f.Add([]byte("\xfd7zXZ\x00\x00\x04\xe6\xd6\xb4F\x02\x00!\x01\x1c\x00\x00\x00\x10\xcfX\xcc"))
	f.Fuzz(func(t *testing.T, head []byte) {
		format, err := Detect(head)
		if err != nil && format != FormatUnknown {
			t.Fatalf("%q with %v", format, err)
		}
		if format.IsWrapper() && RefusalText(format) == "" {
			r, err := Decompress(format, bytes.NewReader(head))
			if err != nil {
				return
			}
			_, _ = io.CopyN(io.Discard, r, 1<<20)
			r.Close()
		}
	})
}

// FuzzDecoder feeds the applier's end of the pipe: the parser may have been taken over.
func FuzzDecoder(f *testing.F) {
	var b bytes.Buffer
	enc := NewEncoder(&b)
	_ = enc.Begin(0, FlagWhiteouts)
	_ = enc.Entry(&Entry{Name: "a", Type: TypeRegular, Size: 5000}, bytes.NewReader(make([]byte, 5000)))
	_ = enc.Entry(&Entry{Name: "l", Type: TypeHardlink, Linkname: "a"}, nil)
	_ = enc.Entry(&Entry{Name: "s", Type: TypeSymlink, Linkname: "/"}, nil)
	_ = enc.End()
	_ = enc.Finish()
	f.Add(b.Bytes())
	mem := make([]byte, SharedBytes)
	b.Reset()
	enc = NewSharedEncoder(&b, mem, strings.NewReader(""))
	_ = enc.Begin(0, 0)
	_ = enc.Entry(&Entry{Name: "a", Type: TypeRegular, Size: 5000}, strings.NewReader(strings.Repeat("x", 5000)))
	_ = enc.done(enc.shared.cur)
	_ = enc.End()
	_ = enc.Finish()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		top := t.TempDir()
		if err := os.Mkdir(top+"/in", 0o755); err != nil {
			t.Fatal(err)
		}
		d, err := os.Open(top + "/in")
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		_, _ = Apply(d, NewSharedDecoder(bytes.NewReader(data), mem, io.Discard), ApplyOptions{Limits: Limits{Bytes: 1 << 20, Entries: 100}})
		left, err := os.ReadDir(top)
		if err != nil || len(left) != 1 {
			t.Fatalf("outside the folder lie %v, %v", left, err)
		}
	})
}

// FuzzIndexArchive: what the index says of an archive, reading it without those layers says too.
func FuzzIndexArchive(f *testing.F) {
	for _, seed := range indexSeeds(f) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		o := ArchiveOptions{Arch: "amd64", Limits: Limits{Entries: 1000}}
		list, err := IndexArchive(bytes.NewReader(data), o)
		if err != nil {
			return
		}
		for _, l := range list {
			if l.Off < 0 || l.Size < 0 || l.Off+l.Size > int64(len(data)) || !isDigest(l.DiffID) {
				t.Fatalf("layer %+v of %d bytes", l, len(data))
			}
		}
		o.Trusted = list
		res, err := ReadArchive(bytes.NewReader(data), NewEncoder(io.Discard), o)
		if err != nil {
			return
		}
		for i, n := range res.Order {
			for _, l := range res.Layers {
				if l.Index == n && l.Trusted && !slices.ContainsFunc(list, func(x IndexedLayer) bool { return x.DiffID == l.ID }) {
					t.Fatalf("layer %d is trusted as %s, which the index does not name", i, l.ID)
				}
			}
		}
	})
}

// indexSeeds are an OCI layout and a docker archive of one layer.
func indexSeeds(t testing.TB) [][]byte {
	inner := tarOf(t, part{name: "x"})
	id := digest(inner)
	cfg := `{"os":"linux","rootfs":{"diff_ids":["` + id + `"]}}`
	man := `{"config":{"digest":"` + digest([]byte(cfg)) + `"},"layers":[{"digest":"` + id + `"}]}`
	blob := func(b string) part {
		return part{name: "blobs/sha256/" + digest([]byte(b))[len("sha256:"):], data: b}
	}
	return [][]byte{
		tarOf(t, blob(string(inner)), part{name: "oci-layout", data: "{}"}, blob(cfg), blob(man),
			part{name: "index.json", data: `{"manifests":[{"digest":"` + digest([]byte(man)) + `"}]}`}),
		tarOf(t, part{name: "manifest.json", data: `[{"Config":"c.json","Layers":["l.tar"]}]`}, part{name: "c.json", data: cfg},
			part{name: "l.tar", data: string(inner)}),
	}
}

func TestIndexArchive(t *testing.T) {
	for i, seed := range indexSeeds(t) {
		list, err := IndexArchive(bytes.NewReader(seed), ArchiveOptions{Arch: "amd64"})
		if err != nil || len(list) != 1 || digest(seed[list[0].Off:list[0].Off+list[0].Size]) != list[0].DiffID {
			t.Errorf("archive %d: %+v, %v", i, list, err)
		}
	}
}
