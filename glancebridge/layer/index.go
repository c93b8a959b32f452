package layer

import (
	"archive/tar"
	"bufio"
	"fmt"
	"io"
	"path"
	"strings"
)

// IndexedLayer is where a layer lies in a container archive, and what the image's config calls it. A claim only: none of
// its bytes has been read.
type IndexedLayer struct {
	Off    int64  `json:"off"` // of the member's content in the archive
	Size   int64  `json:"size"`
	DiffID string `json:"diff_id"`
}

// IndexArchive finds the layers of the image in a container archive without reading them: member headers and JSON
// documents are all it takes. What is no such archive, or one that has to be read as a whole, is refused.
func IndexArchive(r io.ReadSeeker, o ArchiveOptions) ([]IndexedLayer, error) {
	c := newContainer(nil, o)
	c.indexing = true
	var at []IndexedLayer
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		hdr, name, err := nextMember(tr, n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		switch {
		case n == 0 && kindOfName(name) != kindContainer:
			return nil, Refuse("the archive does not begin as a container image")
		case isSparse(hdr):
			return nil, Refuse("the archive has sparse members")
		}
		switch hdr.Typeflag {
		case tar.TypeReg:
			off, err := r.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, fmt.Errorf("index archive: %w", err)
			}
			br := bufio.NewReaderSize(tr, 1024)
			head, err := br.Peek(1024)
			if err != nil && err != io.EOF {
				return nil, tarError(err)
			}
			switch {
			case detectWrapper(head) != FormatUnknown, isTar(head):
				if len(c.layers) >= maxLayers {
					return nil, Refuse("the archive has more than %d layers", maxLayers)
				}
				c.byName[name] = len(c.layers)
				c.layers = append(c.layers, StreamLayer{Index: len(c.layers), Blob: blobName(name)})
				at = append(at, IndexedLayer{Off: off, Size: hdr.Size})
			default:
				if err := c.keep(name, hdr.Size, head, br); err != nil {
					return nil, err
				}
			}
		case tar.TypeSymlink:
			c.links[name] = path.Join(path.Dir(name), hdr.Linkname)
		case tar.TypeLink:
			c.links[name] = path.Clean(hdr.Linkname)
		}
	}
	res, err := c.resolve()
	if err != nil {
		return nil, err
	}
	var out []IndexedLayer
	seen := map[int]bool{}
	for _, i := range res.Order {
		if at[i].DiffID = c.layers[i].DiffID; isDigest(at[i].DiffID) && !seen[i] {
			out = append(out, at[i])
		}
		seen[i] = true
	}
	return out, nil
}

func isSparse(h *tar.Header) bool {
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return h.Typeflag == tar.TypeGNUSparse
}

// trust takes a layer of the store for a member whose bytes are not read: who asked for that has seen to it that the image
// may have the layer.
func (c *container) trust(name string, diffID string) error {
	l := StreamLayer{Index: len(c.layers), ID: diffID, DiffID: diffID, Blob: blobName(name), Skipped: true, Trusted: true}
	if err := c.enc.Begin(l.Index, FlagWhiteouts); err != nil {
		return err
	}
	if err := c.enc.End(); err != nil {
		return err
	}
	c.layers = append(c.layers, l)
	c.byName[name] = l.Index
	return nil
}

// placeReader knows how far it has been read.
type placeReader struct {
	r io.Reader
	n int64
}

func (p *placeReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.n += int64(n)
	return n, err
}
