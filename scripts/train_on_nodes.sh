#!/usr/bin/env bash
# Trains on several machines without a scheduler. Run the same line on each of them, with its own NODE_RANK (0, 1, …):
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/train_on_nodes.sh --name my_run --model open_lm_1b --fsdp …
#
# NPROC: ranks on this machine (its GPUs, else 1); MASTER_PORT: a free port of machine 0 (29500). The run's folder and the
# data must be visible to all. Ctrl-C, SIGTERM or SIGUSR1 on one machine lets all ranks save; start again with --resume latest.
set -euo pipefail
: "${NNODES:?how many machines}" "${NODE_RANK:?which of them this is, from 0}" "${MASTER_ADDR:?address of machine 0}"
n_gpus=$(nvidia-smi -L 2> /dev/null | wc -l || true)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m open_lm train --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --nproc-per-node "${NPROC:-$((n_gpus > 0 ? n_gpus : 1))}" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" "$@"
