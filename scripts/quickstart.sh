#!/usr/bin/env bash
# From nothing to a trained, scored, talking model and a report:  bash scripts/quickstart.sh [DIR]   (DIR: quickstart)
#
# Every command is printed before it runs, so that it can be copied, and written to DIR/commands.txt. Stopped at any
# point and started again, it goes on where it was: finished stages are named and skipped. Remove DIR to start over.
set -Eeuo pipefail

DIR=${1:-quickstart}
case $DIR in
    -*) echo "usage: bash scripts/quickstart.sh [DIR]   (everything is written to DIR; default: quickstart)"; exit 2 ;;
    /*) ;;
    *) [ $# -eq 0 ] || DIR=$PWD/$DIR ;;
esac
cd "$(dirname "$0")/.."
DIR=${DIR#"$PWD"/}
source scripts/environment.sh
BEGAN=$SECONDS
ensure_environment requirements.txt
PYTHON=${PYTHON#"$PWD"/}
TORCHRUN=$(dirname "$PYTHON")/torchrun

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# A command as a person would type it: quoted where needed, one more line where it gets long.
typed() {
    local word line="" column=0
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,+@%-]*) word="'${word//\'/\'\\\'\'}'" ;;
        esac
        if [ $((column + ${#word})) -gt 84 ] && [ "${word#--}" != "$word" ]; then
            line+=$' \\\n    '; column=4
        elif [ -n "$line" ]; then
            line+=" "
        fi
        line+=$word; column=$((column + ${#word} + 1))
    done
    printf '%s' "$line"
}

# step TITLE FILE COMMAND...: run COMMAND, unless FILE, the last thing it makes, is there from before.
step() {
    STEP=$1
    local made=$2 began=$SECONDS command
    shift 2
    command=$(typed "$@")
    printf '# %s\n%s\n\n' "$STEP" "$command" >> "$DIR/commands.txt"
    if [ -e "$made" ]; then say "$STEP: done before ($made)"; return; fi
    say "$STEP"
    printf '$ %s\n' "$command"
    "$@"
    printf '%s\t%s\n' "$STEP" $((SECONDS - began)) >> "$DIR/timings.tsv"
}

STEP="the start"
trap 'echo; echo "stopped in: $STEP. The same command goes on from there: bash scripts/quickstart.sh $DIR" >&2' ERR
trap 'exit 130' INT TERM

mkdir -p "$DIR" || fail "$DIR cannot be made. Name another folder: bash scripts/quickstart.sh DIR"
: > "$DIR/commands.txt"

say "What does this machine have?"
PROBE="import os, torch; gpus = torch.cuda.device_count(); info = '/proc/cpuinfo'; \
bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if gpus else os.path.exists(info) and 'bf16' in open(info).read(); \
print(gpus, os.cpu_count(), 'amp_bf16' if bf16 else 'amp' if gpus else 'fp32')"
printf '$ %s\n' "$(typed "$PYTHON" -c "$PROBE")"
read -r GPUS CORES PRECISION < <("$PYTHON" -c "$PROBE")
echo "$GPUS GPUs, $CORES CPU cores; training in $PRECISION (bf16 where the hardware multiplies it fast)"

# The model and how long it trains: sized for a few minutes. A step takes BATCH samples of SEQ_LEN tokens.
VOCAB=4096
SEQ_LEN=512
if [ "$GPUS" -gt 0 ]; then
    WIDTH=512 LAYERS=8 HEADS=8 RANKS=$GPUS BATCH=$((32 * GPUS)) STEPS=$((1200 / GPUS))
    OPTIMIZER=adamw LR=2e-3
    THREADS=$((CORES > GPUS ? CORES / GPUS : 1))
else
    WIDTH=256 LAYERS=4 HEADS=4 BATCH=8 STEPS=400
    OPTIMIZER=muon LR=6e-3 # the best of benchmarks/optimizers.py, which has measured on CPUs only
    RANKS=$((CORES > 1 ? 2 : 1)) # two processes outrun one with two threads, and mind busy cores less
    THREADS=$((CORES / RANKS))
fi
HALF=$((STEPS / 2 * BATCH * SEQ_LEN))
RUN=$DIR/logs/quickstart
cat > "$DIR/model.json" << JSON
{"hidden_dim": $WIDTH, "n_layers": $LAYERS, "n_heads": $HEADS, "seq_len": $SEQ_LEN, "vocab_size": $VOCAB,
 "post_embed_norm": false, "weight_tying": false, "model_norm": "gain_only_layer_norm", "qk_norm": true}
JSON

step "1. Collect text that every machine has" "$DIR/raw/corpus.json" \
    "$PYTHON" scripts/make_corpus.py --output-dir "$DIR/raw"

step "2. Learn a tokenizer from it" "$DIR/tokenizer/tokenizer.json" \
    "$PYTHON" scripts/train_tokenizer.py --input-files "$DIR/raw/train-*.jsonl.zst" \
    --output-dir "$DIR/tokenizer" --vocab-size $VOCAB

for SPLIT in train held-out; do
    step "3. Text to shards of tokens ($SPLIT)" "$DIR/shards/$SPLIT/ledger.json" \
        "$PYTHON" datapreprocess/make_2048.py --input-files "$DIR/raw/$SPLIT*.jsonl.zst" \
        --output-dir "$DIR/shards/$SPLIT" --tokenizer "$DIR/tokenizer/tokenizer.json" --seqlen $SEQ_LEN --resume
done

# `--` keeps torchrun's hands off what follows: without it, it takes --logs for its own --logs-specs.
train() {
    step "$1" "$RUN/checkpoints/epoch_$2.commit.json" \
        env OMP_NUM_THREADS=$THREADS "$TORCHRUN" --standalone --nproc-per-node "$RANKS" -m -- open_lm.main \
        --model "$DIR/model.json" \
        --dataset-manifest "$DIR/shards/train/manifest.jsonl" --multiple-data-passes \
        --val-data "$DIR/shards/held-out/00000000.tar" --val-names text \
        --val-num-samples $((128 * SEQ_LEN)) --val-every-steps $((STEPS / 8)) \
        --global-batch-size "$BATCH" --train-tokens $((HALF * $2)) --num-checkpoints "$2" \
        --optimizer "$OPTIMIZER" --lr "$LR" --warmup $((STEPS / 16)) --wd 0.1 --grad-clip-norm 1 \
        --precision "$PRECISION" --log-every-n-steps 5 --logs "$DIR/logs" --name quickstart --resume latest "${@:3}"
}
train "4. Train, first half" 1 --lr-scheduler const
train "5. Resume from the checkpoint, second half" 2 --lr-scheduler const-cooldown --epochs-cooldown 1

step "6. Score it on small tasks" "$DIR/scores/results.json" \
    "$PYTHON" eval/eval_openlm_ckpt.py --engine native --eval-yaml eval/yamls/quickstart.yaml \
    --checkpoint "$RUN" --tokenizer "$DIR/tokenizer/tokenizer.json" --output-dir "$DIR/scores" --resume

step "7. Let it write" "$DIR/samples.jsonl" \
    "$PYTHON" scripts/generate.py --checkpoint "$RUN" --tokenizer "$DIR/tokenizer/tokenizer.json" \
    --max-gen-len 120 --temperature 0.7 --output "$DIR/samples.jsonl" \
    --input-text "def read_lines(path):" "class Stack:" "    def __init__(self, name):" "The following example shows how to"

step "8. Put it all on one page" "" \
    "$PYTHON" scripts/report.py --run "$RUN" --title "OpenLM quickstart" --corpus "$DIR/raw/corpus.json" \
    --ledgers "$DIR/shards/train/ledger.json" "$DIR/shards/held-out/ledger.json" --scores "$DIR/scores/results.json" \
    --samples "$DIR/samples.jsonl" --commands "$DIR/commands.txt" --timings "$DIR/timings.tsv" --output "$DIR/report.html"

say "Done in $((SECONDS - BEGAN)) s. Open $DIR/report.html in a browser."
