#!/bin/bash
# run.sh smoke|full [REGEX]: run Tempest, as it comes from the distribution, against the cloud in STATE (brought up if
# there is none). full is all of tempest.api.compute and tempest.scenario but what the file `exclude` names; smoke is what
# the file `smoke` names. A REGEX takes the tests of the set that match. All it writes is in STATE/tempest: `failed` (one
# test a line, with its error), `flaky` (the same, of those that passed at the second try), tempest.log (every request).
# CONCURRENCY=2   tests side by side
# RETRY=1         run up to three tests that failed once more, and name them
set -u
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=devstack/vars.sh
. "$here/../../devstack/vars.sh"
# shellcheck source=devstack/lib.sh
. "$HERE/lib.sh"
export XDG_CACHE_HOME
which=${1-} regex=${2-}
case $which in
    smoke) conf=tempest accounts=() group='([^\.]*\.)*' ;;
    # Tests of a class stay together, but not those of the scenarios: two of these classes take as long as all else.
    full)  conf=accounts accounts=(accounts) group='tempest\.scenario\..*|([^\.]*\.)*' ;;
    *) sed -n '2s/^# //p' "$0" >&2; exit 2 ;;
esac
need_root
"$here/../run.sh" packages-tempest || exit 1
if [ ! -e "$STATE/.novalet-cloud" ]; then
    "$HERE/install.sh" && "$HERE/up.sh" || exit 1
fi
running novalet || die "the compute service does not run: $HERE/compute.sh start novalet"

images=${NOVALET_IMAGE_CACHE:-/var/cache/novalet/images}
work=$STATE/tempest
mkdir -p "$work" && cd "$work" || exit 1
"$here/image.sh" "$images" || die "no guest image"
trap '/usr/bin/python3 "$here/setup.py" "$STATE" || say "   the network \"tempest\" is left"' EXIT
/usr/bin/python3 "$here/setup.py" "$STATE" "$images" "$work" "${accounts[@]}" || die "the cloud is not ready for Tempest"
: >tempest.log; rm -rf failed flaky lock

printf '[DEFAULT]\ntest_path=%s\ntop_dir=%s\ngroup_regex=%s\n' /usr/lib/python3/dist-packages/tempest/test_discover \
    /usr/lib/python3/dist-packages/tempest "$group" >.stestr.conf
# How long each test took last time decides which worker gets it.
[ -e .stestr ] || stestr init || exit 1
tempest() { local conf=$1; shift; /usr/bin/tempest run --config-file "$work/$conf.conf" --concurrency "${CONCURRENCY:-2}" "$@"; }
case $which in
    smoke) pick=(--include-list "$here/smoke") ;;
    full)  pick=(--regex '^tempest\.(api\.compute|scenario)\.') ;;
esac
tempest tempest "${pick[@]}" --exclude-list "$here/exclude" --list-tests 2>list.log | grep -E '^tempest\.' | grep -E -- "$regex" >all
# Tests that need a network which is their project's own, and one that takes the floating IP of its class away with it:
# the others would wait for it.
alone='\.test_attach_interfaces\.|\.test_change_server_password\['
grep -E "$alone" all >isolated; grep -vE "$alone" all >shared
[ -s all ] || { cat list.log; die "no test matches"; }
say "   $(wc -l <all) tests, ${CONCURRENCY:-2} side by side"
rc=0 combine=()
for c in $conf:shared isolated:isolated; do
    [ -s "${c#*:}" ] || continue
    tempest "${c%:*}" --load-list "${c#*:}" "${combine[@]}" || rc=1
    combine=(--combine)
done
/usr/bin/python3 "$here/report.py" failed || rc=1
[ $rc != 0 ] || exit 0
if [ -n "${RETRY-}" ] && [ -s failed ] && [ "$(wc -l <failed)" -le 3 ]; then
    # The fixture of a class is named "setUpClass (CLASS)": then all of the class.
    cut -f1 failed | sed -E 's/^(setUp|tearDown)Class \((.*)\)$/\2/; s/\./\\./g; s/\[.*/\\[/; s/^/^/' >again
    say "   once more: $(tr '\n' ' ' <again)"
    tempest isolated --include-list again --exclude-list "$here/exclude" && { mv failed flaky; exit 0; }
fi
exit 1
