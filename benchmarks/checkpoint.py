"""Checkpoint benchmark: blocked and total time of a save against torch.save, interleaved.

Blocked is what the training loop waits; copied the time until an optimizer may step, which falls into the forward and
backward pass of the next step; total goes to the commit, without the removal of older checkpoints.

python benchmarks/checkpoint.py                       # open_lm_160m with AdamW's moments: 1.9 GB
torchrun --nproc-per-node 4 benchmarks/checkpoint.py  # the same over 4 FSDP ranks, each writing its shards
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
from torch.distributed.tensor import DTensor

from open_lm.checkpoint.commit import committed
from open_lm.checkpoint.config import CheckpointConfig
from open_lm.checkpoint.manager import Checkpoints
from open_lm.checkpoint.retention import discard
from open_lm.checkpoint.snapshot import live
from open_lm.checkpoint.tree import map_tensors
from open_lm.distributed import start_world
from open_lm.model import create_model
from open_lm.model.config import ModelFlags, resolve_architecture
from open_lm.precision import Precision
from open_lm.train.config import OptimizerConfig, ParallelConfig
from open_lm.train.optim import build_optimizers
from open_lm.train.parallel import wrap
from open_lm.train.run_length import RunLength
from open_lm.train.state import TrainState
from open_lm.train.tasks import NextToken


class NoData:
    def state(self, step):
        return {}

    def check_state(self, state):
        pass


def build(name, world):
    config = resolve_architecture(ModelFlags(model=name))
    model = wrap(create_model(config), world, ParallelConfig(device="cpu", precision="fp32", fsdp=world.size > 1))
    (optimizer,) = build_optimizers(model, OptimizerConfig(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    optimizer.step()
    optimizer.zero_grad()
    run_length = RunLength((1000,), tokens_per_step=1)
    return config, TrainState(
        model, [optimizer], Precision("fp32", "cpu"), lambda s: 1e-4, run_length, NextToken(), world
    )


class Timed:
    """Wall and CPU seconds (of all threads) of the slowest rank, since it was made."""

    def __init__(self, world):
        world.wait_for_all()
        self._world, self._wall, self._cpu = world, time.perf_counter(), time.process_time()

    def read(self):
        mine = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return tuple(max(both) for both in zip(*self._world.gather(mine), strict=True))


def local_parts(tree):
    """This rank's part of the state."""
    return map_tensors(tree, lambda _, tensor: tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def plain(state, folder, k):
    """torch.save of what this rank holds, and fsync: (blocked, total, CPU) seconds."""
    path = folder / f"plain{k}-{state.world.rank}.pt"
    tree = local_parts(live(state))
    timed = Timed(state.world)
    with open(path, "wb") as file:
        torch.save(tree, file)
        os.fsync(file.fileno())
    total, cpu = timed.read()
    path.unlink()
    return total, total, cpu


def ours(state, checkpoints, k):
    """(blocked, until optimizers may step, total, CPU) seconds of a save from its begin to its commit."""
    timed = Timed(state.world)
    state.step = k + 1
    checkpoints.save(state, NoData(), label=str(k), stats={"evaluation_metrics": []})
    blocked, _ = timed.read()
    state.copied.wait()
    copied, _ = timed.read()
    assert checkpoints.wait()
    total, cpu = timed.read()
    return blocked, copied, total, cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_lm_160m")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    with start_world("cpu") as world:
        rows = measured(args, world)
    if world.is_master:
        report(rows)
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1))


def measured(args, world):
    """One row a round: torch.save's seconds, and ours as multiples of them."""
    config, state = build(args.model, world)
    about = {"model": config.to_dict(), "flags": {}}
    format_ = "sharded" if world.size > 1 else "consolidated"
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(world.broadcast(made))
        flags = CheckpointConfig(checkpoint_format=format_)
        checkpoints = Checkpoints(str(folder / "run"), flags, name="run", config=about)
        os.makedirs(checkpoints.folder, exist_ok=True)
        for k in range(args.rounds + 1):
            _, seconds, plain_cpu = plain(state, folder, k)
            blocked, copied, total, cpu = ours(state, checkpoints, k)
            if world.is_master:
                for commit in committed(checkpoints.folder):
                    discard(checkpoints.folder, commit)
            if k:  # the first round maps memory that later ones use again
                row = {
                    "blocked": blocked / seconds,
                    "copied": copied / seconds,
                    "total": total / seconds,
                    "CPU time": cpu / plain_cpu,
                }
                rows.append({"torch.save": seconds, **row})
            if world.is_master:
                print(
                    f"round {k}: torch.save {seconds:.2f} s ({plain_cpu:.2f} CPU), "
                    f"ours blocked {blocked:.2f} s, copied {copied:.2f} s, total {total:.2f} s ({cpu:.2f} CPU)",
                    flush=True,
                )  # fmt: skip
        world.wait_for_all()
    return rows


def report(rows):
    for name in ("blocked", "copied", "total", "CPU time"):
        ratios = sorted(row[name] for row in rows)
        print(f"{name}: {statistics.median(ratios):.3f} of torch.save ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
