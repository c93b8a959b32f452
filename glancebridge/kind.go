package glancebridge

import (
	"path"
	"slices"
	"strings"

	"github.com/novalet/novalet"
)

// The image properties that decide how an image is run.
const (
	propKind    = "novalet_kind"
	propCommand = "os_command_line"
)

// initPrograms are commands that are a machine's init, not an application.
var initPrograms = []string{"/sbin/init", "/usr/sbin/init", "/bin/init", "/usr/bin/init", "/lib/systemd/systemd",
	"/usr/lib/systemd/systemd", "/bin/systemd", "/usr/bin/systemd", "/sbin/openrc-init"}

// decideKind settles what of an image is run, and how. docs/images.md states the rules for users:
//
//  1. os_command_line replaces the image's command.
//  2. novalet_kind, "application" or "machine", decides over the kind.
//  3. A command that is an init makes a machine; any other command an application.
//  4. Without a command an image that has an init is a machine; one that has none cannot be booted.
func decideKind(img *novalet.Image, hasConfig bool, props map[string]string) error {
	if line := strings.TrimSpace(props[propCommand]); line != "" {
		args, ok := splitCommand(line)
		if !ok || len(args) == 0 {
			return refused(img.ID, "the image property os_command_line has a quote that does not end; correct the property")
		}
		img.Config.Entrypoint, img.Config.Cmd = nil, args
	}
	command := append(slices.Clone(img.Config.Entrypoint), img.Config.Cmd...)
	kind := novalet.Kind(strings.ToLower(strings.TrimSpace(props[propKind])))
	switch kind {
	case "":
		switch {
		case len(command) > 0 && slices.Contains(initPrograms, path.Clean(command[0])):
			kind = novalet.KindMachine
		case len(command) > 0:
			kind = novalet.KindApplication
		default:
			kind = novalet.KindMachine
		}
	case novalet.KindApplication, novalet.KindMachine:
	default:
		return refused(img.ID, "the image property novalet_kind is neither application nor machine; correct the property")
	}
	switch {
	case kind == novalet.KindMachine && img.Init == "" && len(command) == 0 && hasConfig:
		return refused(img.ID, "the image has neither a command nor an init (/sbin/init); set the image property os_command_line, "+
			"or CMD in its Dockerfile")
	case kind == novalet.KindMachine && img.Init == "" && len(command) == 0:
		return refused(img.ID, "the image has no init (/sbin/init) and the image property os_command_line is not set; set it to the "+
			"command to run")
	case kind == novalet.KindApplication && len(command) == 0:
		return refused(img.ID, "the image is to run as an application but has no command; set the image property os_command_line")
	}
	if kind == novalet.KindMachine && len(command) > 0 && slices.Contains(initPrograms, path.Clean(command[0])) && img.Init == "" {
		img.Init = path.Clean(command[0])
	}
	img.Kind = kind
	return nil
}

// splitCommand splits a command line as a shell does, with quotes and backslashes but without expansion.
func splitCommand(s string) (args []string, ok bool) {
	var b strings.Builder
	in := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case ' ', '\t', '\n':
			if in {
				args = append(args, b.String())
				b.Reset()
				in = false
			}
		case '\'':
			end := strings.IndexByte(s[i+1:], '\'')
			if end < 0 {
				return nil, false
			}
			b.WriteString(s[i+1 : i+1+end])
			i += end + 1
			in = true
		case '"':
			closed := false
			for i++; i < len(s); i++ {
				if s[i] == '"' {
					closed = true
					break
				}
				if s[i] == '\\' && i+1 < len(s) && strings.IndexByte("\"\\$`", s[i+1]) >= 0 {
					i++
				}
				b.WriteByte(s[i])
			}
			if !closed {
				return nil, false
			}
			in = true
		case '\\':
			if i+1 == len(s) {
				return nil, false
			}
			i++
			b.WriteByte(s[i])
			in = true
		default:
			b.WriteByte(c)
			in = true
		}
	}
	if in {
		args = append(args, b.String())
	}
	return args, true
}
