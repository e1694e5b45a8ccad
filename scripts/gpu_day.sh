#!/usr/bin/env bash
# All that needs a GPU, on one, within 40 minutes: tests, the step beside transformers, loss and attention kernels, memory.
# Writes a page of figures: bash scripts/gpu_day.sh [gpu_figures.md]
set -uo pipefail
cd "$(dirname "$0")/.."
page=${1:-gpu_figures.md}
python=$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)
"$python" -c 'import torch; assert torch.cuda.is_available()' || { echo "torch sees no GPU here: install a CUDA build" >&2; exit 64; }

run() {  # run TITLE SECONDS COMMAND...
    local title=$1 seconds=$2 began=$SECONDS status
    shift 2
    { echo; echo "## $title"; echo; echo '```'; echo "$ $*"; } >> "$page"
    timeout "$seconds" "$@" > gpu_day.part 2>&1
    status=$?
    { tail -n 40 gpu_day.part; echo '```'; echo "exit $status after $((SECONDS - began)) s"; } >> "$page"
    echo "$title: exit $status after $((SECONDS - began)) s"
    rm -f gpu_day.part
}

{
    echo "# Figures of $(date -u +%F)"
    echo
    "$python" -c 'import torch; p = torch.cuda.get_device_properties(0); print(p.name, round(p.total_memory / 2**30), "GiB, torch", torch.__version__, "CUDA", torch.version.cuda)'
    git log -1 --format='commit %h'
} > "$page"

run "Tests" 900 "$python" -m pytest -q tests/gpu -m gpu
run "Loss and attention kernels" 300 "$python" benchmarks/gpu_kernels.py
run "Step, 160m" 420 "$python" benchmarks/train_step.py --model open_lm_160m --precision amp_bf16 --rounds 5
run "Step, 1b" 420 "$python" benchmarks/train_step.py --model open_lm_1b --precision amp_bf16 --rounds 3 --contestants open_lm "open_lm --torchcompile"
run "A run, its MFU and memory" 300 "$python" -m open_lm.main --dataset-type synthetic --model open_lm_160m --device cuda \
    --precision amp_bf16 --torchcompile --global-batch-size 16 --train-steps 60 --warmup 10 --log-every-n-steps 20 \
    --save-frequency 0 --logs "$(mktemp -d)" --name gpu_day
echo "figures: $page"
