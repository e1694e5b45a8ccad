#!/usr/bin/env bash
# SFT, DPO and GRPO on the model of the quickstart:  bash scripts/post_training.sh [QUICKSTART]   (QUICKSTART: quickstart)
#
# A model of Python code learns to answer "Which is largest: 4 7 2 5?": fine-tuned on answers in two styles, then taught
# by preferences which style is liked, then rewarded for being right. After each stage it answers questions that nothing
# was trained on. Everything goes to QUICKSTART/post_training; remove that to start over. What is done is not repeated.
# SFT_STEPS, DPO_STEPS and GRPO_ITERATIONS set how long each stage trains.
set -Eeuo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
ensure_environment requirements.txt

BASE=${1:-quickstart}
DIR=$BASE/post_training
RUN=$BASE/logs/quickstart
[ -d "$RUN/checkpoints" ] || fail "$RUN holds no checkpoints: run bash scripts/quickstart.sh $BASE first"
BEGAN=$SECONDS
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
SFT_STEPS=${SFT_STEPS:-25} DPO_STEPS=${DPO_STEPS:-10} GRPO_ITERATIONS=${GRPO_ITERATIONS:-30}
VERIFIERS=open_lm.post_training.verifiers

openlm() { printf '$ openlm %s\n' "$*"; "$PYTHON" -m open_lm "$@"; }

# prepare FORM ROWS: rows to what a task reads, in the context of the quickstart's model.
prepare() {
    [ -e "$DIR/$2/ledger.json" ] || openlm prepare-chat --form "$1" --input-files "$DIR/questions/$2.jsonl" \
        --output-dir "$DIR/$2" --tokenizer "$BASE/tokenizer/tokenizer.json" --chat-template plain --seqlen 512
}

# train NAME FROM FLAGS...: one stage, from the newest checkpoint of the one before.
train() {
    [ -e "$DIR/logs/$1/checkpoints/epoch_1.commit.json" ] || openlm train --task "$1" --pretrained "$2" \
        --name "$1" --logs "$DIR/logs" --precision fp32 --workers 0 --log-every-n-steps 5 --wd 0 --grad-clip-norm 1 \
        --lr-scheduler const --warmup 5 --resume latest "${@:3}"
    score "$1" "$DIR/logs/$1"
}

# score NAME CHECKPOINT: the share of held-out questions answered rightly, and in the preferred style.
score() {
    [ -e "$DIR/scores/$1/rewards.json" ] || openlm evaluate --checkpoint "$2" --prompts "$DIR/held_out/prompts.jsonl" \
        --reward $VERIFIERS:last_number $VERIFIERS:tests --answer-tokens 16 --output-dir "$DIR/scores/$1"
}

[ -e "$DIR/questions/held_out.jsonl" ] || "$PYTHON" scripts/make_questions.py --output-dir "$DIR/questions"
prepare conversations conversations
prepare conversations held_out_conversations
prepare pairs pairs
prepare prompts prompts
prepare prompts held_out

score base "$RUN"
train sft "$RUN" --dataset-manifest "$DIR/conversations/manifest.jsonl" --multiple-data-passes \
    --train-steps "$SFT_STEPS" --global-batch-size 4 --lr 1e-3 \
    --val-data "$DIR/held_out_conversations/00000000.tar" --val-names answers --val-every-steps 5
train dpo "$DIR/logs/sft" --dataset-manifest "$DIR/pairs/manifest.jsonl" --multiple-data-passes \
    --train-steps "$DPO_STEPS" --global-batch-size 16 --lr 5e-5 --beta 0.1
train grpo "$DIR/logs/dpo" --prompts "$DIR/prompts/prompts.jsonl" --reward $VERIFIERS:last_number $VERIFIERS:tests \
    --train-steps $((2 * GRPO_ITERATIONS)) --rollout-prompts 16 --group-size 8 --rl-minibatches 2 --rollout-tokens 16 \
    --lr 1e-4

openlm report --run "$DIR/logs/grpo" --stages "$DIR/logs/sft" "$DIR/logs/dpo" \
    --title "SFT, DPO and GRPO on the quickstart's model" \
    --answers "$DIR/scores/base" "$DIR/scores/sft" "$DIR/scores/dpo" "$DIR/scores/grpo" --output "$DIR/report.html"
echo "Done in $((SECONDS - BEGAN)) s. Open $DIR/report.html in a browser."
