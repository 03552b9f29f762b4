#!/bin/sh
# How long the command takes to answer: `--version`, and `plan` of 200 file steps.
#
#   cargo build --release -p upgrade-cli && benches/cli.sh [UPGRADE]
#
# The median of 21 calls each; starting a process that does nothing is measured beside them.
set -eu
upgrade=$(realpath "${1:-target/release/upgrade}")
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cd "$home"
{
    echo "upgrade: bench"
    echo "steps:"
    for number in $(seq 1 200); do
        echo "  - id: file-$number"
        echo "    uses: host.file"
        echo "    with: { path: $home/files/$number, content: 'line $number' }"
    done
} > upgrade.yaml
mkdir files
"$upgrade" --state-dir "$home/state" plan upgrade.yaml > plan.txt || { cat plan.txt; exit 1; }

measure() {
    label=$1
    shift
    for _ in $(seq 1 21); do
        start=$(date +%s%N)
        "$@" > /dev/null
        echo $(($(date +%s%N) - start))
    done | sort -n | awk -v label="$label" '{ at[NR] = $1 / 1e6 }
        END { printf "%-28s %7.1f ms  [%.1f - %.1f]\n", label, at[int((NR + 1) / 2)], at[1], at[NR] }'
}
measure "a process that does nothing" true
measure "upgrade --version" "$upgrade" --version
measure "upgrade plan, 200 files" "$upgrade" --state-dir "$home/state" plan upgrade.yaml
