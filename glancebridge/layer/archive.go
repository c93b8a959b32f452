package layer

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/novalet/novalet"
)

// The bounds of a container archive, beside Limits.
const (
	maxDocument  = 4 << 20 // bytes of one JSON document
	maxDocuments = 32 << 20
	maxMembers   = 20_000
	maxLayers    = 2000
)

// StreamLayer is one layer that went through the encoder.
type StreamLayer struct {
	// Index is the one given to Encoder.Begin.
	Index int `json:"index"`
	// ID names the tree: the diffID, or a digest derived from it when the tar was read by other rules than those of
	// image layers.
	ID string `json:"id"`
	// DiffID is the sha256 of the uncompressed tar, "" for trees that came from none.
	DiffID string `json:"diff_id,omitempty"`
	// Blob is the sha256 of the bytes as they lay in the archive.
	Blob string `json:"blob,omitempty"`
	// Skipped: the store has the layer already, its entries were not sent. Trusted: nor were its bytes read.
	Skipped bool `json:"skipped,omitempty"`
	Trusted bool `json:"trusted,omitempty"`
	Observed
}

// Result is what reading an image found out.
type Result struct {
	// Format names what the bytes were, such as "docker-archive", "root-tar.gz" or "qcow2".
	Format string              `json:"format"`
	Config novalet.ImageConfig `json:"config"`
	// HasConfig reports whether the image itself says what to run.
	HasConfig bool          `json:"has_config"`
	Layers    []StreamLayer `json:"layers"` // all that were streamed
	// Order lists the indexes of the image's layers, base first. A layer may occur twice.
	Order []int `json:"order"`
	// VirtualSize is the size of the disk that the image is of, in bytes, 0 for an archive.
	VirtualSize int64 `json:"virtual_size,omitempty"`
	// Index is what IndexArchive found.
	Index []IndexedLayer `json:"index,omitempty"`
	// Warnings are for the log.
	Warnings []string `json:"warnings,omitempty"`
	// Refused, when set, is why the image is at fault.
	Refused string `json:"refused,omitempty"`
	// Error, when set, is any other failure. Full: the file system was.
	Error string `json:"error,omitempty"`
	Full  bool   `json:"full,omitempty"`
}

// OK reports whether the image was read to a good end.
func (r *Result) OK() bool { return r.Refused == "" && r.Error == "" }

// ArchiveOptions say how an archive is read.
type ArchiveOptions struct {
	// Arch is the architecture to run on, in OCI's words.
	Arch string
	// Ref picks one of several images in one archive: a tag as the archive has it.
	Ref string
	// Limits bound the whole.
	Limits Limits
	// Spool gives a file for archives whose kind cannot be told from their beginning.
	Spool func() (io.ReadWriteSeeker, error)
	// Known reports whether a layer of this diffID ("sha256:…") is stored already: its bytes are read and verified
	// all the same, but its entries are not sent again.
	Known func(diffID string) bool
	// Trusted are layers of the store that stand for members of the archive, whose bytes may be anything.
	Trusted []IndexedLayer
}

