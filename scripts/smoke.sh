#!/usr/bin/env bash
# From text to words with an installed package, in the current folder (empty), in about a minute:  bash smoke.sh
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=""
openlm --version
openlm corpus --output-dir raw --max-megabytes 1 --n-files 1
openlm tokenizer --input-files 'raw/train-*.jsonl.zst' --output-dir tokenizer --vocab-size 512
openlm prepare --input-files 'raw/train-*.jsonl.zst' --output-dir shards --tokenizer tokenizer --seqlen 128
cat > model.json << JSON
{"hidden_dim": 64, "n_layers": 2, "n_heads": 2, "seq_len": 128, "vocab_size": 512}
JSON
openlm train --nproc-per-node 2 --model model.json --dataset-manifest shards/manifest.jsonl --train-steps 20 \
    --warmup 4 --lr 1e-2 --global-batch-size 4 --precision fp32 --log-every-n-steps 10 --logs logs --name smoke
openlm evaluate --checkpoint logs/smoke --eval-yaml quickstart
openlm generate --checkpoint logs/smoke --input-text "def " --max-gen-len 8
