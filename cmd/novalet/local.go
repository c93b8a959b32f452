package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/httpapi"
)

// defaultSocket is where an agent without a [novalet] socket option listens.
const defaultSocket = "/run/novalet/novalet.sock"

func isNotFound(err error) bool { return errors.Is(err, novalet.ErrNotFound) }

func socketFlag(fs *pflag.FlagSet) {
	def := defaultSocket
	if s := os.Getenv("NOVALET_SOCKET"); s != "" {
		def = s
	}
	fs.String("socket", def, "the agent's local socket (or NOVALET_SOCKET)")
}

func client(fs *pflag.FlagSet) *httpapi.Client {
	s, _ := fs.GetString("socket")
	return &httpapi.Client{Path: s}
}

func usageError(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// resolve turns a uuid, an unambiguous prefix of one, or a name into a uuid.
func resolve(ctx context.Context, c *httpapi.Client, what string) (string, error) {
	list, err := c.Instances(ctx)
	if err != nil {
		return "", err
	}
	var hits []string
	for _, v := range list {
		if v.UUID == what {
			return what, nil
		}
		if v.Name == what || (len(what) >= 4 && strings.HasPrefix(v.UUID, what)) {
			hits = append(hits, v.UUID)
		}
	}
	switch len(hits) {
	case 0:
		return "", fmt.Errorf("no instance %q on this host (`novalet ps` lists them): %w", what, novalet.ErrNotFound)
	case 1:
		return hits[0], nil
	}
	return "", usageError("%q may be any of %s: give the uuid", what, strings.Join(hits, ", "))
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func psCommand() *command {
	return &command{name: "ps", summary: "List the instances of this host", complete: "",
		long: "An instance that runs here but that Nova does not know of is listed as \"unknown\".",
		flags: func(fs *pflag.FlagSet) {
			fs.Bool("json", false, "print JSON")
			fs.BoolP("quiet", "q", false, "print uuids only")
			socketFlag(fs)
		},
		run: func(ctx context.Context, fs *pflag.FlagSet) error {
			list, err := client(fs).Instances(ctx)
			if err != nil {
				return err
			}
			if on, _ := fs.GetBool("json"); on {
				return printJSON(list)
			}
			if on, _ := fs.GetBool("quiet"); on {
				for _, v := range list {
					fmt.Println(v.UUID)
				}
				return nil
			}
			w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "UUID\tNAME\tSTATE\tTASK\tCONTAINER\tPID\tUP\tADDRESSES")
			for _, v := range list {
				up, pid := "-", "-"
				if v.State == string(novalet.ContainerRunning) && !v.StartedAt.IsZero() {
					up = time.Since(v.StartedAt).Truncate(time.Second).String()
				}
				if v.PID != 0 {
					pid = fmt.Sprint(v.PID)
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", v.UUID, printable(v.Name), v.VMState, dash(string(v.TaskState)),
					v.State, pid, up, dash(strings.Join(v.Addresses, ",")))
			}
			return w.Flush()
		}}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// printable keeps a tenant's text from steering the operator's terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return '?'
		}
		return r
	}, s)
}

func logsCommand() *command {
	return &command{name: "logs", args: "INSTANCE", summary: "Print an instance's console log", complete: "instance",
		long: "INSTANCE is a uuid, the beginning of one, or a name. The log is printed as the instance wrote it;\n" +
			"on a terminal, control characters other than tab and newline are left out (--raw keeps them).",
		flags: func(fs *pflag.FlagSet) {
			fs.IntP("bytes", "n", 1<<20, "at most so many bytes of the end")
			fs.BoolP("follow", "f", false, "go on until interrupted")
			fs.Bool("raw", false, "keep control characters")
			socketFlag(fs)
		},
		run: runLogs}
}