// ReadArchive reads an uncompressed tar that is an image of one of the kinds: container archive, unified
// incus image, or root file system. The image's layers go to enc; the stream is not finished. r is read to its end.
func ReadArchive(r io.Reader, enc *Encoder, o ArchiveOptions) (*Result, error) {
	o.Limits = o.Limits.withDefaults()
	br := bufio.NewReaderSize(r, 256<<10)
	head, err := br.Peek(256 << 10)
	if err != nil && err != io.EOF {
		return nil, err
	}
	kind := classify(head)
	if kind == kindUnknown {
		f, err := o.Spool()
		if err != nil {
			return nil, err
		}
		if _, err := io.Copy(f, br); err != nil {
			return nil, fmt.Errorf("spool archive: %w", err)
		}
		if kind, err = classifyAll(f); err != nil {
			return nil, err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		br.Reset(f)
	}
	if kind == kindContainer {
		return readContainer(br, enc, o)
	}
	return readRoot(br, enc, o, kind)
}

type archiveKind int

const (
	kindUnknown archiveKind = iota
	kindContainer
	kindRoot
	kindUnified
)

// classify tells the kind from the names at the beginning of an archive. Only names that belong to one kind alone
// decide; when none is met the answer is unknown, and the archive is looked at whole.
func classify(head []byte) archiveKind {
	tr := tar.NewReader(&peekReader{b: head})
	for {
		hdr, err := tr.Next()
		if err != nil {
			return kindUnknown
		}
		name, err := CleanName(hdr.Name)
		if err != nil || name == "" || hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if k := kindOfName(name); k != kindUnknown {
			return k
		}
		return kindUnknown
	}
}

// peekReader ends like a cut file, so that the tar reader stops there.
type peekReader struct{ b []byte }

func (p *peekReader) Read(b []byte) (int, error) {
	if len(p.b) == 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n := copy(b, p.b)
	p.b = p.b[n:]
	return n, nil
}

func kindOfName(name string) archiveKind {
	top, rest, _ := strings.Cut(name, "/")
	switch top {
	case "manifest.json", "oci-layout", "index.json", "repositories":
		if rest == "" {
			return kindContainer
		}
	case "blobs":
		if rest == "" || rest == "sha256" || strings.HasPrefix(rest, "sha256/") {
			return kindContainer
		}
	case "metadata.yaml", "rootfs", "templates":
		return kindUnified
	case "bin", "boot", "dev", "etc", "home", "lib", "lib32", "lib64", "libx32", "media", "mnt", "opt", "proc", "root",
		"run", "sbin", "srv", "sys", "tmp", "usr", "var", "init", "lost+found":
		return kindRoot
	}
	id := strings.TrimPrefix(top, "sha256:")
	id = strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(id, ".gz"), ".tar"), ".json")
	if isHex(id) {
		switch rest {
		case "", "layer.tar", "json", "VERSION":
			return kindContainer
		}
	}
	return kindUnknown
}

func isHex(s string) bool {
	if len(s) != 64 {
		return false
	}
	_, err := hex.DecodeString(s)
	return err == nil && strings.ToLower(s) == s
}

// classifyAll reads the whole archive for the names at its top.
func classifyAll(f io.ReadSeeker) (archiveKind, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return kindUnknown, err
	}
	tr := tar.NewReader(f)
	top := map[string]bool{}
	var single string
	n := 0
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return kindUnknown, tarError(err)
		}
		name, err := CleanName(hdr.Name)
		if err != nil {
			return kindUnknown, err
		}
		t, rest, _ := strings.Cut(name, "/")
		if rest == "" && hdr.Typeflag == tar.TypeReg {
			t += "\x00" // a file, as opposed to a directory of that name
		}
		if len(top) < 10_000 {
			top[t] = true
		}
		single = name
		n++
	}
	switch {
	case top["manifest.json\x00"], top["index.json\x00"] && top["oci-layout\x00"], top["repositories\x00"]:
		return kindContainer, nil
	case top["metadata.yaml\x00"] || top["rootfs"]:
		return kindUnified, nil
	case top["etc"], top["bin"], top["usr"], top["sbin"], top["lib"], top["init\x00"]:
		return kindRoot, nil
	case n == 1 && (strings.HasSuffix(single, ".img") || strings.HasSuffix(single, ".qcow2") || strings.HasSuffix(single, ".raw")):
		return kindUnknown, Refuse("the archive holds nothing but the disk %q; upload that file itself", short(path.Base(single)))
	}
	return kindUnknown, Refuse("the archive is neither a container image (no manifest.json or index.json) nor a root file " +
		"system (no etc, bin or usr at its top); make it with docker save, or with tar -C ROOT -c .")
}

