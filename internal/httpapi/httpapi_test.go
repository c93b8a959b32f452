package httpapi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/novalet/novalet"
)

// runtime is a Runtime of one container, "a".
type runtime struct{ novalet.Runtime }

func (runtime) List(context.Context) ([]novalet.ContainerStatus, error) {
	return []novalet.ContainerStatus{{ID: "a", State: novalet.ContainerRunning, PID: 7}, {ID: "stray", State: novalet.ContainerStopped}}, nil
}

func (runtime) ConsoleLog(_ context.Context, id string, max int) ([]byte, error) {
	if id != "a" {
		return nil, novalet.ErrNotFound
	}
	b := []byte("hello console")
	return b[len(b)-min(max, len(b)):], nil
}

func (runtime) Exec(ctx context.Context, id string, e *novalet.ExecSpec) (int, error) {
	if id != "a" {
		return 0, novalet.ErrNotFound
	}
	if e.Process.Args[0] == "sleep" {
		<-ctx.Done()
		return 0, ctx.Err()
	}
	b, err := io.ReadAll(e.Stdin)
	if err != nil {
		return 0, err
	}
	_, _ = e.Stdout.Write(bytes.ToUpper(b))
	_, _ = io.WriteString(e.Stderr, strings.Join(e.Process.Args, " "))
	return -3, nil
}

// echoTerm gives back what is typed.
type echoTerm struct {
	io.Reader
	*io.PipeWriter
}

func (t echoTerm) Resize(rows, cols uint16) error {
	_, err := t.Write([]byte{byte('0' + rows), byte('0' + cols)})
	return err
}

func (runtime) Console(context.Context, string) (novalet.Terminal, error) {
	r, w := io.Pipe()
	return echoTerm{r, w}, nil
}

type compute struct{ novalet.Compute }

func (compute) Tracked() []novalet.TrackedInstance {
	return []novalet.TrackedInstance{{Instance: novalet.Instance{UUID: "a", DisplayName: "web", VMState: novalet.VMActive,
		NetworkInfo: novalet.NetworkInfo{{Network: novalet.VIFNetwork{Subnets: []novalet.Subnet{{IPs: []novalet.FixedIP{{Address: "10.0.0.5"}}}}}}}}}}
}

func listen(t *testing.T) (*Server, *Client) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "novalet.sock")
	s, err := Listen(Options{Path: path, Compute: compute{}, Runtime: runtime{}, Metrics: prometheus.NewRegistry(),
		Health: func() Health { return Health{Status: "degraded", Reasons: map[string]string{"bus": "away"}} },
		Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return s, &Client{Path: path}
}

func TestViews(t *testing.T) {
	defer goleak.VerifyNone(t)
	s, c := listen(t)
	defer s.Close()
	ctx := t.Context()
	if st, err := os.Stat(c.Path); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("socket mode: %v, %v", st, err)
	}
	h, err := c.Health(ctx)
	if err != nil || h.Status != "degraded" || h.Reasons["bus"] != "away" {
		t.Fatalf("health: %+v, %v", h, err)
	}
	v, err := c.Instances(ctx)
	if err != nil || len(v) != 2 {
		t.Fatalf("instances: %+v, %v", v, err)
	}
	if v[0].Name != "web" || v[0].PID != 7 || v[0].Addresses[0] != "10.0.0.5" || v[1].UUID != "stray" || v[1].VMState != "unknown" {
		t.Fatalf("instances: %+v", v)
	}
	b, err := c.Log(ctx, "a", 7)
	if err != nil || string(b) != "console" {
		t.Fatalf("log: %q, %v", b, err)
	}
	if _, err := c.Log(ctx, "b", 7); !errors.Is(err, novalet.ErrNotFound) {
		t.Fatalf("log of an unknown instance: %v", err)
	}
	if _, err := Listen(s.opts); err == nil {
		t.Fatal("a second agent took the socket of a living one")
	}
}

func TestExec(t *testing.T) {
	defer goleak.VerifyNone(t)
	s, c := listen(t)
	defer s.Close()
	var out, errOut bytes.Buffer
	code, err := c.Exec(t.Context(), "a", novalet.ProcessSpec{Args: []string{"tr", "x"}}, false, strings.NewReader("abc"), &out, &errOut)
	if err != nil || code != -3 || out.String() != "ABC" || errOut.String() != "tr x" {
		t.Fatalf("exec: %d %q %q %v", code, out.String(), errOut.String(), err)
	}
	if _, err := c.Exec(t.Context(), "b", novalet.ProcessSpec{Args: []string{"true"}}, false, strings.NewReader(""), &out, &errOut); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Fatalf("exec in an unknown instance: %v", err)
	}
	if _, err := c.Exec(t.Context(), "a", novalet.ProcessSpec{}, false, strings.NewReader(""), &out, &errOut); err == nil || !strings.Contains(err.Error(), "want a command") {
		t.Fatalf("exec without a command: %v", err)
	}
}

func TestConsole(t *testing.T) {
	defer goleak.VerifyNone(t)
	s, c := listen(t)
	defer s.Close()
	in, typed := io.Pipe()
	r, out := io.Pipe()
	done := make(chan error)
	go func() { done <- c.Console(t.Context(), "a", 3, 4, in, out) }()
	if _, err := typed.Write([]byte("ls")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(r, got); err != nil || string(got) != "34ls" {
		t.Fatalf("console: %q, %v", got, err)
	}
	typed.Close()
	if err := <-done; err != nil {
		t.Fatalf("console ends: %v", err)
	}
}

// TestCloseEndsStreams: an agent that stops does not wait for somebody's shell.
func TestCloseEndsStreams(t *testing.T) {
	defer goleak.VerifyNone(t)
	s, c := listen(t)
	in, typed := io.Pipe()
	done := make(chan error)
	go func() {
		_, err := c.Exec(t.Context(), "a", novalet.ProcessSpec{Args: []string{"sleep"}}, false, in, io.Discard, io.Discard)
		done <- err
	}()
	if _, err := typed.Write([]byte("x")); err != nil { // the stream is up when this is taken
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err == nil {
			t.Fatal("exec reports success though the agent closed")
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the stream is still open")
	}
	typed.Close()
}

func TestNoAgent(t *testing.T) {
	c := &Client{Path: filepath.Join(t.TempDir(), "none.sock")}
	if _, err := c.Instances(t.Context()); !errors.Is(err, ErrNoAgent) {
		t.Fatalf("want ErrNoAgent, got %v", err)
	}
}
