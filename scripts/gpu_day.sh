#!/usr/bin/env bash
# All that needs a GPU, within 40 minutes on one (several are used where there are): tests, kernels, the step beside
# transformers, utilisation, memory beside --dry-run's, communication and its overlap, float8, a run, its saves, generation.
# Writes a page of figures:
#
#   bash scripts/gpu_day.sh [gpu_figures.md]
#   bash scripts/gpu_day.sh --dry PAGE      the same commands on the CPU with tiny models, to see that they work
set -uo pipefail
cd "$(dirname "$0")/.."
dry=; if [ "${1:-}" = --dry ]; then dry=1; shift; fi
page=${1:-gpu_figures.md}
python=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
part=$(mktemp) logs=$(mktemp -d) failed=0
trap 'rm -rf "$part" "$logs"' EXIT

if [ "$dry" ]; then
    export TORCHDYNAMO_DISABLE=1  # compiling takes minutes
    device=cpu small=open_lm_test_tiny large=open_lm_test_tiny n=2 rounds=1 sequences=2 sizes=(--vocab 512 --dim 64 --tokens 256 --seq-len 256)
    gpu_tests=(--collect-only) batch=4 steps=6 contestants=(open_lm) written=(--prompt 4 --new 4 --turns 1 --dtype float32)
else
    "$python" -c 'import torch; assert torch.cuda.is_available()' || { echo "torch sees no GPU here: install a CUDA build" >&2; exit 64; }
    device=cuda small=open_lm_160m large=open_lm_1b rounds=10 sequences=8 sizes=() gpu_tests=() batch=16 steps=60 written=() contestants=(transformers "transformers compiled" open_lm "open_lm --torchcompile")
    n=$("$python" -c 'import torch; print(torch.cuda.device_count())')
fi

run() {  # run TITLE SECONDS COMMAND...
    local title=$1 seconds=$2 began=$SECONDS status
    shift 2
    { echo; echo "## $title"; echo; echo '```'; echo "$ ${*/#$logs/LOGS}"; } >> "$page"
    timeout "$seconds" "$@" > "$part" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=1
    { tail -n 40 "$part"; echo '```'; echo "exit $status after $((SECONDS - began)) s"; } >> "$page"
    echo "$title: exit $status after $((SECONDS - began)) s"
}

step() {  # step TITLE SECONDS RANKS FLAGS...
    local title=$1 seconds=$2 count=$3
    shift 3
    run "$title" "$seconds" "$python" -m torch.distributed.run --standalone --nproc-per-node="$count" \
        benchmarks/mesh_step.py --device "$device" --rounds "$rounds" --sequences "$sequences" "$@"
}

{
    echo "# Figures of $(date -u +%F)"
    echo
    "$python" -c 'import torch
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(torch.cuda.device_count(), "x", p.name, round(p.total_memory / 2**30), "GiB, CUDA", torch.version.cuda, "NCCL", torch.cuda.nccl.version())
print("torch", torch.__version__)'
    git log -1 --format='commit %h' 2> /dev/null
} > "$page"

run "Tests" 500 "$python" -m pytest -q tests/gpu "${gpu_tests[@]}"
run "Loss and attention kernels" 200 "$python" benchmarks/gpu_kernels.py "${sizes[@]}"
run "Step beside transformers" 250 "$python" benchmarks/train_step.py --model "$small" --precision amp_bf16 --rounds "$rounds" \
    --contestants "${contestants[@]}"
float8=()
if "$python" -c 'import torchao' 2> /dev/null; then
    float8=(compiled,rowwise compiled,tensorwise)
else
    echo "float8: left out, torchao is not installed (pip install '.[float8]')" | tee -a "$page"
fi
step "Time, utilisation and memory, small model" 250 1 --model "$small" --how plain compiled
step "Time, utilisation and memory, large model" 500 1 --model "$large" --how compiled compiled,recomputed "${float8[@]}"
if [ "$n" -gt 1 ]; then
    step "Meshes of all devices" 300 "$n" --model "$small" --mesh dp=-1 fsdp=-1 fsdp=-1,tp=2 fsdp=-1,cp=2
else
    echo "meshes, overlap and NCCL: left out, one device" | tee -a "$page"
fi
run "A run, its utilisation and saves" 300 "$python" -m open_lm.main --dataset-type synthetic --model "$small" --device "$device" \
    --precision amp_bf16 --global-batch-size "$batch" --train-steps "$steps" --num-checkpoints 2 --warmup 2 \
    --log-every-n-steps 20 --logs "$logs" --name gpu_day
run "Generation" 100 "$python" benchmarks/generation.py --model "$small" "${written[@]}"
echo "figures: $page"
exit $failed
