package glancebridge

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"path"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/layer"
)

func timeOf(ts unix.Timespec) time.Time { return time.Unix(ts.Sec, ts.Nsec).UTC() }

// layerWriter writes entries as the tar of an image layer. Equal trees give equal bytes: names are sorted, nothing of
// the host's is in it.
type layerWriter struct {
	w     *tar.Writer
	links map[[2]uint64]string // inodes with several names → the first
}

func newLayerWriter(w io.Writer) *layerWriter {
	return &layerWriter{w: tar.NewWriter(w), links: map[[2]uint64]string{}}
}

// add writes one entry; content gives exactly Size bytes of a regular file.
func (l *layerWriter) add(e *walkEntry, content func() (io.Reader, error)) error {
	if e.whiteout {
		dir, base := path.Split(e.Name)
		return l.header(&tar.Header{Typeflag: tar.TypeReg, Name: dir + ".wh." + base, ModTime: time.Unix(0, 0)})
	}
	h := &tar.Header{Name: e.Name, Mode: int64(e.Mode), Uid: int(e.UID), Gid: int(e.GID), ModTime: e.ModTime,
		Linkname: e.Linkname}
	for k, v := range e.Xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+k] = v
	}
	switch e.Type {
	case layer.TypeRegular:
		h.Typeflag, h.Size = tar.TypeReg, e.Size
		if e.st.Nlink > 1 {
			key := [2]uint64{uint64(e.st.Dev), e.st.Ino}
			if first, ok := l.links[key]; ok {
				h.Typeflag, h.Size, h.Linkname, h.PAXRecords = tar.TypeLink, 0, first, nil
				return l.header(h)
			}
			l.links[key] = e.Name
		}
		if err := l.header(h); err != nil {
			return err
		}
		r, err := content()
		if err != nil {
			return err
		}
		if n, err := io.CopyN(l.w, r, e.Size); err != nil {
			return fmt.Errorf("file %q gives %d of %d bytes: %w", cut(e.Name), n, e.Size, err)
		}
		return nil
	case layer.TypeDirectory:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
		if e.Name == "" {
			h.Name = "./"
		}
		if err := l.header(h); err != nil || !e.opaque {
			return err
		}
		return l.header(&tar.Header{Typeflag: tar.TypeReg, Name: path.Join(e.Name, ".wh..wh..opq"), ModTime: time.Unix(0, 0)})
	case layer.TypeSymlink:
		h.Typeflag, h.Mode = tar.TypeSymlink, 0o777
	case layer.TypeFIFO:
		h.Typeflag = tar.TypeFifo
	case layer.TypeCharDevice:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(e.Major), int64(e.Minor)
	case layer.TypeBlockDevice:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeBlock, int64(e.Major), int64(e.Minor)
	default:
		return nil
	}
	return l.header(h)
}

func (l *layerWriter) header(h *tar.Header) error {
	h.Format = tar.FormatPAX
	if err := l.w.WriteHeader(h); err != nil {
		return fmt.Errorf("write tar entry %q: %w", cut(h.Name), err)
	}
	return nil
}

// tarLayer writes a stored layer as a tar, with the device nodes that were recorded instead of made. look, if any, is
// shown each entry.
func tarLayer(w io.Writer, dir string, m *layerMeta, look func(*walkEntry)) error {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open layer: %w", err)
	}
	defer unix.Close(root)
	l := newLayerWriter(w)
	err = walkTree(root, shift{}, func(e *walkEntry) error {
		if look != nil {
			look(e)
		}
		return l.add(e, func() (io.Reader, error) { return e.open() })
	})
	if err != nil {
		return err
	}
	if m != nil {
		for _, d := range m.Devices {
			name, err := strconv.Unquote(d.Name)
			if err != nil {
				continue
			}
			e := &walkEntry{}
			e.Name, e.Mode, e.Major, e.Minor, e.Type = name, d.Mode, d.Major, d.Minor, layer.TypeCharDevice
			e.ModTime = time.Unix(0, 0)
			if d.Block {
				e.Type = layer.TypeBlockDevice
			}
			if err := l.add(e, nil); err != nil {
				return err
			}
		}
	}
	return l.w.Close()
}

// measure writes something to nowhere, for its length and digest.
func measure(write func(io.Writer) error) (size int64, hexDigest string, err error) {
	h := sha256.New()
	c := &countWriter{w: h}
	if err := write(c); err != nil {
		return 0, "", err
	}
	return c.n, hex.EncodeToString(h.Sum(nil)), nil
}

type countWriter struct {
	w io.Writer
	n int64
}

func (c *countWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
