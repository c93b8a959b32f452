package layer

import (
	"archive/tar"
	"encoding/hex"
	"io"
	"path"
	"strings"
)

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
