// Command frames sends and hears raw Ethernet frames on eth0: the tests run it inside instances whose root tries to
// speak as somebody else.
//
//	frames send COUNT HEX...    sends the frames one after another, COUNT times, with a pause between the times
//	frames hear MARK TEXT...    prints each text that a frame has, and ends with the fifth frame that has the mark
package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "frames:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("say send COUNT HEX or hear MARK TEXT")
	}
	all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}) // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all))
	if err != nil {
		return fmt.Errorf("open packet socket: %w", err)
	}
	link, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}); err != nil {
		return fmt.Errorf("bind packet socket: %w", err)
	}
	if args[0] == "hear" {
		return hear(fd, args[1], args[2:])
	}
	return send(fd, args[1], args[2:])
}

func send(fd int, count string, list []string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	for range n {
		for _, text := range list {
			f, err := hex.DecodeString(text)
			if err != nil {
				return err
			}
			if err := unix.Send(fd, f, 0); err != nil {
				return fmt.Errorf("send: %w", err)
			}
		}
		time.Sleep(300 * time.Millisecond)
	}
	return nil
}

func hear(fd int, mark string, texts []string) error {
	buf := make([]byte, 65536)
	heard := map[string]bool{}
	for marks := 0; marks < 5; {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if bytes.Contains(buf[:n], []byte(mark)) {
			marks++
		}
		for _, s := range texts {
			if !heard[s] && bytes.Contains(buf[:n], []byte(s)) {
				heard[s] = true
				fmt.Println(s)
			}
		}
	}
	return nil
}
