package layer

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Applied is what writing one layer came to.
type Applied struct {
	Index   int   `json:"index"`
	Entries int64 `json:"entries"`
	// Bytes is the data written, holes not counted.
	Bytes int64 `json:"bytes"`
	// Opaque are the directories that hide what lies below them. The mark is an xattr that only the host's root may
	// set, so whoever runs the applier does it.
	Opaque []string `json:"opaque,omitempty"`
	// Devices are the device nodes of the image. They are recorded, never made.
	Devices []Device `json:"devices,omitempty"`
	// Links are hard links to files of a layer below.
	Links []Link `json:"links,omitempty"`
	// Implied counts directories that no entry described.
	Implied int64 `json:"implied,omitempty"`
	// Nobody counts entries whose owner lies outside the mapped ids and was made nobody.
	Nobody int64 `json:"nobody,omitempty"`
	// Dropped counts the extended attributes left out, by namespace.
	Dropped map[string]int64 `json:"dropped,omitempty"`
}

// Device is a device node of an image.
type Device struct {
	Name  string `json:"name"` // quoted as Go does, since it is raw bytes
	Block bool   `json:"block,omitempty"`
	Major uint32 `json:"major"`
	Minor uint32 `json:"minor"`
	Mode  uint32 `json:"mode"`
}

// Link is a hard link, both ends paths of the image.
type Link struct {
	Name   []byte `json:"name"`
	Target []byte `json:"target"`
}

// ApplyResult is what Apply found and did.
type ApplyResult struct {
	Layers []Applied `json:"layers"`
	// Refused, when set, is why the image is at fault.
	Refused string `json:"refused,omitempty"`
	// TooLarge: the limit of bytes was reached. Full: the file system was. Cut: the stream ended early.
	TooLarge bool   `json:"too_large,omitempty"`
	Full     bool   `json:"full,omitempty"`
	Cut      bool   `json:"cut,omitempty"`
	Error    string `json:"error,omitempty"`
}

// ApplyOptions say how a stream is written.
type ApplyOptions struct {
	Limits Limits
	// Owners keeps owners, capabilities and ACLs; without it everything belongs to the caller, for unprivileged tests.
	Owners bool
	// ExactModes: the process's umask is 0.
	ExactModes bool
	// MaxID is the first id that is not mapped, when Owners is set; entries beyond belong to nobody.
	MaxID uint32
}

// maxNotes bounds what an image may make the applier remember of each kind.
const maxNotes = 100_000

// nobody owns what has an owner that cannot be expressed.
const nobody = 65534

// Apply writes the layers of a stream into folders of dir named by their index. Every path is resolved by the kernel
// inside the layer's own folder, whatever symlinks the image planted.
func Apply(dir *os.File, d *Decoder, o ApplyOptions) (*ApplyResult, error) {
	o.Limits = o.Limits.withDefaults()
	res := &ApplyResult{}
	a := &applier{o: o, entriesLeft: o.Limits.Entries, bytesLeft: o.Limits.Bytes}
	if a.bytesLeft <= 0 {
		a.bytesLeft = 1<<63 - 1
	}
	defer func() { a.close() }()
	d.waits = func() {
		if a.open {
			// Who waits for us to be done with a block sends nothing before.
			a.w.sendAll()
		}
	}
	for {
		f, err := d.Next()
		if err != nil {
			return res, err
		}
		switch f.Kind {
		case frameLayer:
			if a.root >= 0 && a.open {
				return res, fmt.Errorf("%w: a layer inside a layer", errFrame)
			}
			if slices.ContainsFunc(res.Layers, func(l Applied) bool { return l.Index == f.Index }) {
				return res, fmt.Errorf("%w: layer %d twice", errFrame, f.Index)
			}
			if err := a.begin(dir, f.Index, f.Flags, d.release); err != nil {
				return res, err
			}
		case frameEntry:
			if !a.open {
				return res, fmt.Errorf("%w: an entry outside a layer", errFrame)
			}
			if err := a.entry(f.Entry, d); err != nil {
				return res, err
			}
		case frameEnd:
			if !a.open {
				return res, fmt.Errorf("%w: the end of no layer", errFrame)
			}
			if err := a.end(); err != nil {
				return res, err
			}
			res.Layers = append(res.Layers, a.out)
		case frameFinish:
			if a.open {
				return res, fmt.Errorf("%w: the end inside a layer", errFrame)
			}
			return res, nil
		}
	}
}

