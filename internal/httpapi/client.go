package httpapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"

	"github.com/novalet/novalet"
)

// Client talks to the agent of this host.
type Client struct {
	Path string // of the socket
}

// ErrNoAgent means that nothing listens on the socket.
var ErrNoAgent = errors.New("no agent answers")

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.Path)
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("open %s: only root may; try sudo: %w", c.Path, err)
	case err != nil:
		return nil, fmt.Errorf("%w on %s: is `novalet agent` running here? (--socket names another one): %w", ErrNoAgent, c.Path, err)
	}
	return conn, nil
}

func (c *Client) do(ctx context.Context, method, path string) ([]byte, error) {
	h := &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://novalet"+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := h.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 64<<20))
	if err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	if res.StatusCode >= 400 && path != "/health" {
		return nil, answerError(res.StatusCode, b)
	}
	return b, nil
}

func answerError(code int, body []byte) error {
	var e struct {
		Error string `json:"error"`
	}
	_ = json.Unmarshal(body, &e)
	if e.Error == "" {
		e.Error = http.StatusText(code)
	}
	if code == http.StatusNotFound {
		return fmt.Errorf("%s: %w", e.Error, novalet.ErrNotFound)
	}
	return errors.New(e.Error)
}

// Health asks how the agent is; a degraded one is no error.
func (c *Client) Health(ctx context.Context) (*Health, error) {
	b, err := c.do(ctx, http.MethodGet, "/health")
	if err != nil {
		return nil, err
	}
	h := new(Health)
	return h, json.Unmarshal(b, h)
}

// Instances lists what runs on this host.
func (c *Client) Instances(ctx context.Context) ([]InstanceView, error) {
	b, err := c.do(ctx, http.MethodGet, "/v1/instances")
	if err != nil {
		return nil, err
	}
	var v []InstanceView
	return v, json.Unmarshal(b, &v)
}

// Images lists the image store.
func (c *Client) Images(ctx context.Context) ([]novalet.ImageStatus, error) {
	b, err := c.do(ctx, http.MethodGet, "/v1/images")
	if err != nil {
		return nil, err
	}
	var v []novalet.ImageStatus
	return v, json.Unmarshal(b, &v)
}

// Collect removes unused images and says how many bytes that freed.
func (c *Client) Collect(ctx context.Context) (int64, error) {
	b, err := c.do(ctx, http.MethodPost, "/v1/images/collect")
	if err != nil {
		return 0, err
	}
	var v struct {
		Bytes int64 `json:"bytes"`
	}
	return v.Bytes, json.Unmarshal(b, &v)
}

// Verify reads every stored layer again; with heal, corrupt ones are fetched again.
func (c *Client) Verify(ctx context.Context, heal bool) ([]novalet.LayerCheck, error) {
	path := "/v1/images/verify"
	if heal {
		path += "?heal=1"
	}
	b, err := c.do(ctx, http.MethodPost, path)
	if err != nil {
		return nil, err
	}
	var v []novalet.LayerCheck
	return v, json.Unmarshal(b, &v)
}

// Metrics returns the Prometheus text.
func (c *Client) Metrics(ctx context.Context) ([]byte, error) {
	return c.do(ctx, http.MethodGet, "/metrics")
}

// Log returns the end of an instance's console log, at most max bytes.
func (c *Client) Log(ctx context.Context, id string, max int) ([]byte, error) {
	return c.do(ctx, http.MethodGet, fmt.Sprintf("/v1/instances/%s/log?bytes=%d", id, max))
}

// stream upgrades a connection.
func (c *Client) stream(ctx context.Context, path string, body any) (net.Conn, *frameConn, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	b, err := json.Marshal(body)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://novalet"+path, bytes.NewReader(b))
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", streamProtocol)
	if err := req.Write(conn); err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("send the request: %w", err)
	}
	r := bufio.NewReader(conn)
	res, err := http.ReadResponse(r, req)
	if err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("read the answer: %w", err)
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		b, _ := io.ReadAll(io.LimitReader(res.Body, maxFrame))
		conn.Close()
		return nil, nil, answerError(res.StatusCode, b)
	}
	return conn, &frameConn{rw: struct {
		io.Reader
		io.Writer
	}{r, conn}}, nil
}

// Console joins in and out to an instance's console until in ends, the instance stops, or ctx ends.
func (c *Client) Console(ctx context.Context, id string, rows, cols uint16, in io.Reader, out io.Writer) error {
	conn, fc, err := c.stream(ctx, "/v1/instances/"+id+"/console", struct{}{})
	if err != nil {
		return err
	}
	defer conn.Close()
	if rows > 0 && cols > 0 {
		_ = fc.write(frameResize, []byte{byte(rows >> 8), byte(rows), byte(cols >> 8), byte(cols)})
	}
	_, err = pump(ctx, conn, fc, in, out, out, true)
	return err
}

// Exec runs a process inside an instance, with in, out and errOut as its standard streams, and returns its exit
// code. With tty all output comes by out.
func (c *Client) Exec(ctx context.Context, id string, p novalet.ProcessSpec, tty bool, in io.Reader, out, errOut io.Writer) (int, error) {
	conn, fc, err := c.stream(ctx, "/v1/instances/"+id+"/exec", execRequest{Process: p, TTY: tty})
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	return pump(ctx, conn, fc, in, out, errOut, false)
}

// pump copies until the server's last frame. closeAtEOF ends the connection when in ends.
func pump(ctx context.Context, conn net.Conn, fc *frameConn, in io.Reader, out, errOut io.Writer, closeAtEOF bool) (int, error) {
	stopped := context.AfterFunc(ctx, func() { conn.Close() })
	defer stopped()
	var once sync.Once
	// Reading from a terminal cannot be interrupted: this goroutine ends with the process, or with in.
	go func() {
		_, _ = io.Copy(frameWriter{fc, frameStdin}, in)
		_ = fc.write(frameEOF, nil)
		if closeAtEOF {
			once.Do(func() { conn.Close() })
		}
	}()
	for {
		kind, p, err := fc.read()
		if err != nil {
			if ctx.Err() != nil {
				return 0, context.Cause(ctx)
			}
			if closeAtEOF {
				return 0, nil
			}
			return 0, fmt.Errorf("stream ended early: %w", err)
		}
		switch kind {
		case frameStdout:
			_, err = out.Write(p)
		case frameStderr:
			_, err = errOut.Write(p)
		case frameExit:
			if len(p) != 4 {
				return 0, errors.New("stream: short exit frame")
			}
			return int(int32(binary.BigEndian.Uint32(p))), nil
		case frameError:
			return 0, errors.New(string(p))
		}
		if err != nil {
			return 0, err
		}
	}
}
