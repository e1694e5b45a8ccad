"""Equality of meshes: training on every mesh beside the same training in one process, on gloo ranks of the CPU.

    python benchmarks/mesh_equality.py [--mesh tp=2,fsdp=2 …] [--family dense …] [--optimizer muon] [--dtype float64]

Without --mesh it goes over each axis alone on 2, 4 and 8 ranks, all pairs of axes on 4 and all triples on 8 (about
eight minutes on two cores). A cell has the largest difference of any loss and of any weight after --steps steps from
those of one process. The first lines are one process beside itself, so that one sees what rounding does: the batch in
four micro-batches, its sequences in reverse order, its vocabulary renumbered (the same model, whose sums are added in
another order), and weights in fp64. AdamW divides a gradient by its size: with an --eps of 1e-8 a weight whose gradient
is nothing but rounding moves by the whole learning rate, one way or the other.
"""

import argparse
import dataclasses
import itertools
import os
import socket
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing
from torch.distributed.tensor import DTensor

from open_lm.data.batch import Batch
from open_lm.distributed import World, start_world
from open_lm.errors import ConfigError
from open_lm.mesh import AXES, parse_mesh, shape_for
from open_lm.model.config import ModelConfig
from open_lm.precision import Precision
from open_lm.train.config import OptimizerConfig, ParallelConfig, mesh_shape
from open_lm.train.context_parallel import sequence_part
from open_lm.train.init_model import build_wrapped
from open_lm.train.optim import build_optimizers
from open_lm.train.row_order import row_orders, to_file_order
from open_lm.train.run_length import RunLength
from open_lm.train.state import TrainState
from open_lm.train.step import train_step
from open_lm.train.tasks import NextToken
from open_lm.train.timing import Timing

BASE = {"hidden_dim": 64, "n_layers": 2, "n_heads": 8, "seq_len": 32, "vocab_size": 64, "ffn_dim": 96}
FAMILIES = {
    "dense": {},
    "shared keys": {"n_kv_heads": 4},
    "qk norm": {"qk_norm": True, "model_norm": "rms_norm"},
    "tied": {"weight_tying": True},
    "experts": {"moe_freq": 2, "moe_num_experts": 8, "moe_capacity_factor": 0.0, "moe_loss_weight": 0.0},
}
"""Experts drop no token and have no balance loss: both are of each rank's tokens, as docs/parallelism.md says."""
BATCH = 8
ALONE = {
    "one process, 4 micro-batches": {"accum": 4},
    "one process, reversed": {"is_reversed": True},
    "one process, renumbered": {"is_renumbered": True},
    "one process, fp64": {"dtype": "float64"},
}


def meshes():
    """Every axis alone, every pair and every triple."""
    alone = [f"{axis}={n}" for n in (2, 4, 8) for axis in AXES]
    pairs = [f"{one}=2,{other}=2" for one, other in itertools.combinations(AXES, 2)]
    return alone + pairs + [",".join(f"{axis}=2" for axis in three) for three in itertools.combinations(AXES, 3)]


def build(world, family, args):
    """The start of a run."""
    config = ModelConfig(**{**BASE, **FAMILIES[family]})
    precision = Precision("fp32", "cpu")
    precision.weight_dtype = getattr(torch, args.dtype)
    parallel = ParallelConfig(mesh=str(world.shape))
    model = build_wrapped(config, world, parallel, 3, precision.weight_dtype).train()
    rule = OptimizerConfig(optimizer=args.optimizer, eps=args.eps, muon_ns_precision=args.muon_ns_precision)
    return TrainState(
        model=model,
        optimizers=build_optimizers(model, rule, args.lr),
        precision=precision,
        lr_at=lambda step: args.lr,
        run_length=RunLength((10**6,), BATCH * config.seq_len),
        task=NextToken(1e-4, 0.0, n_experts=config.moe_num_experts) if config.moe_freq else NextToken(1e-4),
        world=world,
        part=sequence_part(world),
    )