type applier struct {
	o           ApplyOptions
	entriesLeft int64
	bytesLeft   int64

	open       bool
	root       int // descriptor of the layer's folder
	rootIno    uint64
	flags      uint64
	out        Applied
	dirs       *dirCache
	dirTimes   []dirTime
	timeOf     map[uint64]int // which of dirTimes a directory gets when it is closed, by its inode
	pending    []Link         // hard links whose target has not been met
	opaqueSeen map[string]bool
	made       map[string]struct{} // directories by the name they were made under
	w          *writers
}

// dirTime is what a directory gets when nothing more is made in it: its time, and what would decide over the files made in it,
// the setgid bit and the default ACL.
type dirTime struct {
	name   string
	ts     [2]unix.Timespec
	setgid uint32 // the whole mode, 0 unless it has the bit
	acl    string // the default ACL
	set    bool   // it was, or will be when the last file in the directory is written
}

const aclDefault = "system.posix_acl_default"

func (a *applier) begin(dir *os.File, index int, flags uint64, release func(block int)) error {
	name := strconv.Itoa(index)
	if err := unix.Mkdirat(int(dir.Fd()), name, 0o755); err != nil {
		return fmt.Errorf("make layer folder: %w", err)
	}
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open layer folder: %w", err)
	}
	// The umask must not decide over the root's mode.
	if err := unix.Fchmod(fd, 0o755); err != nil {
		unix.Close(fd)
		return fmt.Errorf("set mode of layer folder: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return fmt.Errorf("look at layer folder: %w", err)
	}
	*a = applier{o: a.o, entriesLeft: a.entriesLeft, bytesLeft: a.bytesLeft, open: true, root: fd, rootIno: st.Ino, flags: flags,
		out: Applied{Index: index}, opaqueSeen: map[string]bool{}, made: map[string]struct{}{}, timeOf: map[uint64]int{}}
	a.dirs = newDirCache(a)
	a.w = newWriters(a.o.ExactModes, release)
	return nil
}

func (a *applier) close() {
	if !a.open {
		return
	}
	a.dirs.close()
	a.w.close()
	unix.Close(a.root)
	a.open = false
}

// end resolves what had to wait for the whole layer: links to later members, then the directories' times.
func (a *applier) end() error {
	if err := a.w.wait(); err != nil {
		return err
	}
	// A chain of links may be listed in any order; each round must make progress.
	for len(a.pending) > 0 {
		var left []Link
		for _, l := range a.pending {
			err := a.link(string(l.Name), string(l.Target))
			switch {
			case errors.Is(err, unix.ENOENT):
				left = append(left, l)
			case err != nil:
				return err
			}
		}
		if len(left) == len(a.pending) {
			a.out.Links = left
			break
		}
		a.pending = left
	}
	a.dirs.close()
	if err := a.w.wait(); err != nil {
		return err
	}
	last := make(map[string]int, len(a.dirTimes))
	for i, t := range a.dirTimes {
		last[t.name] = i
	}
	for i, t := range a.dirTimes {
		if last[t.name] != i || t.set {
			continue // described again later, or closed
		}
		if err := a.setDirTime(t); err != nil {
			return err
		}
	}
	a.w.close()
	unix.Close(a.root)
	a.open = false
	return nil
}