// readRoot reads a root file system, for a unified image from below its rootfs folder.
func readRoot(r io.Reader, enc *Encoder, o ArchiveOptions, kind archiveKind) (*Result, error) {
	res := &Result{Format: "root-tar"}
	var obs Observed
	var meta []byte
	sawMeta, sawRoot, opened := false, kind == kindRoot, false
	to := TarOptions{MaxEntries: o.Limits.Entries}
	sink := obs.Observe(func(e *Entry, content io.Reader) error {
		if e.Name == "" && e.Mode&0o555 != 0o555 {
			// The folder that somebody packed was private, as those of mktemp are; as the root of a system it would keep
			// everybody but root from every file.
			opened = true
			e.Mode |= 0o555
		}
		return enc.Entry(e, content)
	})
	if kind == kindUnified {
		inner := sink
		sink = func(e *Entry, content io.Reader) error {
			switch {
			case e.Name == "rootfs.img" || e.Name == "rootfs.squashfs":
				return Refuse("the image is an incus image that holds %s; upload a container image with a rootfs folder", e.Name)
			case e.Name == "metadata.yaml" && e.Type == TypeRegular:
				sawMeta = true
				b, err := io.ReadAll(io.LimitReader(content, 1<<20))
				meta = b
				return err
			case e.Name == "rootfs" || strings.HasPrefix(e.Name, "rootfs/"):
				sawRoot = true
				e.Name = stripDir(e.Name, "rootfs")
				if e.Type == TypeHardlink {
					e.Linkname = stripDir(e.Linkname, "rootfs")
				}
				return inner(e, content)
			}
			if strings.HasPrefix(e.Name, "templates/") && len(res.Warnings) == 0 {
				res.Warnings = append(res.Warnings, "the templates of the incus image are not run")
			}
			return nil
		}
	}
	if err := enc.Begin(0, 0); err != nil {
		return nil, err
	}
	info, err := ReadTar(r, to, sink)
	if err != nil {
		return nil, err
	}
	if err := enc.End(); err != nil {
		return nil, err
	}
	l := StreamLayer{Index: 0, ID: info.DiffID, DiffID: info.DiffID, Observed: obs}
	switch {
	case !info.Ended:
		return nil, Refuse("the archive ends without an end mark, so it may be cut short; make it again")
	case kind == kindUnified && !sawRoot:
		return nil, Refuse("the image is the metadata half of a split incus image; upload the unified image (incus image export " +
			"of a container, one file) or a tar of the root file system")
	case !slices.ContainsFunc([]string{"etc", "bin", "usr", "sbin", "lib", "init"}, func(s string) bool { return slices.Contains(obs.Top, s) }):
		return nil, Refuse("the archive has no etc, bin or usr at its top, so it is no root file system; make it with tar -C ROOT -c .")
	case kind == kindUnified:
		l.ID = derived("rootfs", info.DiffID)
		if sawMeta {
			res.Format = "incus-unified"
			res.Config.Architecture = yamlArch(meta)
		}
	case obs.Whiteouts || opened:
		// As an image layer the same bytes would be another tree.
		l.ID = derived("root-tar", info.DiffID)
	}
	if opened {
		res.Warnings = append(res.Warnings, "the root directory was not readable for all; it is now")
	}
	res.Layers, res.Order = []StreamLayer{l}, []int{0}
	if a := res.Config.Architecture; a != "" && !sameArch(a, o.Arch) {
		return nil, archRefused(a, o.Arch)
	}
	return res, nil
}

// derived names a tree that was read from a tar by other rules than those for image layers.
func derived(rule, diffID string) string {
	h := sha256.Sum256([]byte("novalet " + rule + "\n" + diffID))
	return "sha256:" + hex.EncodeToString(h[:])
}

// yamlArch takes the architecture from an incus metadata.yaml, a flat key of its top.
func yamlArch(b []byte) string {
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "architecture:"); ok {
			return strings.Trim(strings.TrimSpace(v), `"'`)
		}
	}
	return ""
}

// container collects the members of a container archive.
type container struct {
	o      ArchiveOptions
	enc    *Encoder
	layers []StreamLayer
	byName map[string]int    // member name → index in layers
	docs   map[string][]byte // member name → JSON
	links  map[string]string // member name → target's name
	docLen int
	left   int64 // entries still allowed
	// trusted are the members not to be read, by where their content begins.
	trusted map[int64]IndexedLayer
	// indexing: the layers' bytes are not looked at, so what they are is taken from the config.
	indexing bool
}

func newContainer(enc *Encoder, o ArchiveOptions) *container {
	o.Limits = o.Limits.withDefaults()
	c := &container{o: o, enc: enc, byName: map[string]int{}, docs: map[string][]byte{}, links: map[string]string{},
		left: o.Limits.Entries, trusted: map[int64]IndexedLayer{}}
	for _, t := range o.Trusted {
		c.trusted[t.Off] = t
	}
	return c
}

// readContainer reads a docker archive or an OCI layout. Members come in any order: each layer is sent when
// it is met, and which belong to the image is settled at the end.
func readContainer(r io.Reader, enc *Encoder, o ArchiveOptions) (*Result, error) {
	c := newContainer(enc, o)
	at := &placeReader{r: r}
	tr := tar.NewReader(at)
	for n := 0; ; n++ {
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, tarError(err)
		}
		if n > maxMembers {
			return nil, Refuse("the archive has more than %d members", maxMembers)
		}
		name, err := CleanName(hdr.Name)
		if err != nil {
			return nil, err
		}
		switch hdr.Typeflag {
		case tar.TypeReg:
			err := error(nil)
			if t, ok := c.trusted[at.n]; ok && t.Size == hdr.Size && !isSparse(hdr) {
				err = c.trust(name, t.DiffID)
			} else {
				err = c.member(name, hdr.Size, tr)
			}
			if err != nil {
				return nil, err
			}
		case tar.TypeSymlink:
			c.links[name] = path.Join(path.Dir(name), hdr.Linkname)
		case tar.TypeLink:
			c.links[name] = path.Clean(hdr.Linkname)
		}
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, err
	}
	return c.resolve()
}

