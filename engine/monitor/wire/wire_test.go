package wire

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func pair(t *testing.T) (*Conn, *Conn) {
	t.Helper()
	a, fd, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewConn(fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func TestMessageWithDescriptors(t *testing.T) {
	a, b := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	big := strings.Repeat("x", 3<<20)
	go func() {
		defer w.Close()
		if err := a.Send(&Request{V: 1, Op: big}, int(w.Fd()), int(w.Fd())); err != nil {
			t.Error(err)
		}
		if err := a.Send(&Request{Op: "second"}); err != nil {
			t.Error(err)
		}
	}()
	var m Request
	fds, err := b.Recv(&m)
	if err != nil || m.Op != big || len(fds) != 2 {
		t.Fatalf("%d bytes, %v, %v", len(m.Op), fds, err)
	}
	for _, fd := range fds {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %d is not close-on-exec: %v", fd, err)
		}
	}
	if _, err := unix.Write(fds[0], []byte("hello")); err != nil {
		t.Fatal(err)
	}
	CloseAll(fds)
	fds, err = b.Recv(&m)
	if err != nil || m.Op != "second" || len(fds) != 0 {
		t.Fatal(m.Op, fds, err)
	}
	got, err := io.ReadAll(r)
	if err != nil || string(got) != "hello" {
		t.Fatalf("%q %v", got, err)
	}
	a.Close()
	if _, err := b.Recv(&m); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

func TestUnknownFieldsAreIgnored(t *testing.T) {
	a, b := pair(t)
	if err := a.Send(map[string]any{"v": 7, "op": "list", "of": "a later version"}); err != nil {
		t.Fatal(err)
	}
	var m Request
	if _, err := b.Recv(&m); err != nil || m.Op != "list" || m.V != 7 {
		t.Fatal(m, err)
	}
}

func TestTooLongIsRefused(t *testing.T) {
	a, b := pair(t)
	if _, err := a.Write([]byte{0xff, 0xff, 0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	var m Request
	if _, err := b.Recv(&m); err == nil || errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

func TestFrames(t *testing.T) {
	var buf bytes.Buffer
	data := bytes.Repeat([]byte("0123456789"), 20000)
	if err := WriteFrame(&buf, FrameData, data); err != nil {
		t.Fatal(err)
	}
	if err := WriteFrame(&buf, FrameResize, []byte{0, 1, 0, 2}); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for {
		kind, p, err := ReadFrame(&buf)
		if err != nil {
			t.Fatal(err)
		}
		if kind == FrameResize {
			break
		}
		got = append(got, p...)
	}
	if !bytes.Equal(got, data) {
		t.Fatalf("%d bytes of %d", len(got), len(data))
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 'x'})
	f.Add([]byte{1, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, p, err := ReadFrame(bytes.NewReader(b)); err == nil && len(p) > MaxFrame {
			t.Fatal("too long")
		}
	})
}

func FuzzRecv(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, '{', '}'})
	f.Add([]byte{0, 0, 0, 9, '{', '}'})
	f.Fuzz(func(t *testing.T, in []byte) {
		a, b := pair(t)
		if len(in) > 1<<16 {
			return
		}
		if _, err := a.Write(in); err != nil {
			t.Fatal(err)
		}
		a.Close()
		var m Request
		fds, err := b.Recv(&m)
		if err == nil && len(fds) != 0 {
			t.Fatal("descriptors from nowhere")
		}
	})
}
