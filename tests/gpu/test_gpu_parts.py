"""Parts of a run on GPUs: no waiting between steps, float8, experts, optimizers, saves, stops, memory."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import ROOT, flags, folder_of, metrics, run, run_command, weights, write_data

from open_lm.checkpoint.snapshot import live, take
from open_lm.checkpoint.tree import Staging, tensors_of
from open_lm.data.batch import Batch
from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.generation import generate
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.precision import Precision
from open_lm.run.mesh_costs import rank_costs
from open_lm.train.config import OptimizerConfig, ParallelConfig
from open_lm.train.float8 import convert_to_float8
from open_lm.train.optim import build_optimizers
from open_lm.train.parallel import blocks, wrap
from open_lm.train.run_length import RunLength
from open_lm.train.state import TrainState
from open_lm.train.step import train_step
from open_lm.train.tasks import NextToken
from open_lm.train.timing import Timing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
DEVICE = torch.device(os.environ.get("OPENLM_GPU_TESTS_DEVICE", "cuda"))  # cpu: to try the tests themselves
SMALL = {"hidden_dim": 128, "n_layers": 2, "n_heads": 4, "seq_len": 64, "vocab_size": 256}
LARGER = {"hidden_dim": 1024, "n_layers": 8, "n_heads": 16, "n_kv_heads": 4, "seq_len": 2048, "vocab_size": 32_000}


def state_of(changes, optimizer="adamw", precision="amp_bf16", **parallel):
    torch.manual_seed(0)
    world, config = World(device=DEVICE), ModelConfig(**changes)
    model = wrap(create_model(config).to(DEVICE), world, ParallelConfig(precision=precision, **parallel)).train()
    return TrainState(
        model=model,
        optimizers=build_optimizers(model, OptimizerConfig(optimizer=optimizer), 1e-3),
        precision=Precision(precision, DEVICE.type),
        lr_at=lambda step: 1e-3,
        run_length=RunLength((100,), tokens_per_step=8 * config.seq_len),
        task=NextToken(1e-4, 0.01 if config.moe_freq else None, n_experts=config.moe_num_experts or 0),
        world=world,
    )


def steps(state, n, sequences=8):
    config = state.model.config
    dice = torch.Generator().manual_seed(0)
    samples = torch.randint(0, config.vocab_size, (sequences, config.seq_len + 1), generator=dice)
    batch = Batch.from_samples(samples.to(DEVICE))
    timing = Timing(DEVICE)
    return [train_step(state, batch, accum=1, clip=1.0, timing=timing).loss for _ in range(n)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
@pytest.mark.parametrize("changes", [{}, {"moe_freq": 2, "moe_num_experts": 4}])
def test_the_host_waits_for_nothing_between_steps(optimizer, changes):
    state = state_of(SMALL | changes, optimizer)
    steps(state, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = steps(state, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "adafactor"])
def test_every_optimizer_learns(optimizer):
    losses = steps(state_of(SMALL, optimizer), 20)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("capacity", [1.25, 0.0])
@pytest.mark.parametrize("precision", ["amp_bf16", "amp", "bf16"])
def test_experts_learn_with_and_without_limits(capacity, precision):
    experts = {"moe_freq": 1, "moe_num_experts": 4, "moe_top_k": 2, "moe_capacity_factor": capacity}
    losses = steps(state_of(SMALL | experts, precision=precision), 20)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
@pytest.mark.parametrize("compiled", [False, True])
def test_float8_learns_as_bf16_does(recipe, compiled):
    pytest.importorskip("torchao")
    try:
        state = state_of(SMALL, float8=recipe, torchcompile=compiled)
    except ConfigError as error:
        pytest.skip(str(error))
    losses, plain = steps(state, 20), steps(state_of(SMALL), 20)
    assert losses[-1].item() == pytest.approx(plain[-1].item(), abs=0.1)


def test_gpus_without_float8_products_are_refused(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="no float8 products"):
        convert_to_float8(blocks(create_model(ModelConfig(**SMALL))), "rowwise", DEVICE)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 16}, {"moe_freq": 2, "moe_num_experts": 4}])
def test_compiled_blocks_are_one_graph_and_compute_the_same(changes):
    plain, compiled = state_of(SMALL | changes), state_of(SMALL | changes)
    for block in blocks(compiled.model):
        block.compile(fullgraph=True)
    one, other = torch.stack(steps(plain, 5)), torch.stack(steps(compiled, 5))
    torch.testing.assert_close(one, other, atol=2e-2, rtol=1e-2)


def test_texts_are_those_of_the_cpu():
    torch.manual_seed(1)
    model = create_model(ModelConfig(**SMALL)).eval()
    prompts = [[1, 2, 3], [4], list(range(5, 25))]
    expected = generate(model, prompts, temperature=0, max_gen_len=16)
    found = generate(model.to(DEVICE), prompts, temperature=0, max_gen_len=16)
    agree = sum(a == b for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True))
    assert agree >= 0.9 * sum(map(len, expected))  # near ties may fall otherwise


@pytest.mark.parametrize("recompute", [False, True])
def test_peak_memory_is_as_dry_run_says(recompute):
    torch.cuda.empty_cache()
    state = state_of(LARGER, grad_checkpointing=recompute)
    steps(state, 2, sequences=4)
    torch.cuda.reset_peak_memory_stats()
    steps(state, 1, sequences=4)
    costs = rank_costs(
        ModelConfig(**LARGER), state.world.shape, sequences=4, accum=1, precision="amp_bf16", sharded=False,
        recompute=recompute,
    )  # fmt: skip
    assert costs.held == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def common(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({**SMALL, "seq_len": 16, "vocab_size": 16}))
    return ["--model", str(tmp_path / "model.json"), "--device", DEVICE.type, "--precision", "amp_bf16"]


def test_weights_filled_part_by_part_are_those_of_the_cpu(tmp_path):
    manifest = write_data(tmp_path / "data")
    extra = [*common(tmp_path), "--fsdp", "--force-distributed", "--lr", "1e-9", "--warmup", "0"]
    for name, more in (("whole", []), ("parts", ["--experimental-meta-device"])):
        done = run_command(flags(tmp_path, manifest, *extra, *more, name=name, steps=1))
        assert done.returncode == 0, done.stderr[-3000:]
    for name, value in weights(tmp_path, "whole").items():
        torch.testing.assert_close(weights(tmp_path, "parts")[name], value, atol=1e-6, rtol=0)


def test_a_save_in_the_background_holds_the_weights_of_its_step(tmp_path):
    manifest = write_data(tmp_path / "data")
    extra = [*common(tmp_path), "--save-every-steps", "2", "--precision", "fp32"]
    run(tmp_path, manifest, *extra, name="often")
    run(tmp_path, manifest, *common(tmp_path), "--precision", "fp32", "--stop-at-step", "4", name="stopped")
    saved = next((folder_of(tmp_path, "often") / "checkpoints").glob("epoch_*step4.pt"))
    label = saved.stem.removeprefix("epoch_")
    for name, value in weights(tmp_path, "stopped", label).items():
        torch.testing.assert_close(weights(tmp_path, "often", label)[name], value, atol=1e-6, rtol=1e-5)


def test_a_snapshot_is_copied_through_pinned_memory_that_is_kept():
    state, staging = state_of(SMALL), Staging()
    steps(state, 1)
    found = []
    for _ in range(2):
        tree = take(live(state), sharded=False, is_master=True, staging=staging)
        found.append([tensor.data_ptr() for tensor in tensors_of(tree)])
        assert all(t.device.type == "cpu" for t in tensors_of(tree))
        assert DEVICE.type == "cpu" or all(t.is_pinned() for t in tensors_of(tree["weights"]))
    assert found[0] == found[1]
    for name, weight in state.model.state_dict().items():
        assert torch.equal(tree["weights"][name], weight.cpu()), name


def test_a_signal_stops_a_run_that_goes_on_where_it_was(tmp_path):
    manifest = write_data(tmp_path / "data", (4000, 4000))
    words = flags(tmp_path, manifest, *common(tmp_path), steps=900)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "open_lm.main", *words], env=environment)
    lines = folder_of(tmp_path) / "metrics.jsonl"
    for _ in range(600):
        if (lines.exists() and lines.stat().st_size) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 85
    done = run_command([*words, "--resume", "latest", "--stop-at-step", str(max(metrics(tmp_path)) + 5)])
    assert done.returncode == 0 and "resumed from" in done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_when_a_rank_dies_the_others_end_soon(tmp_path):
    manifest = write_data(tmp_path / "data", (4000, 4000))
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, sys, open_lm.train.loop as loop\n"
        "from open_lm.main import main\n"
        "real = loop.train_step\n"
        "def step(state, *args, **kwargs):\n"
        "    os._exit(9) if state.step == 3 and state.world.rank == 1 else None\n"
        "    return real(state, *args, **kwargs)\n"
        "loop.train_step = step\n"
        "main(sys.argv[1:])\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(dying),
         *flags(tmp_path, manifest, *common(tmp_path), steps=900)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - began < 120


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_a_signal_to_one_of_two_ranks_stops_both(tmp_path):
    manifest = write_data(tmp_path / "data", (4000, 4000))
    stopping = tmp_path / "stopping.py"
    stopping.write_text(
        "import os, signal, sys\n"
        "from open_lm.command import run\n"
        "from open_lm.main import main\n"
        "from open_lm.run.run import Run\n"
        "real, seen = Run.claims, []\n"
        "def claims(self):\n"
        "    seen.append(0)\n"
        "    len(seen) == 5 and self.world.rank == 1 and os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return real(self)\n"
        "Run.claims = claims\n"
        "run(main)\n"
    )
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(stopping),
         *flags(tmp_path, manifest, *common(tmp_path), steps=900)],
        timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    (saved,) = (folder_of(tmp_path) / "checkpoints").glob("epoch_*.commit.json")
    assert "step6" in saved.name or "step7" in saved.name
