#!/usr/bin/env bash
# Shows what every rank of the training runs on this node is doing right now, without stopping it (py-spy).
#
#   bash scripts/stacks.sh                  all ranks of this user
#   bash scripts/stacks.sh --native PID...  these processes, with C and C++ frames
#
# Where py-spy may not look (containers without ptrace), `kill -USR2 PID` makes a rank print its Python stacks itself.
set -euo pipefail
options=()
while [[ ${1:-} == --* ]]; do options+=("$1"); shift; done
if (($#)); then pids=("$@"); else mapfile -t pids < <(pgrep -u "$(id -u)" -f 'open_lm[./]main' || true); fi
if ! ((${#pids[@]})); then echo "no open_lm.main runs here" >&2; exit 1; fi
py_spy=$(command -v py-spy || echo "$(dirname "$0")/../.venv/bin/py-spy")
[[ -x $py_spy ]] || { echo "error: py-spy is missing. pip install py-spy" >&2; exit 2; }
for pid in "${pids[@]}"; do
    rank=$(tr '\0' '\n' < "/proc/$pid/environ" 2> /dev/null | sed -n 's/^RANK=//p' || true)
    echo "== process $pid, rank ${rank:-none}"
    "$py_spy" dump "${options[@]}" --pid "$pid" || echo "py-spy could not look into $pid; try: kill -USR2 $pid" >&2
done