def trained(state, args, accum=None, is_reversed=False, is_renumbered=False):
    """The loss of each step, and the weights after the last, whole and in the order of files."""
    world, losses = state.world, []
    numbers = torch.randperm(BASE["vocab_size"], generator=torch.Generator().manual_seed(9)) if is_renumbered else None
    renumber(state.model, numbers)
    for step in range(args.steps):
        dice = torch.Generator().manual_seed(step)
        samples = torch.randint(0, BASE["vocab_size"], (BATCH, BASE["seq_len"] + 1), generator=dice)
        samples = samples if numbers is None else numbers[samples]
        own = samples.chunk(world.shape.n_data)[world.data_rank]
        batch = Batch.from_samples(own.flip(0) if is_reversed else own)
        batch = batch if state.part is None else batch.of_part(state.part)
        report = train_step(state, batch, accum=accum or args.accum, clip=1.0, timing=Timing(world.device))
        losses.append(world.sum(report.loss).item())
    renumber(state.model, None if numbers is None else numbers.argsort())
    return losses, whole_weights(state.model)


@torch.no_grad()
def renumber(model, numbers):
    """Let what was token t of a whole model be token numbers[t]."""
    for name, weight in model.named_parameters() if numbers is not None else ():
        if name in ("tok_embeddings.weight", "output.weight"):
            weight.copy_(weight[numbers.argsort()])


def whole_weights(model):
    orders, weights = row_orders(model), {}
    for name, tensor in model.state_dict().items():
        tensor = to_file_order(tensor, orders[name]) if name in orders else tensor
        weights[name.removeprefix("module.")] = (
            tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        ).clone()
    return weights


def difference(one, other):
    """Largest difference of a loss, of a weight."""
    losses = max(abs(a - b) for a, b in zip(one[0], other[0], strict=True))
    return losses, max((one[1][name] - other[1][name]).abs().max().item() for name in one[1])


def rank_of(rank, mesh, size, port, families, args, folder):
    """The work of one rank: a training for each family, beside the stored one."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = {}
    with start_world("cpu", timeout_seconds=120) as world:
        world = dataclasses.replace(world, mesh=mesh_shape(ParallelConfig(mesh=mesh), size))
        for family in families:
            try:
                found[family] = difference(
                    trained(build(world, family, args), args), torch.load(folder / f"{family}.pt", weights_only=True)
                )
            except ConfigError as error:
                found[family] = f"refused: {error}"
    if rank == 0:
        torch.save(found, folder / "found.pt")


def on_ranks(mesh, families, args, folder):
    """Differences of `mesh` from one process, by family; a text where it was refused."""
    size = shape_for(parse_mesh(mesh), max(1, torch.tensor(list(parse_mesh(mesh).values())).prod().item())).size
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (mesh, size, port, families, args, folder)
    torch.multiprocessing.start_processes(rank_of, arguments, nprocs=size, start_method="fork")
    return torch.load(folder / "found.pt", weights_only=True)


def alone(families, args, folder):
    """Stores what one process gives; what it differs by from itself in another order."""
    own = {name: {} for name in ALONE}
    for family in families:
        expected = trained(build(World(), family, args), args, accum=1)
        torch.save(expected, folder / f"{family}.pt")
        for name, how in ALONE.items() if not args.only_meshes else ():
            so = argparse.Namespace(**{**vars(args), "dtype": how.get("dtype", args.dtype)})
            order = {key: value for key, value in how.items() if key != "dtype"}
            own[name][family] = difference(trained(build(World(), family, so), so, **{"accum": 1, **order}), expected)
    return own


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", nargs="*", default=meshes())
    parser.add_argument("--only-meshes", action="store_true", help="leave out one process beside itself")
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--eps", type=float, default=1e-5)
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon", "lion"))
    parser.add_argument("--muon-ns-precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument(
        "--accum", type=int, default=1, help="micro-batches of a step on the mesh; one process: all in one"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"), help="of the weights")
    args = parser.parse_args()
    began, worst = time.perf_counter(), [0.0, 0.0]
    print("| mesh | " + " | ".join(args.family) + " |\n|---|" + "---|" * len(args.family))
    with tempfile.TemporaryDirectory() as folder:
        for name, found in alone(args.family, args, Path(folder)).items():
            if found:
                say(name, found, args.family)
        for mesh in args.mesh:
            families = [family for family in args.family if "ep" not in mesh or family == "experts"]
            found = on_ranks(mesh, families, args, Path(folder)) if families else {}
            say(mesh, found, args.family)
            for figures in found.values():
                worst = worst if isinstance(figures, str) else list(map(max, worst, figures))
    print(f"at most {worst[0]:.1e} in a loss, {worst[1]:.1e} in a weight; {time.perf_counter() - began:.0f} s")


def say(name, found, families):
    cells = []
    for family in families:
        figures = found.get(family, "–")
        cells.append(figures if isinstance(figures, str) else f"{figures[0]:.0e} {figures[1]:.1e}")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
