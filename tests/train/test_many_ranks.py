"""Hundreds of ranks, simulated by torch's fake process group: a mesh is planned, sharded and indexed within seconds."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT

PROGRAM = """
import json, math, pickle, sys, time
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from open_lm.distributed import World
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.train.config import ParallelConfig, mesh_shape
from open_lm.train.parallel import wrap

EVERY_RANK = sys.argv[2].split()


def index_of_all(tensors):
    '''CPU seconds that rank 0 takes to put the plans of 512 ranks into one index, and the elements it names.'''
    plans, meshes = [], {id(t.device_mesh): t.device_mesh for t in tensors.values()}
    for number in range(512):
        for mesh in meshes.values():  # this process takes the place of each rank
            mesh._coordinate_on_dim = divmod(number, mesh.shape[1]) if mesh.ndim == 2 else (number,)
        planner = DefaultSavePlanner()
        planner.set_up_planner(tensors, None, number == 0)
        plans.append(planner.create_local_plan())
    first = DefaultSavePlanner()
    first.set_up_planner(tensors, None, True)
    first.create_local_plan()
    began = time.process_time()
    _, index = first.create_global_plan(plans)
    pickle.dumps(index)
    seconds = time.process_time() - began
    chunks = [chunk for entry in index.state_dict_metadata.values() for chunk in entry.chunks]
    return seconds, sum(math.prod(chunk.sizes) for chunk in chunks)


rank, found = int(sys.argv[1]), {}
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=512)
for mesh in sys.argv[3:]:
    parallel = ParallelConfig(mesh=mesh)
    world = World(rank, 512, 0, torch.device("cpu"), mesh_shape(parallel, 512))
    sizes = {"hidden_dim": 1024, "n_layers": 4, "n_heads": 16, "seq_len": 2048, "vocab_size": 4096, "ffn_dim": 2048}
    experts = {"moe_freq": 1, "moe_num_experts": 64} if "ep" in mesh else {}
    with torch.device("meta"):
        model = create_model(ModelConfig(**sizes, **experts))
    whole = sum(p.numel() for p in model.parameters())
    began = time.process_time()
    model = wrap(model, world, parallel)
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(model.state_dict()), None, False)
    n_items = len(planner.create_local_plan().items)
    held = sum(p.to_local().numel() for p in model.parameters())
    found[mesh] = [time.process_time() - began, held / whole, n_items, whole, 0, 0]
    if mesh in EVERY_RANK:
        found[mesh][4:] = index_of_all({name: t for name, t in model.state_dict().items() if isinstance(t, DTensor)})
print(json.dumps(found))
"""
EVERY_RANK = ("fsdp=512", "fsdp=64,tp=8")
MESHES = {"fsdp=64,tp=8": 512, "dp=8,fsdp=64": 64, "fsdp=16,cp=4,tp=8": 512, "fsdp=8,ep=64": 512, "fsdp=512": 512}
"""And over how many ranks a weight is spread."""


@pytest.mark.parametrize("rank", [437, pytest.param(0, marks=pytest.mark.slow)])
def test_512_ranks_are_planned_and_indexed_within_seconds(rank):
    indexed = EVERY_RANK if rank == 0 else ()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(rank), " ".join(indexed), *MESHES],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for mesh, (seconds, share, n_items, whole, index_seconds, n_indexed) in found.items():
        assert seconds < 10
        assert share == pytest.approx(1 / MESHES[mesh], rel=0.1)
        assert n_items > 0 and index_seconds < 10
        assert n_indexed == (whole if mesh in indexed else 0)
