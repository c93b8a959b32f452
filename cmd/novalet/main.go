// Command novalet is Nova's compute service for containers: `novalet agent` runs on a compute host, the other
// verbs look at it from the same host.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sort"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/novalet/novalet/glancebridge"
	"github.com/novalet/novalet/internal/httpapi"
)

// version is set by the linker.
var version = "0.1.0-dev"

// Exit codes, documented in docs/novalet.1.md.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNoAgent     = 3
	exitNotFound    = 4
	exitConfig      = 5 // an option is missing or wrong
	exitUnsupported = 6 // the host lacks what is needed
)

// exitError carries an exit code to main. A nil err prints nothing.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return fmt.Sprint(e.err) }
func (e *exitError) Unwrap() error { return e.err }

// command is one verb.
type command struct {
	name    string
	args    string // what follows the options, for the usage line
	summary string
	long    string
	flags   func(*pflag.FlagSet)
	run     func(ctx context.Context, fs *pflag.FlagSet) error
	// complete names what the arguments are, for shell completion: "instance" or "".
	complete string
}

func commands() []*command {
	return []*command{agentCommand(), demoCommand(), psCommand(), logsCommand(), consoleCommand(), execCommand(), imagesCommand(),
		healthCommand(), doctorCommand(), completionCommand(), versionCommand()}
}

func main() {
	// The helper that parses images is this program again; it must start before anything else does.
	if len(os.Args) > 1 && os.Args[1] == glancebridge.HelperCommand {
		os.Exit(glancebridge.HelperMain(os.Args[2:]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		usage(stderr)
		return exitUsage
	}
	switch args[0] {
	case "help", "--help", "-h":
		if len(args) > 1 {
			if c := find(args[1]); c != nil {
				fmt.Fprint(stdout, help(c))
				return exitOK
			}
		}
		usage(stdout)
		return exitOK
	case "--version":
		args = []string{"version"}
	}
	c := find(args[0])
	if c == nil {
		fmt.Fprintf(stderr, "novalet: no command %q; `novalet help` lists them\n", args[0])
		return exitUsage
	}
	fs := flagSet(c)
	fs.SetOutput(io.Discard)
	switch err := fs.Parse(args[1:]); {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Fprint(stdout, help(c))
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "novalet %s: %v; `novalet help %s` shows how\n", c.name, err, c.name)
		return exitUsage
	}
	err := c.run(ctx, fs)
	if err == nil {
		return exitOK
	}
	var ee *exitError
	code := exitFailed
	switch {
	case errors.As(err, &ee):
		code = ee.code
		if ee.err == nil {
			return code
		}
	case errors.Is(err, httpapi.ErrNoAgent):
		code = exitNoAgent
	case isNotFound(err):
		code = exitNotFound
	}
	fmt.Fprintf(stderr, "novalet %s: %v\n", c.name, err)
	return code
}

func find(name string) *command {
	for _, c := range commands() {
		if c.name == name {
			return c
		}
	}
	return nil
}

func flagSet(c *command) *pflag.FlagSet {
	fs := pflag.NewFlagSet(c.name, pflag.ContinueOnError)
	fs.SortFlags = false
	// What follows the first argument of exec belongs to the command inside.
	fs.SetInterspersed(c.name != "exec")
	if c.flags != nil {
		c.flags(fs)
	}
	return fs
}

func usage(w io.Writer) {
	fmt.Fprint(w, "novalet runs Linux containers as OpenStack instances.\n\nUsage: novalet COMMAND [OPTIONS] [ARGUMENTS]\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-11s %s\n", c.name, c.summary)
	}
	fmt.Fprint(w, "\n`novalet help COMMAND` shows its options. Exit codes: 0 done, 1 failed, 2 usage, 3 no agent answers,\n4 not found, 5 an option is missing or wrong, 6 the host lacks something.\n")
}

func help(c *command) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: novalet %s", c.name)
	fs := flagSet(c)
	if fs.HasFlags() {
		b.WriteString(" [OPTIONS]")
	}
	if c.args != "" {
		b.WriteString(" " + c.args)
	}
	fmt.Fprintf(&b, "\n\n%s.\n", c.summary)
	if c.long != "" {
		fmt.Fprintf(&b, "\n%s\n", strings.TrimSpace(c.long))
	}
	if fs.HasFlags() {
		fmt.Fprintf(&b, "\nOptions:\n%s", fs.FlagUsagesWrapped(100))
	}
	return b.String()
}

func names() []string {
	var n []string
	for _, c := range commands() {
		n = append(n, c.name)
	}
	sort.Strings(n)
	return n
}