func runLogs(ctx context.Context, fs *pflag.FlagSet) error {
	if fs.NArg() != 1 {
		return usageError("want one instance")
	}
	c := client(fs)
	id, err := resolve(ctx, c, fs.Arg(0))
	if err != nil {
		return err
	}
	n, _ := fs.GetInt("bytes")
	raw, _ := fs.GetBool("raw")
	_, termErr := unix.IoctlGetTermios(1, unix.TCGETS)
	clean := termErr == nil && !raw
	if on, _ := fs.GetBool("follow"); on {
		var out interface{ Write([]byte) (int, error) } = os.Stdout
		if clean {
			out = cleaner{os.Stdout}
		}
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		defer r.Close()
		defer w.Close()
		err = c.Console(ctx, id, 0, 0, r, out)
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	b, err := c.Log(ctx, id, n)
	if err != nil {
		return err
	}
	if clean {
		_, err = cleaner{os.Stdout}.Write(b)
	} else {
		_, err = os.Stdout.Write(b)
	}
	return err
}

// cleaner drops what could steer a terminal.
type cleaner struct{ f *os.File }

func (c cleaner) Write(p []byte) (int, error) {
	out := make([]byte, 0, len(p))
	for _, b := range p {
		if b >= ' ' && b != 0x7f || b == '\n' || b == '\t' {
			out = append(out, b)
		}
	}
	_, err := c.f.Write(out)
	return len(p), err
}

func consoleCommand() *command {
	return &command{name: "console", args: "INSTANCE", summary: "Open an instance's console", complete: "instance",
		long:  "Leave it with Ctrl-] . Others may look on at the same time.",
		flags: socketFlag,
		run: func(ctx context.Context, fs *pflag.FlagSet) error {
			if fs.NArg() != 1 {
				return usageError("want one instance")
			}
			c := client(fs)
			id, err := resolve(ctx, c, fs.Arg(0))
			if err != nil {
				return err
			}
			restore, rows, cols := rawTerminal()
			defer restore()
			return c.Console(ctx, id, rows, cols, escapeReader{os.Stdin}, os.Stdout)
		}}
}

// escapeReader ends at Ctrl-].
type escapeReader struct{ f *os.File }

func (r escapeReader) Read(p []byte) (int, error) {
	n, err := r.f.Read(p)
	for i := range n {
		if p[i] == 0x1d {
			return i, errEscape
		}
	}
	return n, err
}

var errEscape = errors.New("left by Ctrl-]")

// rawTerminal puts the terminal into raw mode, if there is one, and returns how to undo that and its size.
func rawTerminal() (restore func(), rows, cols uint16) {
	old, err := unix.IoctlGetTermios(0, unix.TCGETS)
	if err != nil {
		return func() {}, 0, 0
	}
	raw := *old
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(0, unix.TCSETS, &raw); err != nil {
		return func() {}, 0, 0
	}
	if ws, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ); err == nil {
		rows, cols = ws.Row, ws.Col
	}
	return func() { _ = unix.IoctlSetTermios(0, unix.TCSETS, old) }, rows, cols
}

func execCommand() *command {
	return &command{name: "exec", args: "INSTANCE COMMAND [ARGUMENTS]", summary: "Run a command inside an instance", complete: "instance",
		long: "The exit code is the command's own. The command runs with the instance's limits and rights.",
		flags: func(fs *pflag.FlagSet) {
			fs.BoolP("tty", "t", false, "give it a terminal")
			fs.StringP("user", "u", "", "user[:group] inside, names or numbers")
			fs.StringP("workdir", "w", "", "working directory inside")
			fs.StringArrayP("env", "e", nil, "KEY=value for its environment (repeatable)")
			socketFlag(fs)
		},
		run: func(ctx context.Context, fs *pflag.FlagSet) error {
			if fs.NArg() < 2 {
				return usageError("want an instance and a command")
			}
			c := client(fs)
			id, err := resolve(ctx, c, fs.Arg(0))
			if err != nil {
				return err
			}
			p := novalet.ProcessSpec{Args: fs.Args()[1:]}
			p.User, _ = fs.GetString("user")
			p.Cwd, _ = fs.GetString("workdir")
			p.Env, _ = fs.GetStringArray("env")
			tty, _ := fs.GetBool("tty")
			restore := func() {}
			if tty {
				restore, _, _ = rawTerminal()
			}
			code, err := c.Exec(ctx, id, p, tty, os.Stdin, os.Stdout, os.Stderr)
			restore()
			if err != nil {
				return err
			}
			if code != 0 {
				return &exitError{code: code}
			}
			return nil
		}}
}

func healthCommand() *command {
	return &command{name: "health", summary: "Say how the agent of this host is",
		long: "Exit code 0 when all is well, 1 when something is away (the reason is printed), 3 when no agent answers.",
		flags: func(fs *pflag.FlagSet) {
			fs.Bool("metrics", false, "print the metrics, in the Prometheus format, instead")
			socketFlag(fs)
		},
		run: func(ctx context.Context, fs *pflag.FlagSet) error {
			c := client(fs)
			if on, _ := fs.GetBool("metrics"); on {
				b, err := c.Metrics(ctx)
				if err == nil {
					_, err = os.Stdout.Write(b)
				}
				return err
			}
			h, err := c.Health(ctx)
			if err != nil {
				return err
			}
			fmt.Printf("%s (version %s)\n", h.Status, h.Version)
			for part, why := range h.Reasons {
				fmt.Printf("  %s: %s\n", part, why)
			}
			if h.Status != "ok" {
				return &exitError{code: exitFailed}
			}
			return nil
		}}
}

func versionCommand() *command {
	return &command{name: "version", summary: "Print the version", run: func(context.Context, *pflag.FlagSet) error {
		fmt.Println("novalet", version)
		return nil
	}}
}
