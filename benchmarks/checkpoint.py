"""Checkpoint benchmark: blocked and total time of a save against torch.save, interleaved.

python benchmarks/checkpoint.py                       # open_lm_160m with AdamW's moments: 1.9 GB
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from open_lm.checkpoint.config import CheckpointConfig
from open_lm.checkpoint.manager import Checkpoints
from open_lm.distributed import World
from open_lm.model import create_model
from open_lm.model.config import ModelFlags, resolve_architecture
from open_lm.precision import Precision
from open_lm.train.config import OptimizerConfig
from open_lm.train.optim import build_optimizers
from open_lm.train.run_length import RunLength
from open_lm.train.state import TrainState
from open_lm.train.tasks import NextToken


class NoData:
    def state(self, step):
        return {}

    def check_state(self, state):
        pass


def build(name):
    config = resolve_architecture(ModelFlags(model=name))
    model = create_model(config)
    (optimizer,) = build_optimizers(model, OptimizerConfig(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    optimizer.step()
    optimizer.zero_grad()
    run_length = RunLength((1000,), tokens_per_step=1)
    return config, TrainState(
        model, [optimizer], Precision("fp32", "cpu"), lambda s: 1e-4, run_length, NextToken(), World()
    )


def plain(state, folder, k):
    began = time.perf_counter()
    with open(folder / f"plain{k}.pt", "wb") as file:
        torch.save({"model": state.model.state_dict(), "optimizer": state.optimizers[0].state_dict()}, file)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    (folder / f"plain{k}.pt").unlink()
    return seconds, seconds


def ours(state, checkpoints, k):
    began = time.perf_counter()
    state.step = k + 1
    checkpoints.save(state, NoData(), label=str(k), stats={"evaluation_metrics": []})
    blocked = time.perf_counter() - began
    assert checkpoints.wait()
    return blocked, time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_lm_160m")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    config, state = build(args.model)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        flags = CheckpointConfig(keep_last=1)
        about = {"model": config.to_dict(), "flags": {}}
        checkpoints = Checkpoints(str(Path(folder, "run")), flags, name="run", config=about)
        os.makedirs(checkpoints.folder)
        for k in range(args.rounds + 1):
            plain_seconds, _ = plain(state, Path(folder), k)
            blocked, total = ours(state, checkpoints, k)
            if k:  # the first round maps memory that later ones use again
                rows.append(
                    {"torch.save": plain_seconds, "blocked": blocked / plain_seconds, "total": total / plain_seconds}
                )
            print(
                f"round {k}: torch.save {plain_seconds:.2f} s, ours blocked {blocked:.2f} s, total {total:.2f} s",
                flush=True,
            )
    for name in ("blocked", "total"):
        ratios = sorted(row[name] for row in rows)
        print(f"{name}: {statistics.median(ratios):.3f} of torch.save ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
