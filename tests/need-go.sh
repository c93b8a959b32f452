#!/bin/sh
# need-go.sh GO: is this Go new enough? Says in one line what to type when it is not.
go=${1:-go}
want=$(sed -n 's/^go //p' go.mod)
have=$("$go" env GOVERSION 2>/dev/null | sed 's/^go//; s/[^0-9.].*//')
if [ -z "$have" ]; then
    have=none
elif [ "$(printf '%s\n%s\n' "$want" "$have" | sort -V | head -n 1)" = "$want" ]; then
    exit 0
elif [ "$(printf '%s\n%s\n' 1.21 "$have" | sort -V | head -n 1)" = 1.21 ] && [ "$("$go" env GOTOOLCHAIN)" != local ]; then
    exit 0 # fetches the toolchain that go.mod names by itself
fi
echo "needs Go $want, found $have; type: apt-get install -y golang-go && go install golang.org/dl/go$want@latest && ~/go/bin/go$want download && make GO=\$HOME/go/bin/go$want $MAKECMDGOALS" >&2
exit 1
