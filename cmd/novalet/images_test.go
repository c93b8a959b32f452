package main

import (
	"archive/tar"
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge"
	"github.com/novalet/novalet/internal/httpapi"
)

// TestImagesCommand imports a file, and lists, checks and heals what an agent's store made of it.
func TestImagesCommand(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, data := range map[string]string{"etc/os-release": "ID=x\n", "sbin/init": "#!/bin/sh\n"} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	file, images := filepath.Join(work, "root.tar"), filepath.Join(work, "images")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(want int, args ...string) string {
		t.Helper()
		// The verbs print to the process's own output.
		f, err := os.CreateTemp(work, "out-*")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		stdout := os.Stdout
		os.Stdout = f
		code, _, stderr := cli(t, append([]string{"images"}, args...)...)
		os.Stdout = stdout
		b, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		out := string(b)
		if code != want {
			t.Fatalf("images %v: exit code %d, want %d: %s%s", args, code, want, out, stderr)
		}
		return out + stderr
	}
	id := strings.TrimSpace(run(exitOK, "import", file, "--images", images, "--property", "os_type=linux"))
	if out := run(exitFailed, "import", file, "--images", images); !strings.Contains(out, id) {
		t.Errorf("a second import: %s", out)
	}
	run(exitOK, "import", file, "--images", images, "--name", "another")
	text := filepath.Join(work, "text")
	if err := os.WriteFile(text, []byte("LUKS\xba\xbe is refused"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(exitFailed, "import", text, "--images", images)
	run(exitUsage, "import", "--images", images)
	run(exitUsage, "ls", "--heal")

	glance := glancebridge.NewFileGlance(images)
	list, err := glance.List()
	if err != nil || len(list) != 2 {
		t.Fatalf("the folder holds %+v, %v", list, err)
	}
	store, err := glancebridge.Open(glancebridge.Options{Dir: filepath.Join(work, "store"), Glance: glance, Unconfined: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	img, err := store.Prepare(t.Context(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(work, "s")
	api, err := httpapi.Listen(httpapi.Options{Path: socket, Images: store, Logger: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	at := []string{"--socket", socket}
	if out := run(exitOK, append(at, "tree")...); !strings.Contains(out, id) || !strings.Contains(out, "root.tar") || !strings.Contains(out, img.Layers[0].DiffID) {
		t.Errorf("tree: %s", out)
	}
	if out := run(exitOK, append(at, "verify")...); !strings.Contains(out, "1 layers read") || !strings.Contains(out, "0 corrupt") {
		t.Errorf("verify: %s", out)
	}
	if err := os.Remove(filepath.Join(img.Layers[0].Path, "etc/os-release")); err != nil {
		t.Fatal(err)
	}
	if out := run(exitFailed, append(at, "verify")...); !strings.Contains(out, img.Layers[0].DiffID) || !strings.Contains(out, id) {
		t.Errorf("verify of an altered layer: %s", out)
	}
	if out := run(exitOK, append(at, "verify", "--heal")...); !strings.Contains(out, "fetched again") {
		t.Errorf("verify --heal: %s", out)
	}
	if _, err := os.Stat(filepath.Join(img.Layers[0].Path, "etc/os-release")); err != nil {
		t.Error(err)
	}
	run(exitOK, append(at, "gc")...)
}

func TestPrintProgress(t *testing.T) {
	var b bytes.Buffer
	printImages(&b, []novalet.ImageStatus{{ID: "a", Progress: 25 << 20, Total: 100 << 20}, {ID: "b"}, {ID: "c", LastUsed: time.Now(), Progress: 1, Total: 1}}, false)
	for _, want := range []string{"fetching, 25% of 100.0 MiB", "fetching\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is not in\n%s", want, b.String())
		}
	}
	if strings.Count(b.String(), "fetching") != 2 {
		t.Error(b.String())
	}
}