func (a *applier) setDirTime(t dirTime) error {
	fd := a.root
	if t.name != "" {
		var err error
		flags := uint64(unix.O_DIRECTORY | unix.O_NOFOLLOW)
		if t.setgid == 0 && t.acl == "" {
			flags |= unix.O_PATH
		}
		if fd, err = a.openat2(t.name, flags); err != nil {
			if err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP {
				return nil // replaced by a later entry
			}
			return fmt.Errorf("open directory for its time: %w", err)
		}
		defer unix.Close(fd)
	}
	if t.setgid != 0 {
		if err := unix.Fchmod(fd, t.setgid); err != nil {
			return fmt.Errorf("set directory mode: %w", err)
		}
	}
	if t.acl != "" {
		if err := setXattr(fd, aclDefault, t.acl); err != nil {
			return err
		}
	}
	if err := futimens(fd, &t.ts); err != nil {
		return fmt.Errorf("set directory time: %w", err)
	}
	return nil
}

// openat2 opens a path below the layer's folder; symlinks planted by the image stay inside it.
func (a *applier) openat2(name string, flags uint64) (int, error) {
	for {
		fd, err := unix.Openat2(a.root, name, &unix.OpenHow{
			Flags:   flags | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
		})
		// EAGAIN: a rename elsewhere raced with the walk (openat2(2)).
		if err != unix.EAGAIN && err != unix.EINTR {
			return fd, err
		}
	}
}

func (a *applier) entry(e *Entry, d *Decoder) error {
	a.out.Entries++
	if a.entriesLeft--; a.entriesLeft < 0 {
		return Refuse("the image has more than %d files", a.o.Limits.Entries)
	}
	name, err := CleanName(e.Name)
	if err != nil {
		return err
	}
	if name == "" {
		if e.Type != TypeDirectory {
			return Refuse("the image's root is no directory")
		}
		t, p := a.dirPlan("", e)
		return a.dirMeta(a.root, t, p, a.flags&FlagMerge != 0, false)
	}
	dir, base := splitName(name)
	if a.flags&(FlagWhiteouts|FlagMerge) != 0 && strings.HasPrefix(base, whiteoutPrefix) {
		if err := a.w.wait(); err != nil {
			return err
		}
		if err := a.whiteout(dir, base); err != nil {
			return err
		}
		return skipContent(d)
	}
	if e.Type == TypeCharDevice || e.Type == TypeBlockDevice {
		return a.device(name, e)
	}
	parent, err := a.dirs.get(dir)
	if err != nil {
		return nameError("make parent of", name, err)
	}
	if err := a.w.settle(parent, base); err != nil {
		return err
	}
	switch e.Type {
	case TypeDirectory:
		err = a.directory(parent, name, base, e)
	case TypeRegular:
		err = a.regular(parent, base, name, e, d)
	case TypeSymlink:
		err = a.symlink(parent, base, e)
	case TypeHardlink:
		err = a.hardlink(name, e)
	case TypeFIFO:
		err = a.node(parent, base, unix.S_IFIFO, e)
	case TypeSocket:
		// What a socket was bound to is gone; only its server can make it anew.
		return nil
	}
	if err != nil {
		return nameError("write", name, err)
	}
	return nil
}

func (a *applier) device(name string, e *Entry) error {
	if e.Type == TypeCharDevice && e.Major == 0 && e.Minor == 0 {
		return Refuse("the image has the device 0:0 at %q, which would delete files of the layers below", short(name))
	}
	if len(a.out.Devices) < maxNotes {
		a.out.Devices = append(a.out.Devices, Device{
			Name: strconv.Quote(name), Block: e.Type == TypeBlockDevice, Major: e.Major, Minor: e.Minor, Mode: e.Mode,
		})
	}
	return nil
}

// clear makes room for an entry that is no directory.
func (a *applier) clear(parent *dirFD, base string) error {
	if err := a.w.wait(); err != nil {
		return err
	}
	a.dirs.drop(parent)
	return removeAll(parent.fd, base, 0)
}

