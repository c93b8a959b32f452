#!/bin/sh
# Makes table_<arch>.go from the constants of golang.org/x/sys/unix. Run by go generate in this folder.
set -eu
dir=$(go list -m -f '{{.Dir}}' golang.org/x/sys)/unix
for arch in amd64 arm64; do
	{
		printf '// Code generated from golang.org/x/sys/unix by gen.sh; DO NOT EDIT.\n\npackage seccomp\n\nimport "golang.org/x/sys/unix"\n\n'
		printf '// numbers are the system calls of this architecture.\nvar numbers = map[string]uint32{\n'
		sed -n 's/^[[:space:]]*SYS_\([A-Z0-9_]*\)[[:space:]]*=.*/\1/p' "$dir/zsysnum_linux_$arch.go" | while read -r n; do
			printf '\t"%s": unix.SYS_%s,\n' "$(printf %s "$n" | tr '[:upper:]' '[:lower:]')" "$n"
		done
		printf '}\n'
	} | gofmt >"table_$arch.go"
done
