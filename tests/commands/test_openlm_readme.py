"""The commands of OpenLM's README run as they stand there, pasted into a clone; only names and sizes are small."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from icl_setup import write_tokenizer
from runs import ROOT

PREPARE = """
S3_BASE=preproc_data-v1/ python datapreprocess/make_2048.py \
    --input-files raw/*.jsonl \
    --output-dir preproc_data \
    --num-workers 2 \
    --num-consumers 1 \
    --tokenizer tokenizer/tokenizer.json
"""
PREPARE_CHAT = """
python datapreprocess/make_assistant_data.py \
    --input-files chat/*.jsonl \
    --output-dir chat_data \
    --num-workers 2 \
    --num-consumers 1 \
    --tokenizer tokenizer/tokenizer.json
"""
TRAIN = """
 --model open_lm_11m \
 --train-data preproc_data/0000000{0..0}.tar \
 --train-num-samples 8192 \
 --workers 1 \
 --dataset-resampled \
 --precision amp_bfloat16 \
 --global-batch-size 2 \
 --grad-checkpointing \
 --log-every-n-steps 1 \
 --grad-clip-norm 1 \
 --data-key npy \
 --lr 3e-4 \
 --fsdp --fsdp-amp \
 --warmup 1 \
 --wd 0.1 \
 --beta2 0.95 \
 --epochs 1 \
 --report-to wandb \
 --wandb-project-name open_lm_example \
 --name open_lm_ex_$RANDOM \
 --resume latest
"""
MORE = "--tokenizer tokenizer/tokenizer.json"
EVALUATE = """
cd eval
python eval_openlm_ckpt.py \
--eval-yaml in_memory_hf_eval.yaml \
--model-config ../open_lm/model_configs/open_lm_11m.json  \
--checkpoint ../logs/open_lm_ex_*/checkpoints/epoch_1.pt
"""
GENERATE = """
cd scripts
python generate.py \
--model open_lm_11m \
--checkpoint ../logs/open_lm_ex_*/checkpoints/epoch_1.pt \
--positional_embedding_type rotary \
--max_gen_len 3 \
--input-text "Please give me a recipe for"
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with raw text and a tokenizer, for commands that write where they stand."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("datapreprocess", "eval", "scripts"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "open_lm").symlink_to(ROOT / "open_lm")
    for name in ("raw", "chat", "tokenizer"):
        (folder / name).mkdir()
    write_tokenizer(folder / "tokenizer" / "tokenizer.json")
    text = (ROOT / "open_lm" / "flags.py").read_text()
    (folder / "raw" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(8)))
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}]
    (folder / "chat" / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return folder


def paste(command, folder):
    """The command in bash, with this Python as `python`."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    settings = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": ""}
    settings.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_chat_data_take_the_flags_of_openlm(clone):
    assert "ignored" in paste(PREPARE_CHAT, clone)
    assert (clone / "chat_data" / "manifest.jsonl").exists()


@pytest.mark.slow
def test_text_to_scores_and_words(clone):
    paste(PREPARE, clone)
    assert (clone / "preproc_data" / "00000000.tar").exists()
    paste(f"python -m open_lm train --nproc-per-node 2 {TRAIN.strip()} {MORE} --logs logs", clone)
    assert "python_words/3-shot" in paste(EVALUATE, clone)  # the tokenizer's path is relative to the clone
    assert "Please give me a recipe for" in paste(GENERATE, clone)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 12), reason="torchrun takes --logs for its own before Python 3.12")
def test_the_form_with_torchrun(clone):
    paste(PREPARE.replace("preproc_data", "preproc_data_2"), clone)
    command = f"torchrun --nproc-per-node 1 -m open_lm.main {TRAIN.strip()} {MORE} --logs logs_2"
    paste(command.replace("preproc_data", "preproc_data_2"), clone)
