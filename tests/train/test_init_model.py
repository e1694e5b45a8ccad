"""Weights built part by part on sharded ranks are, bit for bit, those of a plain model of the same seed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from runs import ROOT

from open_lm.model import create_model, random_weights
from open_lm.model.architecture import MambaConfig
from open_lm.model.config import ModelConfig

BASE = {"hidden_dim": 18, "n_layers": 3, "n_heads": 3, "seq_len": 16, "vocab_size": 29}
MODELS = {
    "dense": {"post_embed_norm": True, "qk_norm": True},
    "tied": {"weight_tying": True, "ffn_type": "gelu"},
    "experts": {"moe_freq": 2, "moe_num_experts": 6, "ffn_type": "gemma_geglu"},
    "mamba": {"d_model": 16, "n_layer": 2, "vocab_size": 29, "seq_len": 16},
}
GATHER = """
import json, sys, torch
from torch.distributed.tensor import DTensor
from open_lm.distributed import start_world
from open_lm.model import random_weights
from open_lm.model.config import ModelConfig
from open_lm.train.config import ParallelConfig
from open_lm.train.init_model import build_wrapped

random_weights.LARGE, random_weights.CHUNK = 300, 64  # so that these small weights are made as large ones are
models, flags, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
with start_world("cpu", force_group=True) as world:
    parallel = ParallelConfig(fsdp=True, experimental_meta_device=True, force_distributed=True, **flags)
    for name, architecture in models.items():
        model = build_wrapped(ModelConfig.from_dict(architecture), world, parallel, 5, torch.float32)
        assert all(isinstance(p, DTensor) for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
        if world.is_master:
            torch.save(whole, f"{out}/{name}.pt")
"""


@pytest.fixture(autouse=True)
def as_large(monkeypatch):
    monkeypatch.setattr(random_weights, "LARGE", 300)
    monkeypatch.setattr(random_weights, "CHUNK", 64)


def plain(architecture):
    torch.manual_seed(5)
    return create_model(ModelConfig.from_dict(architecture)).state_dict()


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(1, {}), (2, {"torchcompile": True, "fsdp_cpu_offload": True}), (4, {"fsdp_hybrid": True, "fsdp_group_size": 2})],
    ids=["one", "two", "hybrid"],
)
def test_any_number_of_ranks_starts_with_the_weights_of_one_process(tmp_path, ranks, flags):
    models = {name: change if name == "mamba" else {**BASE, **change} for name, change in MODELS.items()}
    if "fsdp_cpu_offload" in flags:
        del models["mamba"]  # compiling its scan takes longer than everything else
    (tmp_path / "gather.py").write_text(GATHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(tmp_path / "gather.py"), json.dumps(models), json.dumps(flags), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    for name, architecture in models.items():
        expected, got = plain(architecture), torch.load(tmp_path / f"{name}.pt")
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(got[key], value), f"{name}: {key}"


def test_large_weights_are_normal_numbers_cut_at_three_deviations_and_any_part_of_them_is_the_same():
    values = random_weights.NormalWeight(0.5, 7)
    whole = torch.empty(200_000)
    values.fill(whole)
    assert whole.abs().max() <= 1.5 and abs(whole.mean().item()) < 0.005
    assert whole.std().item() == pytest.approx(0.5 * 0.98658, rel=0.01)  # of a normal distribution cut at 3
    exact = torch.distributions.Normal(0, 0.5).cdf(torch.tensor([-0.5, 0.25, 1.0]))
    shares = torch.stack([(whole < x).float().mean() for x in (-0.5, 0.25, 1.0)])
    torch.testing.assert_close(shares, exact, atol=0.006, rtol=0)
    for first, n in ((0, 10), (63, 130), (12_345, 4_000)):
        part = torch.empty(n)
        values.fill(part, first)
        assert torch.equal(part, whole[first : first + n])
    other = torch.empty(200_000)
    random_weights.NormalWeight(0.5, 8).fill(other)
    assert abs((whole * other).mean()) < 0.003 and abs((whole[64:] * whole[:-64]).mean()) < 0.003


def test_a_rank_makes_its_share_of_a_large_weight_and_no_more(tmp_path):
    made = tmp_path / "made.py"
    made.write_text(SHARE)
    done = subprocess.run(
        [sys.executable, str(made)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made, whole = map(int, done.stdout.split())
    assert made < whole / 8 * 1.1


SHARE = """
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from open_lm.distributed import World
from open_lm.model import random_weights
from open_lm.model.config import ModelConfig
from open_lm.train.config import ParallelConfig, mesh_shape
from open_lm.train.init_model import build_wrapped

random_weights.LARGE = 1 << 18
made, real = [], random_weights.NormalWeight.fill
random_weights.NormalWeight.fill = lambda self, out, first=0: (made.append(len(out)), real(self, out, first))[1]
dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
parallel = ParallelConfig(mesh="fsdp=8", experimental_meta_device=True)
world = World(3, 8, 0, torch.device("cpu"), mesh_shape(parallel, 8))
config = ModelConfig(hidden_dim=512, n_layers=2, n_heads=8, seq_len=64, vocab_size=4096)
model = build_wrapped(config, world, parallel, 5, torch.float32)
print(sum(made), sum(p.numel() for p in model.parameters() if p.ndim > 1))
"""


def test_models_are_of_the_kinds_they_should_be():
    assert isinstance(ModelConfig.from_dict(MODELS["mamba"]), MambaConfig)
