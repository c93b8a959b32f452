// Package httpapi is the agent's local interface: HTTP on a unix socket that only root can open, with health,
// metrics in the Prometheus format, views of instances and images, and streams to a console or a process
// inside an instance. Server owns the socket file and one goroutine per connection; Client is what the
// command line uses. Nothing here is reachable from the network or from an instance.
package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"sync"
	"time"

	"github.com/labstack/echo/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/novalet/novalet"
)

// streamProtocol is the Upgrade token of console and exec.
const streamProtocol = "novalet-stream/1"

// Health is what GET /health answers.
type Health struct {
	// Status is "ok", or "degraded" when a reason below is set.
	Status  string            `json:"status"`
	Version string            `json:"version"`
	Reasons map[string]string `json:"reasons,omitempty"` // by part: bus, conductor, …
}

// InstanceView is one line of `novalet ps`.
type InstanceView struct {
	UUID      string            `json:"uuid"`
	Name      string            `json:"name"`
	VMState   novalet.VMState   `json:"vm_state"`
	TaskState novalet.TaskState `json:"task_state"`
	State     string            `json:"state"` // the container's, or "absent"
	PID       int               `json:"pid,omitempty"`
	StartedAt time.Time         `json:"started_at,omitzero"`
	OOMKills  int64             `json:"oom_kills,omitempty"`
	Flavor    string            `json:"flavor"`
	Addresses []string          `json:"addresses"`
}

// Options are what the server shows.
type Options struct {
	Path    string // of the socket; its folder is made 0700
	Compute novalet.Compute
	Runtime novalet.Runtime
	Images  novalet.ImageStore
	Health  func() Health
	Metrics prometheus.Gatherer
	Logger  *slog.Logger
}

// Server serves one socket.
type Server struct {
	opts Options
	ln   net.Listener
	http *http.Server
	stop context.CancelFunc
	wg   sync.WaitGroup // the accepting goroutine
	// streams counts hijacked connections, which http.Server.Close does not know of.
	streams sync.WaitGroup
}

// Listen takes the socket and serves until Close. A socket left by a dead agent is replaced; one that answers is
// an error, since two agents must not share a host's state.
func Listen(o Options) (*Server, error) {
	if err := os.MkdirAll(filepath.Dir(o.Path), 0o700); err != nil {
		return nil, fmt.Errorf("make folder of the local socket: %w", err)
	}
	if c, err := net.DialTimeout("unix", o.Path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another agent answers there", o.Path)
	}
	if err := os.Remove(o.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old local socket: %w", err)
	}
	ln, err := net.Listen("unix", o.Path)
	if err != nil {
		return nil, fmt.Errorf("listen on the local socket: %w", err)
	}
	if err := os.Chmod(o.Path, 0o600); err != nil {
		ln.Close()
		return nil, fmt.Errorf("restrict the local socket: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Server{opts: o, ln: ln, stop: cancel}
	s.http = &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: 10 * time.Second,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(o.Logger.Handler(), slog.LevelDebug),
	}
	s.wg.Go(func() {
		if err := s.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			o.Logger.Error("serve the local socket", "error", err)
		}
	})
	return s, nil
}

// Close ends every connection, streams too, and removes the socket.
func (s *Server) Close() error {
	s.stop()
	err := s.http.Close()
	s.wg.Wait()
	s.streams.Wait()
	return err
}

