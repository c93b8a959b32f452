// Package pid1 is the program that an application's init goes on to once the tenant's program runs: it reaps what is
// orphaned, passes signals on to the program, and ends with its exit code. It is a few dozen instructions, so that the first
// process of an idle instance costs a stack and its page tables, and never runs.
//
// It finds the program's pid, in decimal digits, in the first string of its environment, and takes the signals that are blocked when
// it starts: a signal that is blocked stays for it to take, though the process is its namespace's first and has no handlers
// (sig_ignored in kernel/signal.c).
//
// It starts no goroutine and keeps nothing on disk.
package pid1

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/sealed"
)

// start is where the program's code begins, in assembly; it ends with a mark.
var start unsafe.Pointer

const mark = 0x646e652072706172

// code is the program's code, which runs wherever it lies.
func code() []byte {
	end := binary.LittleEndian.AppendUint64(nil, mark)
	for n := 0; ; n++ {
		if b := unsafe.Slice((*byte)(start), n+len(end)); bytes.HasSuffix(b, end) {
			return b[:n]
		}
	}
}

// file is the head of a program file of one segment that is read and run (elf(5)), on machines that put low bytes first.
type file struct {
	ident                      [16]byte
	kind, machine              uint16
	version                    uint32
	entry, phoff, shoff        uint64
	flags                      uint32
	ehsize, phentsize, phnum   uint16
	shentsize, shnum, shstrndx uint16
	load, stack                segment
}

type segment struct {
	kind, flags                                uint32
	offset, vaddr, paddr, filesz, memsz, align uint64
}

// image is the program file. It has no fixed address: the kernel puts it anywhere.
func image() []byte {
	const dyn, load, stack, x, w, r = 3, 1, 0x6474e551, 1, 2, 4
	c := code()
	f := file{ident: [16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, kind: dyn, machine: 62, version: 1, ehsize: 64, phoff: 64, phentsize: 56, phnum: 2}
	if runtime.GOARCH == "arm64" {
		f.machine = 183
	}
	f.entry = uint64(unsafe.Sizeof(f))
	size := f.entry + uint64(len(c))
	f.load = segment{kind: load, flags: r | x, filesz: size, memsz: size, align: 1 << 16}
	f.stack = segment{kind: stack, flags: r | w, align: 16}
	return append(unsafe.Slice((*byte)(unsafe.Pointer(&f)), f.entry), c...)
}

// Open returns a descriptor of the program by which it can be run and not read, close-on-exec.
func Open() (*os.File, error) {
	return sealed.Program("init", unix.O_PATH, func(w *os.File) error {
		_, err := w.Write(image())
		return err
	})
}

//go:linkname beforeExec syscall.runtime_BeforeExec
func beforeExec()

//go:linkname afterExec syscall.runtime_AfterExec
func afterExec()

// Exec turns this process into the program behind a descriptor, for a child with the pid. It returns only on an error.
func Exec(fd, pid int) error {
	argv, err := syscall.SlicePtrFromStrings([]string{"init"})
	if err != nil {
		return fmt.Errorf("run init: %w", err)
	}
	env, err := syscall.SlicePtrFromStrings([]string{strconv.Itoa(pid)})
	if err != nil {
		return fmt.Errorf("run init: %w", err)
	}
	var empty [1]byte
	// As syscall.Exec has it: a thread that were to be made just now would end the process.
	beforeExec()
	_, _, errno := unix.RawSyscall6(unix.SYS_EXECVEAT, uintptr(fd), uintptr(unsafe.Pointer(&empty)), uintptr(unsafe.Pointer(&argv[0])),
		uintptr(unsafe.Pointer(&env[0])), unix.AT_EMPTY_PATH, 0)
	afterExec()
	return fmt.Errorf("run init: %w", errno)
}
