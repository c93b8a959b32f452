// Package disk reads disk images and gives the tree of their root file system as layer entries. It owns the way from a
// file (qcow2, VMDK or raw) over its partition table to one file system (ext2/3/4, XFS, btrfs or squashfs) and its
// walk; the readers are sub-packages. Nothing here calls another program, asks the kernel to look at an image, or
// follows a name to another file.
//
//	img, err := disk.Open(ctx, file, size, disk.Options{})
//	err = img.Walk(ctx, sink)
//
// Every byte of an image is taken for hostile: lengths, counts and offsets are checked, loops end, and what is kept in
// memory is bounded whatever the image's size: some 20 MiB of caches and buffers, and at most Limits.Held bytes of
// names. Errors about the image are *Refused and tell its owner what to do; others come from the reader that was handed
// in, from the context, or from the sink.
//
// # The stream
//
// The root comes first; its name is empty. Parents come before children, and a hard link after the entry that has the
// contents. Within a directory entries come in the order of their inodes, which is about that of their data. Modes, ids,
// times and extended attributes are the image's own; access lists are in the form of the system.posix_acl_* attributes,
// also where the file system stores another. Reserved attributes (trusted.*) are passed on: the applier decides. Holes
// are known before the contents are read, up to some 30,000 a file; what the image's container does not store counts as a
// hole. The content reader is an io.WriterTo that reads 1 MiB at a time, and a Skipper, so that holes need not be read.
//
// # What is refused
//
// Backing files, external data files, encryption (qcow2, LUKS, fscrypt), LVM and RAID members, ISO 9660, VHD, VHDX,
// VDI, QED, flat VMDKs, disks with two contents or with two root file systems unless Options.RootPartition picks
// one, and file systems that were not unmounted, except ext3 and ext4, whose journals are replayed in memory.
//
// Goroutines: a read of compressed clusters starts a few, which have ended when it returns. Nothing is kept on disk.
package disk
