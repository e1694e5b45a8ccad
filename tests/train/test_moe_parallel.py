"""Experts under FSDP: their weights are spread over the ranks, and the run is the one of a single process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from runs import ROOT, flags, metrics, run, run_command, weights, write_data

ARCHITECTURE = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 16, "vocab_size": 16}
EXPERTS = {"moe_freq": 1, "moe_num_experts": 4, "moe_top_k": 2}
SHAPES = """
import json
from open_lm.distributed import start_world
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.train.config import ParallelConfig
from open_lm.train.parallel import wrap

with start_world("cpu") as world:
    found = []
    for n_experts in (4, 6):
        config = ModelConfig(**{**json.loads('ARCHITECTURE'), "moe_num_experts": n_experts})
        experts = wrap(create_model(config), world, ParallelConfig(fsdp=True)).layers[0].feed_forward.experts
        found.append([len(weight.to_local()) for weight in (experts.w12, experts.w3)])
    print("\\nlocal", world.rank, json.dumps(found), flush=True)
"""


def model_file(folder, **changes):
    (folder / "moe.json").write_text(json.dumps({**ARCHITECTURE, **EXPERTS, **changes}))
    return str(folder / "moe.json")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A dropless run in one process, balanced by nothing: the balance of a rank's tokens is not that of all."""
    folder = tmp_path_factory.mktemp("single")
    manifest = write_data(folder / "data")
    model = model_file(folder, moe_capacity_factor=0.0, moe_loss_weight=0.0)
    run(folder, manifest, "--model", model, "--grad-clip-norm", "1")
    return folder, manifest, model


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_do_not_change_a_dropless_run(tmp_path, single, ranks):
    folder, manifest, model = single
    done = run_command(
        flags(tmp_path, manifest, "--model", model, "--grad-clip-norm", "1", "--fsdp", "--grad-checkpointing"),
        ranks=ranks,
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(weights(tmp_path), weights(folder), rtol=1e-4, atol=1e-5)
    for key in ("train/loss", "train/tokens_dropped", *(f"train/expert_load_{expert}" for expert in range(4))):
        assert metrics(tmp_path, key=key) == pytest.approx(metrics(folder, key=key), abs=1e-5)


def test_with_a_capacity_it_learns_balances_and_counts_what_is_dropped(tmp_path):
    manifest = write_data(tmp_path / "data")
    model = model_file(tmp_path, moe_capacity_factor=1.0, moe_loss_weight=0.2)
    done = run_command(flags(tmp_path, manifest, "--model", model, "--fsdp", "--accum-freq", "2"), ranks=2)
    assert done.returncode == 0, done.stderr
    losses = metrics(tmp_path)
    assert losses[12] < losses[1] - 0.1
    dropped = metrics(tmp_path, key="train/tokens_dropped")
    assert all(0 < value < 4 for value in dropped.values())  # of 2 layers x 2 choices a token
    loads = [metrics(tmp_path, key=f"train/expert_load_{expert}") for expert in range(4)]
    assert all(sum(load[step] for load in loads) == pytest.approx(1, abs=1e-5) for step in losses)


def test_every_rank_holds_its_share_of_the_experts(tmp_path):
    (tmp_path / "shapes.py").write_text(SHAPES.replace("ARCHITECTURE", json.dumps({**ARCHITECTURE, **EXPERTS})))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4",
         str(tmp_path / "shapes.py")],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.startswith("local"))
    of_each_rank = [json.loads(found[str(rank)]) for rank in range(4)]
    assert [of_four for of_four, _ in of_each_rank] == [[1, 1]] * 4
    assert [of_six for _, of_six in of_each_rank] == [[2, 2], [2, 2], [2, 2], [0, 0]]