func (c *container) member(name string, size int64, r io.Reader) error {
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(1024)
	if err != nil && err != io.EOF {
		return tarError(err)
	}
	wrapper := detectWrapper(head)
	switch {
	case wrapper != FormatUnknown, isTar(head):
		return c.layer(name, wrapper, br)
	}
	return c.keep(name, size, head, br)
}

// keep takes a member that may be one of the image's documents.
func (c *container) keep(name string, size int64, head []byte, r io.Reader) error {
	if len(head) == 0 || head[0] != '{' && head[0] != '[' {
		return nil
	}
	if size > maxDocument {
		return Refuse("the archive has the JSON document %q of more than %d MiB", short(name), maxDocument>>20)
	}
	if c.docLen += int(size); c.docLen > maxDocuments {
		return Refuse("the archive has JSON documents of more than %d MiB", maxDocuments>>20)
	}
	b, err := io.ReadAll(io.LimitReader(r, size))
	if err != nil {
		return tarError(err)
	}
	c.docs[name] = b
	return nil
}

func (c *container) layer(name string, wrapper Format, r io.Reader) error {
	if len(c.layers) >= maxLayers {
		return Refuse("the archive has more than %d layers; squash the image", maxLayers)
	}
	l := StreamLayer{Index: len(c.layers)}
	blob := newHashReader(r)
	in := io.Reader(blob)
	if wrapper != FormatUnknown {
		if t := RefusalText(wrapper); t != "" {
			return Refuse("a layer of %s", t)
		}
		z, err := Decompress(wrapper, in)
		if err != nil {
			return err
		}
		defer z.Close()
		in = &ratioReader{r: z, in: blob.n.Load, ratio: c.o.Limits.Ratio}
	}
	sink := c.enc.Entry
	if d := c.nameDigest(name); wrapper == FormatUnknown && d != "" && c.o.Known != nil && c.o.Known(d) {
		// Stored already: the bytes are hashed below, and that is all that is needed of them.
		sink = func(*Entry, io.Reader) error { return nil }
		l.Skipped = true
	}
	if err := c.enc.Begin(l.Index, FlagWhiteouts); err != nil {
		return err
	}
	info, err := ReadTar(in, TarOptions{MaxEntries: c.left}, l.Observed.Observe(sink))
	if err != nil {
		var refused *RefusedError
		if errors.As(err, &refused) {
			return Refuse("layer %q: %s", short(name), refused.Text)
		}
		return err
	}
	if err := c.enc.End(); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, blob); err != nil {
		return tarError(err)
	}
	if l.Skipped && info.DiffID != c.nameDigest(name) {
		return Refuse("layer %q does not match its digest; upload the image again", short(name))
	}
	c.left -= info.Entries
	l.ID, l.DiffID = info.DiffID, info.DiffID
	l.Blob = "sha256:" + hex.EncodeToString(blob.sum())
	c.layers = append(c.layers, l)
	c.byName[name] = l.Index
	return nil
}

// nameDigest is the digest a member's name claims, "" for none. A claim only: what counts is what was read.
func (c *container) nameDigest(name string) string {
	id := strings.TrimPrefix(name, "blobs/sha256/")
	id = strings.TrimSuffix(strings.TrimPrefix(id, "sha256:"), ".tar")
	if isHex(id) {
		return "sha256:" + id
	}
	return ""
}

// LimitRatio bounds what a decompressor gives by how much it was fed.
func LimitRatio(r io.Reader, fed func() int64, l Limits) io.Reader {
	return &ratioReader{r: r, in: fed, ratio: l.withDefaults().Ratio}
}

// ratioReader refuses a stream that grows beyond what compression explains.
type ratioReader struct {
	r     io.Reader
	in    func() int64
	ratio int64
	out   int64
}

func (r *ratioReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if r.out += int64(n); r.out > r.in()*r.ratio+64<<20 {
		return n, Refuse("the image unpacks to more than %d times its size, which no honest image does", r.ratio)
	}
	return n, err
}
