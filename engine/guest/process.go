package guest

import (
	"errors"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environ completes the environment with what programs expect.
func environ(env []string, id *ids, tty bool) []string {
	out := make([]string, 0, len(env)+4)
	seen := map[string]bool{}
	for _, e := range env {
		k, _, ok := strings.Cut(e, "=")
		if !ok || k == "" || strings.ContainsRune(e, 0) {
			continue
		}
		seen[k] = true
		out = append(out, e)
	}
	add := func(k, v string) {
		if !seen[k] && v != "" {
			out = append(out, k+"="+v)
		}
	}
	add("PATH", defaultPath)
	add("HOME", id.home)
	if tty {
		add("TERM", "xterm")
	}
	host, _ := os.Hostname()
	add("HOSTNAME", host)
	return out
}

func getenv(env []string, key string) string {
	for _, e := range env {
		if k, v, ok := strings.Cut(e, "="); ok && k == key {
			return v
		}
	}
	return ""
}

// lookPath finds a command inside, as a shell would; cwd is where relative names start.
func lookPath(name, cwd string, env []string) (string, error) {
	missing := fault("the image has no command %q: set the image property os_command_line to one that it has", name)
	if strings.ContainsRune(name, '/') {
		p := name
		if !path.IsAbs(p) {
			p = path.Join(cwd, p)
		}
		switch err := executable(p); {
		case err == nil:
			return p, nil
		case errors.Is(err, unix.EACCES):
			return "", fault("the command %q of the image is not executable: make it so, or set the image property os_command_line", name)
		}
		return "", missing
	}
	var denied bool
	for dir := range strings.SplitSeq(getenv(env, "PATH"), ":") {
		if dir == "" {
			dir = "."
		}
		p := path.Join(dir, name)
		if !path.IsAbs(p) {
			p = path.Join(cwd, p)
		}
		err := executable(p)
		if err == nil {
			return p, nil
		}
		denied = denied || errors.Is(err, unix.EACCES)
	}
	if denied {
		return "", fault("the command %q of the image is not executable: make it so, or set the image property os_command_line", name)
	}
	return "", missing
}

func executable(p string) error {
	var st unix.Stat_t
	if err := unix.Stat(p, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o111 == 0 {
		return unix.EACCES
	}
	return nil
}

// execFault explains why a program did not start.
func execFault(name string, err error) error {
	switch {
	case errors.Is(err, unix.ENOEXEC):
		return fault("the command %q of the image is no program for this machine's architecture", name)
	case errors.Is(err, unix.ENOENT):
		return fault("the command %q of the image needs an interpreter or loader that the image does not have", name)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fault("the command %q of the image may not be run by its user", name)
	case errors.Is(err, unix.E2BIG):
		return fault("the command line and environment of %q are too long", name)
	}
	return err
}

// openCwd makes sure that the working directory exists and returns its clean path.
func openCwd(dir string) (string, error) {
	dir = path.Clean("/" + dir)
	rootfd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(rootfd)
	fd, err := parent(rootfd, dir)
	if err != nil {
		return "", fault("the working directory %q cannot be used: it is not a directory of the image", dir)
	}
	unix.Close(fd)
	return dir, nil
}

// resolved is a process with everything looked up inside.
type resolved struct {
	path, cwd string
	args, env []string
	id        *ids
}

// resolve looks up user, working directory and command in the root of this process.
func resolve(p *wire.Process, tty bool) (*resolved, error) {
	if len(p.Args) == 0 || p.Args[0] == "" {
		return nil, fault("the image names no command: set the image property os_command_line")
	}
	for _, a := range p.Args {
		if strings.ContainsRune(a, 0) {
			return nil, fault("the command line holds a zero byte")
		}
	}
	rootfd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(rootfd)
	id, err := lookupUser(p.User, readEtc(rootfd, "etc/passwd"), readEtc(rootfd, "etc/group"))
	if err != nil {
		return nil, err
	}
	r := &resolved{args: p.Args, id: id, env: environ(p.Env, id, tty)}
	if r.cwd, err = openCwd(p.Cwd); err != nil {
		return nil, err
	}
	if r.path, err = lookPath(p.Args[0], r.cwd, r.env); err != nil {
		return nil, err
	}
	return r, nil
}
