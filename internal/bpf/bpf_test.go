package bpf

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/internal/hosttest"
)

// program is n times r0 = 0, then exit.
func program(n int) []byte {
	insn := func(code []byte, op byte) []byte {
		code = append(code, op, 0, 0, 0)
		return binary.NativeEndian.AppendUint32(code, 0)
	}
	var code []byte
	for range n {
		code = insn(code, unix.BPF_ALU|0x7|unix.BPF_MOV) // BPF_ALU64
	}
	return insn(code, unix.BPF_JMP|unix.BPF_EXIT)
}

// TestSignals: signals that come while the verifier is at work do not make a load fail.
func TestSignals(t *testing.T) {
	hosttest.RequireRoot(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid, stop, done := unix.Gettid(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Tgkill(os.Getpid(), tid, unix.SIGURG)
			}
		}
	}()
	code := program(4000)
	for range 50 {
		fd, err := Load(unix.BPF_PROG_TYPE_SCHED_CLS, code)
		if err != nil {
			t.Errorf("load: %v", err)
			break
		}
		unix.Close(fd)
	}
	close(stop)
	<-done
	if _, err := Load(unix.BPF_PROG_TYPE_SCHED_CLS, program(0)); !errors.Is(err, unix.EACCES) {
		t.Errorf("a program without an answer: %v", err)
	}
}
