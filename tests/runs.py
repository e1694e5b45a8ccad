"""Whole runs in tests: tiny shards, the flags of a tiny model, and what a run left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from open_lm.data.manifest import write_manifest
from open_lm.data.shards import write_shard
from open_lm.main import main

ROOT = Path(__file__).resolve().parents[1]
SEQ_LEN, VOCAB = 16, 16


def write_data(folder, counts=(50, 60), *, seed=0, vocab=VOCAB):
    """Shards of random 17-token samples with a little structure to learn, and their manifest; returns the manifest."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    rows = []
    for k, n in enumerate(counts):
        samples = generator.integers(0, vocab // 2, (n, SEQ_LEN + 1)).astype("<u2")
        samples[:, 1::2] = samples[:, :-1:2] + vocab // 2  # every second token follows from the one before
        with open(folder / f"{k:08d}.tar", "wb") as file:
            write_shard(file, samples, "npy")
        rows.append({"shard": f"{k:08d}", "num_sequences": n})
    write_manifest(str(folder / "manifest.jsonl"), rows)
    return str(folder / "manifest.jsonl")


def flags(tmp_path, manifest, *extra, name="run", steps=12, batch=8):
    """Flags of a run of `steps` steps on the CPU in fp32."""
    return [
        "--dataset-manifest", manifest, "--model", "open_lm_test_tiny", "--device", "cpu", "--precision", "fp32",
        "--global-batch-size", str(batch), "--train-tokens", str(steps * batch * SEQ_LEN), "--warmup", "2",
        "--lr", "1e-2", "--log-every-n-steps", "1", "--workers", "0",
        "--logs-dir", str(tmp_path / "logs"), "--name", name, *extra,
    ]  # fmt: skip


def run(tmp_path, manifest, *extra, **kwargs):
    """A run in this process."""
    return main(flags(tmp_path, manifest, *extra, **kwargs))


def run_command(arguments, *, ranks=1, timeout=120, env=None):
    """`python -m open_lm.main` (or torchrun with `ranks`) in a process of its own."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [*launcher, "open_lm.main", *arguments], capture_output=True, text=True, timeout=timeout, env=environment
    )


def folder_of(tmp_path, name="run"):
    return tmp_path / "logs" / name


def metrics(tmp_path, name="run", key="train/loss"):
    """`{step: value}` from metrics.jsonl."""
    lines = (folder_of(tmp_path, name) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row[key] for row in rows if key in row}


def weights(tmp_path, name="run", label="1"):
    """The weights of one checkpoint."""
    path = folder_of(tmp_path, name) / "checkpoints" / f"epoch_{label}.pt"
    return torch.load(path, weights_only=True)["state_dict"]
