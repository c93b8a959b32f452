package layer

import (
	"archive/tar"
	"bufio"
	"encoding/hex"
	"errors"
	"io"
	"path"
	"strings"
)

// The bounds of a container archive, beside Limits.
const (
	maxDocument  = 4 << 20 // bytes of one JSON document
	maxDocuments = 32 << 20
	maxMembers   = 20_000
	maxLayers    = 2000
)

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
		hdr, name, err := nextMember(tr, n)
		if err == io.EOF {
			break
		}
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

// nextMember goes on to member n of a container archive; io.EOF is its end.
func nextMember(tr *tar.Reader, n int) (*tar.Header, string, error) {
	hdr, err := tr.Next()
	if err == io.EOF {
		return nil, "", err
	}
	if err != nil {
		return nil, "", tarError(err)
	}
	if n > maxMembers {
		return nil, "", Refuse("the archive has more than %d members", maxMembers)
	}
	name, err := CleanName(hdr.Name)
	return hdr, name, err
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
	info, err := ReadTar(in, TarOptions{MaxEntries: c.left, enc: c.enc}, l.Observed.Observe(sink))
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
