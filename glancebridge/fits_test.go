package glancebridge

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/novalet/novalet"
)

// TestFlavor: an image meets the flavors that Nova would give it, when it is fetched, when it is stored, and with or
// without what the request says of it.
func TestFlavor(t *testing.T) {
	ok := novalet.ImageMeta{}
	for _, c := range []struct {
		name     string
		rec      func(*ImageRecord)
		meta     novalet.ImageMeta
		maxBytes int64
		memory   int64
		class    string
	}{
		{"fits", func(r *ImageRecord) { r.MinDiskGB, r.MinRAMMB, r.VirtualSize = 1, 512, 1<<30 }, ok, 1 << 30, 512, ""},
		{"no bounds", func(r *ImageRecord) { r.MinDiskGB, r.MinRAMMB, r.VirtualSize = 9, 1<<20, 1<<50 }, ok, 0, 0, ""},
		{"min_ram", func(r *ImageRecord) { r.MinRAMMB = 513 }, ok, 0, 512, "FlavorMemoryTooSmall"},
		{"min_disk", func(r *ImageRecord) { r.MinDiskGB = 2 }, ok, 1 << 30, 0, "FlavorDiskSmallerThanMinDisk"},
		{"virtual size", func(r *ImageRecord) { r.VirtualSize = 1<<30 + 1 }, ok, 1 << 30, 0, "FlavorDiskSmallerThanImage"},
		{"min_ram of the request", func(*ImageRecord) {}, novalet.ImageMeta{Status: "active", MinRAMMB: 513}, 0, 512, "FlavorMemoryTooSmall"},
		{"min_disk of the request", func(*ImageRecord) {}, novalet.ImageMeta{MinDiskGB: 2}, 1 << 30, 0, "FlavorDiskSmallerThanMinDisk"},
		{"size of the request", func(*ImageRecord) {}, novalet.ImageMeta{Size: 1<<30 + 1}, 1 << 30, 0, "FlavorDiskSmallerThanImage"},
		{"lowered since", func(r *ImageRecord) { r.MinRAMMB, r.MinDiskGB = 4096, 40 }, novalet.ImageMeta{Status: "active", MinRAMMB: 64, MinDiskGB: 1}, 1 << 30, 512, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			images := t.TempDir()
			id := addImage(t, images, rootTar(t), c.rec)
			s := openStore(t, images, nil)
			r := novalet.ImageRequest{ImageID: id, InstanceUUID: "a", Meta: c.meta, MaxBytes: c.maxBytes, MemoryMB: c.memory}
			check := func(when string) {
				t.Helper()
				_, err := s.Prepare(t.Context(), &r)
				var f *novalet.Fault
				switch {
				case c.class == "" && err != nil:
					t.Errorf("%s: %v", when, err)
				case c.class != "" && (!errors.As(err, &f) || f.Class != c.class || !errors.Is(err, novalet.ErrAbort)):
					t.Errorf("%s: got %v, want %s", when, err, c.class)
				}
			}
			check("fetched")
			// A flavor without bounds brings it into the store in any case.
			if _, err := s.Prepare(t.Context(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "large"}); err != nil {
				t.Fatal(err)
			}
			check("stored")
			leased := c.class == ""
			if _, err := os.Stat(s.path("leases", "a.json")); (err == nil) != leased {
				t.Errorf("leased: %v, want %v", err == nil, leased)
			}
		})
	}
}

// TestVirtualSize: a disk that claims to be larger than the flavor's is refused by its own header, whatever Glance says.
func TestVirtualSize(t *testing.T) {
	needTools(t, "mkfs.ext4", "qemu-img")
	tree, work, images := t.TempDir(), t.TempDir(), t.TempDir()
	for _, d := range []string{"etc", "sbin"} {
		if err := os.Mkdir(filepath.Join(tree, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(tree, "sbin/init"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	raw, qcow2 := filepath.Join(work, "raw"), filepath.Join(work, "qcow2")
	run(t, "mkfs.ext4", "-q", "-d", tree, raw, "16m")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
	run(t, "qemu-img", "resize", "-q", qcow2, "3G")
	data, err := os.ReadFile(qcow2)
	if err != nil {
		t.Fatal(err)
	}
	id := addImage(t, images, data, func(r *ImageRecord) { r.DiskFormat = "qcow2" })
	s := openStore(t, images, nil)
	for range 2 {
		_, err := s.Prepare(t.Context(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "a", MaxBytes: 3<<30 - 1})
		if !isTooSmall(err) {
			t.Errorf("got %v", err)
		}
	}
	if _, err := s.Prepare(t.Context(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "a", MaxBytes: 3 << 30}); err != nil {
		t.Error(err)
	}
}
