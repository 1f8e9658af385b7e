#!/usr/bin/env bash
# The demo: a lab, a pair of mail hosts, real mail, and the primary moved there and back while mail flows.
# Run by `make demo`. LAB names the lab; an existing one is used again.
set -euo pipefail
cd "$(dirname "$0")/.."

lab=(tests/lab/lab --name "${LAB:-demo}")
log=build/demo.log
report=build/reports/failover_test
timings=()
heading=

step() {                                        # ends the step before and begins the next
    [ -z "$heading" ] || timings+=("$(printf '%4d s  %s' $((SECONDS - begun)) "$heading")")
    heading=$1 begun=$SECONDS
    [ -z "$heading" ] || printf '\n=== %s (%d s since the start)\n' "$heading" "$SECONDS"
}
finish() {
    status=$?
    trap - EXIT
    [ "$status" = 0 ] || { printf '\ndemo: failed: %s (after %d s)\n' "${heading:-at the start}" "$SECONDS"; exit "$status"; }
}
trap finish EXIT
trap 'exit 130' INT TERM

playbook() { "${lab[@]}" control -- ansible-playbook -i inventories/lab "$@" 2>&1 | tee "$log"; }
changed() { grep -oP '^\S+ +: ok=.* changed=\K[0-9]+' "$log" | awk '{ n += $1 } END { print n + 0 }'; }

step "Bring the lab up"
"${lab[@]}" prerequisites
"${lab[@]}" up

step "Collect real messages"
samples=$PWD/$(tests/tools/samples | tail -n 1)

step "Provision the pair: umbra.mail.site"
playbook umbra.mail.site
site="$((SECONDS - begun)) s, $(changed) tasks changed"

step "Send mail, move the primary there and back: umbra.mail.failover_test"
playbook umbra.mail.failover_test -e failover_test_samples="$samples"

step "What an operator sees: umbractl status"
"${lab[@]}" exec mail-a -- umbractl status

step ""
echo
printf '%s\n' "${timings[@]}"
cat <<END

umbra.mail.site   $site
Report            $PWD/$report.html
                  $PWD/$report.json
Look around       make lab-shell HOST=mail-a     (mail-b, witness, client)
Remove the lab    make lab-down

demo: passed in $SECONDS s
END
