"""Weights built part by part on sharded ranks are, bit for bit, those of a plain model of the same seed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from runs import ROOT

from open_lm.model import create_model
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
from open_lm.model.config import ModelConfig
from open_lm.train.config import ParallelConfig
from open_lm.train.init_model import build_wrapped

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


def test_models_are_of_the_kinds_they_should_be():
    assert isinstance(ModelConfig.from_dict(MODELS["mamba"]), MambaConfig)
