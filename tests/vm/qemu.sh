#!/bin/bash
# qemu.sh: print the command of a QEMU that has Intel's igb, a network card with SR-IOV: the host's own, or Debian's
# backport of a newer one. That comes from where the host's own apt takes its packages, signed by Debian, into a folder of
# the cache: nothing of the host's packages or of apt's lists changes. Needs Debian 12, with qemu-system-x86 installed.
set -eu
cache=${VM_QEMU_CACHE:-/var/cache/novalet/qemu}
release=bookworm
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

has_igb() { "$@" -device igb,help 2>/dev/null | grep -q '^igb options'; }

if has_igb qemu-system-x86_64; then
    echo qemu-system-x86_64
    exit 0
fi
mkdir -p "$cache"
exec 8>"$cache/lock"
flock 8
if ! { [ -x "$cache/qemu" ] && has_igb "$cache/qemu"; }; then
    rm -rf "$cache/root" "$cache/apt"
    mkdir -p "$cache/root" "$cache"/apt/{lists,archives}/partial
    # $(REPO_URI) and the like are apt's.
    # shellcheck disable=SC2016
    uri=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' | awk -v r=$release '$1 == r {print $2; exit}')
    [ -n "$uri" ] || { echo "qemu.sh: the host's apt takes no packages of $release, whose backports have a QEMU with igb" >&2; exit 1; }
    for suite in $release $release-backports; do
        echo "deb [signed-by=$keyring] $uri $suite main"
    done >"$cache/apt/sources.list"
    apt=(apt-get -o "Dir::Etc::sourcelist=$cache/apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$cache/apt/lists"
        -o "Dir::Cache=$cache/apt" -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false -o Acquire::Languages=none -o APT::Sandbox::User=root)
    # What would be installed is fetched and no more: QEMU, and libraries that are newer than the host's.
    { "${apt[@]}" update && "${apt[@]}" install -y --download-only --no-install-recommends -t $release-backports qemu-system-x86; } >"$cache/apt/log" 2>&1 ||
        { tail -n 5 "$cache/apt/log" >&2; exit 1; }
    for deb in "$cache"/apt/archives/*.deb; do
        dpkg -x "$deb" "$cache/root"
    done
    cat >"$cache/qemu" <<END
#!/bin/sh
LD_LIBRARY_PATH=$cache/root/usr/lib/x86_64-linux-gnu:$cache/root/lib/x86_64-linux-gnu exec $cache/root/usr/bin/qemu-system-x86_64 -L $cache/root/usr/share/qemu -L $cache/root/usr/share/seabios "\$@"
END
    chmod 755 "$cache/qemu"
    has_igb "$cache/qemu" || { echo "qemu.sh: the QEMU of $release-backports has no igb: $("$cache/qemu" --version 2>&1 | head -n 1)" >&2; exit 1; }
    rm -rf "$cache/apt"
fi
echo "$cache/qemu"