func (s *Server) routes() http.Handler {
	e := echo.New()
	e.Logger = s.opts.Logger
	e.HTTPErrorHandler = func(c *echo.Context, err error) {
		code := http.StatusInternalServerError
		var he *echo.HTTPError
		switch {
		case errors.As(err, &he):
			code = he.Code
		case errors.Is(err, novalet.ErrNotFound):
			code = http.StatusNotFound
		case errors.Is(err, novalet.ErrInvalidState), errors.Is(err, novalet.ErrBusy):
			code = http.StatusConflict
		}
		_ = c.JSON(code, map[string]string{"error": err.Error()})
	}
	e.GET("/health", s.health)
	e.GET("/metrics", func(c *echo.Context) error {
		promhttp.HandlerFor(s.opts.Metrics, promhttp.HandlerOpts{}).ServeHTTP(c.Response(), c.Request())
		return nil
	})
	e.GET("/v1/instances", s.instances)
	e.GET("/v1/instances/:id/log", s.log)
	e.POST("/v1/instances/:id/console", s.console)
	e.POST("/v1/instances/:id/exec", s.exec)
	e.GET("/v1/images", s.images)
	e.POST("/v1/images/collect", s.collect)
	e.POST("/v1/images/verify", s.verify)
	return e
}

func (s *Server) health(c *echo.Context) error {
	h := s.opts.Health()
	code := http.StatusOK
	if h.Status != "ok" {
		code = http.StatusServiceUnavailable
	}
	return c.JSON(code, h)
}

func (s *Server) instances(c *echo.Context) error {
	list, err := s.opts.Runtime.List(c.Request().Context())
	if err != nil {
		return err
	}
	byID := make(map[string]novalet.ContainerStatus, len(list))
	for _, st := range list {
		byID[st.ID] = st
	}
	views := []InstanceView{}
	for _, t := range s.opts.Compute.Tracked() {
		i := t.Instance
		v := InstanceView{UUID: i.UUID, Name: i.DisplayName, VMState: i.VMState, TaskState: i.TaskState,
			Flavor: i.Flavor.Name, State: "absent", Addresses: []string{}}
		if st, ok := byID[i.UUID]; ok {
			v.State, v.PID, v.StartedAt, v.OOMKills = string(st.State), st.PID, st.StartedAt, st.OOMKills
			delete(byID, i.UUID)
		}
		for _, vif := range i.NetworkInfo {
			for _, sn := range vif.Network.Subnets {
				for _, ip := range sn.IPs {
					v.Addresses = append(v.Addresses, ip.Address)
				}
			}
		}
		views = append(views, v)
	}
	// What runs here and Nova does not know of is shown too: that is what somebody looks for.
	for _, st := range byID {
		views = append(views, InstanceView{UUID: st.ID, State: string(st.State), PID: st.PID, StartedAt: st.StartedAt,
			VMState: "unknown", Addresses: []string{}})
	}
	sort.Slice(views, func(a, b int) bool { return views[a].UUID < views[b].UUID })
	return c.JSON(http.StatusOK, views)
}

func (s *Server) log(c *echo.Context) error {
	limit := 1 << 20
	if t := c.QueryParam("bytes"); t != "" {
		n, err := strconv.Atoi(t)
		if err != nil || n < 0 {
			return echo.NewHTTPError(http.StatusBadRequest, "bytes: want a number from 0")
		}
		limit = n
	}
	b, err := s.opts.Runtime.ConsoleLog(c.Request().Context(), c.Param("id"), limit)
	if err != nil {
		return err
	}
	return c.Blob(http.StatusOK, "application/octet-stream", b)
}

func (s *Server) images(c *echo.Context) error {
	list, err := s.opts.Images.List(c.Request().Context())
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, list)
}

func (s *Server) collect(c *echo.Context) error {
	n, err := s.opts.Images.Collect(c.Request().Context())
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, map[string]int64{"bytes": n})
}

func (s *Server) verify(c *echo.Context) error {
	list, err := s.opts.Images.Verify(c.Request().Context(), c.QueryParam("heal") == "1")
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, list)
}