func (a *applier) directory(parent *dirFD, name, base string, e *Entry) error {
	t, p := a.dirPlan(name, e)
	made, mode := a.o.ExactModes, uint32(0o700)
	if made {
		mode = p.mode & 0o777
	}
	err := unix.Mkdirat(parent.fd, base, mode)
	opaque, again := false, false
	if err == unix.EEXIST {
		var st unix.Stat_t
		if err := unix.Fstatat(parent.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			// A directory over the deletion of what is below hides it all the same.
			opaque = st.Mode&unix.S_IFMT == unix.S_IFCHR
			if err := a.clear(parent, base); err != nil {
				return err
			}
			err = unix.Mkdirat(parent.fd, base, mode)
		} else {
			err, again, made = nil, true, false
			if _, ok := a.timeOf[st.Ino]; ok {
				// Nobody may still have to set the time that it was to have.
				err = a.w.wait()
			}
		}
	}
	if err != nil {
		return err
	}
	if opaque {
		if err := a.markOpaque(name); err != nil {
			return err
		}
	}
	flags := unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	if p.nothing(made) {
		flags |= unix.O_PATH // enough to make files in it, and cheaper
	}
	fd, err := unix.Openat(parent.fd, base, flags, 0)
	if err != nil {
		return err
	}
	if err := a.dirMeta(fd, t, p, again && a.flags&FlagMerge != 0, made); err != nil {
		unix.Close(fd)
		return err
	}
	a.made[name] = struct{}{}
	d, err := a.dirs.add(name, fd)
	// A deletion in merged layers goes by no directory of the cache.
	if err == nil && a.flags&FlagMerge == 0 && t.setgid == 0 && t.acl == "" {
		a.timeOf[d.ino] = len(a.dirTimes) - 1
	} else if err == nil {
		delete(a.timeOf, d.ino) // of another one that had its inode, or of its description before
	}
	return err
}

// dirPlan is what a directory gets: its time waits for the end, since every later entry changes it, as does what would
// decide over the files made in it.
func (a *applier) dirPlan(name string, e *Entry) (dirTime, plan) {
	t := dirTime{name: name, ts: timespecs(e)}
	early := *e
	if e.Mode&unix.S_ISGID != 0 {
		t.setgid = e.Mode & 07777
		early.Mode &^= unix.S_ISGID
	}
	if acl, ok := e.Xattrs[aclDefault]; ok && a.o.Owners {
		t.acl = acl
		early.Xattrs = maps.Clone(e.Xattrs)
		delete(early.Xattrs, aclDefault)
	}
	return t, a.plan(&early)
}

// dirMeta sets what belongs to a directory. bare takes away first what it has from the layer below; made says that it was
// made with the permission bits already.
func (a *applier) dirMeta(fd int, t dirTime, p plan, bare, made bool) error {
	if bare {
		if err := strip(fd); err != nil {
			return err
		}
		if a.o.Owners {
			// The plan takes a directory for one that was made a moment ago.
			if err := unix.Fchown(fd, 0, 0); err != nil {
				return fmt.Errorf("set owner: %w", err)
			}
		}
	}
	if err := p.apply(fd, made); err != nil {
		return err
	}
	a.dirTimes = append(a.dirTimes, t)
	return nil
}

// ids returns the owner to set.
func (a *applier) ids(e *Entry) (uid, gid int) {
	u, g := e.UID, e.GID
	if a.o.MaxID > 0 && (u >= a.o.MaxID || g >= a.o.MaxID) {
		a.out.Nobody++
		if u >= a.o.MaxID {
			u = nobody
		}
		if g >= a.o.MaxID {
			g = nobody
		}
	}
	return int(u), int(g)
}

// skipContent reads over the content of an entry that is not written.
func skipContent(d *Decoder) error {
	for {
		data, zeros, err := d.segment()
		if err != nil {
			return err
		}
		if data == nil && zeros == 0 {
			return nil
		}
	}
}
