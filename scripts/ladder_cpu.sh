#!/usr/bin/env bash
# A ladder of five models on a CPU, and the law that predicts the largest:  bash scripts/ladder_cpu.sh [DIR]   (DIR: ladder)
#
# The text is that of the quickstart (taken from quickstart/ where it is). Four sizes are fitted, the fifth is predicted
# and compared with what it reached. Stopped at any point and started again, it goes on where it was.
set -Eeuo pipefail

DIR=${1:-ladder}
case $DIR in
    -*) echo "usage: bash scripts/ladder_cpu.sh [DIR]   (everything is written to DIR; default: ladder)"; exit 2 ;;
    /*) ;;
    *) [ $# -eq 0 ] || DIR=$PWD/$DIR ;;
esac
cd "$(dirname "$0")/.."
DIR=${DIR#"$PWD"/}
source scripts/environment.sh
BEGAN=$SECONDS
ensure_environment requirements.txt requirements-ladder.txt

VOCAB=1024
SEQ_LEN=256
LADDER=$DIR/ladder.json

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# step TITLE FILE COMMAND...: run COMMAND, unless FILE, the last thing it makes, is there from before.
step() {
    local title=$1 made=$2
    shift 2
    if [ -n "$made" ] && [ -e "$made" ]; then say "$title: done before ($made)"; return; fi
    say "$title"
    printf '$ %s\n' "$*"
    "$@"
}

mkdir -p "$DIR"
RAW=$DIR/raw
[ -e quickstart/raw/corpus.json ] && RAW=quickstart/raw

step "1. Collect text that every machine has" "$RAW/corpus.json" \
    "$PYTHON" scripts/make_corpus.py --output-dir "$RAW"

step "2. Learn a small tokenizer from it" "$DIR/tokenizer/tokenizer.json" \
    "$PYTHON" scripts/train_tokenizer.py --input-files "$RAW/train-*.jsonl.zst" \
    --output-dir "$DIR/tokenizer" --vocab-size $VOCAB

for SPLIT in train held-out; do
    step "3. Text to shards of tokens ($SPLIT)" "$DIR/shards/$SPLIT/ledger.json" \
        "$PYTHON" datapreprocess/make_2048.py --input-files "$RAW/$SPLIT*.jsonl.zst" \
        --output-dir "$DIR/shards/$SPLIT" --tokenizer "$DIR/tokenizer/tokenizer.json" --seqlen $SEQ_LEN --resume
done

# Micro-batches of 4,096 tokens at most; batch, learning rate, length and checkpoints follow from the size.
if [ ! -e "$LADDER" ]; then
    cat > "$LADDER" << JSON
{
  "name": "cpu",
  "dir": "runs",
  "sizes": {
    "25K": {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "ffn_dim": 64},
    "43K": {"hidden_dim": 24, "n_layers": 2, "n_heads": 3, "ffn_dim": 96},
    "66K": {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 128},
    "92K": {"hidden_dim": 40, "n_layers": 2, "n_heads": 5, "ffn_dim": 160},
    "158K": {"hidden_dim": 56, "n_layers": 2, "n_heads": 7, "ffn_dim": 224}
  },
  "max_devices": 1,
  "device_type": "cpu",
  "sequence_length": $SEQ_LEN,
  "vocab_size": $VOCAB,
  "tokenizer": "tokenizer/tokenizer.json",
  "seed": 0,
  "data": {"manifests": ["shards/train/manifest.jsonl"]},
  "val_data": ["shards/held-out/manifest.jsonl"],
  "run": {"chinchilla_multiple": 1, "lr_multiplier": 0.5},
  "flags": {"precision": "fp32", "multiple_data_passes": true, "val_num_samples": 65536}
}
JSON
fi

step "4. The plan" "" "$PYTHON" -m open_lm.ladder dry-run --ladder "$LADDER"
step "5. Train the ladder" "" "$PYTHON" -m open_lm.ladder run --ladder "$LADDER"
step "6. All checkpoints in one table" "" "$PYTHON" -m open_lm.ladder metrics --ladder "$LADDER" \
    --output "$DIR/metrics.csv"
step "7. Fit the law to four sizes, predict the fifth" "" "$PYTHON" -m open_lm.ladder fit --ladder "$LADDER" \
    --hold-out size=158K --output-dir "$DIR/fit"

say "Done in $((SECONDS - BEGAN)) s. Look at $DIR/fit/fit.png."