// hijack answers 101 and hands over the connection.
func hijack(c *echo.Context) (net.Conn, *frameConn, error) {
	if c.Request().Header.Get("Upgrade") != streamProtocol {
		return nil, nil, echo.NewHTTPError(http.StatusUpgradeRequired, "want Upgrade: "+streamProtocol)
	}
	// What is left of the body would be read as the first frame.
	if _, err := io.Copy(io.Discard, io.LimitReader(c.Request().Body, maxFrame)); err != nil {
		return nil, nil, err
	}
	conn, buf, err := http.NewResponseController(c.Response()).Hijack()
	if err != nil {
		return nil, nil, fmt.Errorf("take over the connection: %w", err)
	}
	_, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", streamProtocol)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	rw := struct {
		io.Reader
		io.Writer
	}{buf.Reader, conn}
	return conn, &frameConn{rw: rw}, nil
}

func (s *Server) console(c *echo.Context) error {
	s.streams.Add(1)
	defer s.streams.Done()
	ctx, cancel := context.WithCancel(c.Request().Context())
	defer cancel()
	term, err := s.opts.Runtime.Console(ctx, c.Param("id"))
	if err != nil {
		return err
	}
	defer term.Close()
	conn, fc, err := hijack(c)
	if err != nil {
		return err
	}
	defer conn.Close()
	stopped := context.AfterFunc(ctx, func() { conn.Close(); term.Close() })
	defer stopped()
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = io.Copy(frameWriter{fc, frameStdout}, term)
		_ = fc.write(frameExit, []byte{0, 0, 0, 0})
		conn.Close()
	})
	for err == nil {
		var kind byte
		var p []byte
		kind, p, err = fc.read()
		switch {
		case err != nil:
		case kind == frameEOF:
			err = io.EOF
		case kind == frameStdin:
			_, err = term.Write(p)
		case kind == frameResize:
			if rows, cols, ok := parseSize(p); ok {
				_ = term.Resize(rows, cols)
			}
		}
	}
	term.Close()
	conn.Close()
	wg.Wait()
	return nil
}

// execRequest is the body of POST …/exec.
type execRequest struct {
	Process novalet.ProcessSpec `json:"process"`
	TTY     bool                `json:"tty"`
}

func (s *Server) exec(c *echo.Context) error {
	s.streams.Add(1)
	defer s.streams.Done()
	var r execRequest
	if err := json.NewDecoder(io.LimitReader(c.Request().Body, maxFrame)).Decode(&r); err != nil {
		return echo.NewHTTPError(http.StatusBadRequest, "body: "+err.Error())
	}
	if len(r.Process.Args) == 0 {
		return echo.NewHTTPError(http.StatusBadRequest, "process.args: want a command")
	}
	ctx, cancel := context.WithCancel(c.Request().Context())
	defer cancel()
	conn, fc, err := hijack(c)
	if err != nil {
		return err
	}
	defer conn.Close()
	stopped := context.AfterFunc(ctx, func() { conn.Close() })
	defer stopped()
	stdin, typed := io.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel()
		defer typed.Close()
		for {
			kind, p, err := fc.read()
			switch {
			case err != nil:
				return
			case kind == frameStdin:
				if _, err := typed.Write(p); err != nil {
					return
				}
			case kind == frameEOF:
				typed.Close()
			}
		}
	})
	code, err := s.opts.Runtime.Exec(ctx, c.Param("id"), &novalet.ExecSpec{Process: r.Process, TTY: r.TTY,
		Stdin: stdin, Stdout: frameWriter{fc, frameStdout}, Stderr: frameWriter{fc, frameStderr}})
	if err != nil {
		_ = fc.write(frameError, []byte(err.Error()))
	} else {
		_ = fc.write(frameExit, []byte{byte(code >> 24), byte(code >> 16), byte(code >> 8), byte(code)})
	}
	stdin.Close()
	conn.Close()
	wg.Wait()
	return nil
}

func parseSize(p []byte) (rows, cols uint16, ok bool) {
	if len(p) != 4 {
		return 0, 0, false
	}
	return uint16(p[0])<<8 | uint16(p[1]), uint16(p[2])<<8 | uint16(p[3]), true
}
