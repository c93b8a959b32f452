package glancebridge

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/novalet/novalet"
)

func TestDecideKind(t *testing.T) {
	const app, machine = novalet.KindApplication, novalet.KindMachine
	for _, c := range []struct {
		name      string
		init      string
		entry     []string
		cmd       []string
		hasConfig bool
		props     map[string]string
		kind      novalet.Kind
		want      string // the command, or what the refusal says
	}{
		{"command", "", []string{"/a"}, []string{"b"}, true, nil, app, "/a b"},
		{"command in an image with an init", "/sbin/init", nil, []string{"/a"}, true, nil, app, "/a"},
		{"command that is an init", "/sbin/init", nil, []string{"/sbin/init"}, true, nil, machine, "/sbin/init"},
		{"systemd", "", nil, []string{"/lib/systemd/systemd", "--x"}, true, nil, machine, "/lib/systemd/systemd --x"},
		{"no command but an init", "/sbin/init", nil, nil, true, nil, machine, ""},
		{"root tar", "/sbin/init", nil, nil, false, nil, machine, ""},
		{"os_command_line", "/sbin/init", []string{"/a"}, nil, true, map[string]string{"os_command_line": `/bin/sh -c "echo 'a b'" \"`}, app, `/bin/sh -c echo 'a b' "`},
		{"os_command_line with an init", "", nil, nil, false, map[string]string{"os_command_line": "/sbin/init"}, machine, "/sbin/init"},
		{"kind says machine", "/sbin/init", nil, []string{"/a"}, true, map[string]string{"novalet_kind": "machine"}, machine, "/a"},
		{"kind says application", "/sbin/init", nil, []string{"/sbin/init"}, true, map[string]string{"novalet_kind": "Application "}, app, "/sbin/init"},
		{"nothing to run", "", nil, nil, true, nil, "", "neither a command nor an init"},
		{"root tar without init", "", nil, nil, false, nil, "", "os_command_line is not set"},
		{"application without a command", "/sbin/init", nil, nil, true, map[string]string{"novalet_kind": "application"}, "", "has no command"},
		{"unknown kind", "/sbin/init", nil, nil, true, map[string]string{"novalet_kind": "vm"}, "", "neither application nor machine"},
		{"open quote", "/sbin/init", nil, nil, true, map[string]string{"os_command_line": "sh -c 'x"}, "", "quote"},
	} {
		img := &novalet.Image{ID: "i", Init: c.init, Config: novalet.ImageConfig{Entrypoint: c.entry, Cmd: c.cmd}}
		err := decideKind(img, c.hasConfig, c.props)
		if c.kind == "" {
			if !strings.Contains(novalet.FaultText(err), c.want) {
				t.Errorf("%s: got %v, want %q", c.name, err, c.want)
			}
			continue
		}
		got := strings.Join(append(slices.Clone(img.Config.Entrypoint), img.Config.Cmd...), " ")
		if err != nil || img.Kind != c.kind || got != c.want {
			t.Errorf("%s: got %s %q, %v", c.name, img.Kind, got, err)
		}
	}
}

// TestPropertyMendsImage: the layers of an image without a command are kept, and boot once the property is set.
func TestPropertyMendsImage(t *testing.T) {
	images := t.TempDir()
	id := addImage(t, images, dockerArchive(t, map[string]any{}, makeTar(t, member{name: "x", data: "x"})), nil)
	s := openStore(t, images, nil)
	_, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "a"})
	wantRefused(t, err, "neither a command nor an init")
	if l, _ := s.List(context.Background()); len(l) != 1 || len(l[0].UsedBy) != 0 {
		t.Errorf("list is %+v", l)
	}
	img, err := s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: id, InstanceUUID: "a",
		Meta: novalet.ImageMeta{Properties: map[string]string{"os_command_line": "/x"}}})
	if err != nil || img.Config.Cmd[0] != "/x" {
		t.Errorf("got %+v, %v", img, err)
	}
}
