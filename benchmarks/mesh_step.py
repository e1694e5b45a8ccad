"""A training step on a mesh of ranks: time, model FLOPs utilisation, memory beside --dry-run's, communication and what
of it is hidden behind computation.

    python -m torch.distributed.run --standalone --nproc-per-node=8 benchmarks/mesh_step.py --model open_lm_1b \
        [--mesh fsdp=8 …] [--how plain compiled compiled,recomputed compiled,rowwise …] [--sequences 8]

Without a launcher it is one rank. One line for each mesh and each way: compiled (--torchcompile), recomputed
(--grad-checkpointing), rowwise and tensorwise (--float8), with commas between. On CPUs times are those of gloo, and
memory and kernels are not measured.
"""

import argparse
import gc
import itertools
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from open_lm.data.batch import Batch
from open_lm.distributed import start_world
from open_lm.model.config import ModelFlags, resolve_architecture
from open_lm.model.describe import model_size
from open_lm.precision import Precision
from open_lm.run.mesh_costs import rank_costs
from open_lm.tracking.devices import peak_flops
from open_lm.train.backends import prepare_backends
from open_lm.train.config import OptimizerConfig, ParallelConfig, mesh_shape
from open_lm.train.context_parallel import sequence_part
from open_lm.train.init_model import build_wrapped
from open_lm.train.optim import build_optimizers
from open_lm.train.run_length import RunLength
from open_lm.train.state import TrainState
from open_lm.train.step import train_step
from open_lm.train.tasks import NextToken
from open_lm.train.timing import Timing

WARM_UP = 3
HOW = {
    "plain": {},
    "compiled": {"torchcompile": True},
    "recomputed": {"grad_checkpointing": True},
    "rowwise": {"float8": "rowwise"},
    "tensorwise": {"float8": "tensorwise"},
}
GIB = 2**30


def build(config, world, flags):
    """The training state, as a run would build it."""
    precision = Precision(flags.precision, world.device.type)
    prepare_backends(flags, world.device, config.seq_len, config.vocab_size)
    model = build_wrapped(config, world, flags, 0, precision.weight_dtype).train()
    return TrainState(
        model=model,
        optimizers=build_optimizers(model, OptimizerConfig(), 1e-4),
        precision=precision,
        lr_at=lambda step: 1e-4,
        run_length=RunLength((10**6,), config.seq_len),
        task=NextToken(1e-4),
        world=world,
        part=sequence_part(world),
    )


def one_step(state, config, n):
    """A step on `n` random sequences; those of one data rank are the same on its ranks."""
    dice = torch.Generator().manual_seed(state.world.data_rank)
    batch = Batch.from_samples(torch.randint(0, config.vocab_size, (n, config.seq_len + 1), generator=dice))
    batch = batch.to(state.world.device)
    batch = batch if state.part is None else batch.of_part(state.part)
    train_step(state, batch, accum=1, clip=1.0, timing=Timing(state.world.device))


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(state, config, n, rounds):
    """Seconds of a step, the mean over `rounds` of them after a few others."""
    for _ in range(WARM_UP):
        one_step(state, config, n)
    if state.world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait(state.world.device)
    began = time.perf_counter()
    for _ in range(rounds):
        one_step(state, config, n)
    wait(state.world.device)
    return (time.perf_counter() - began) / rounds


def hidden_share(intervals, others):
    """`(length of intervals, share of it that others cover)`; both as sorted (start, end), which may overlap."""
    total, covered = 0.0, 0.0
    for start, end in merged(intervals):
        total += end - start
        covered += sum(max(0.0, min(end, e) - max(start, s)) for s, e in merged(others) if s < end and e > start)
    return total, covered / total if total else 0.0


def merged(intervals):
    """Intervals without overlaps."""
    result = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1][1] = max(result[-1][1], end)
        else:
            result.append([start, end])
    return result


def communication(state, config, n):
    """`(milliseconds of NCCL's kernels in a step, share hidden behind other kernels)`; None without a GPU."""
    if state.world.device.type != "cuda":
        return None
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        one_step(state, config, n)
        wait(state.world.device)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = {True: [], False: []}
    for event in kernels:
        spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    return hidden_share(spans[True], spans[False])


def bandwidth(world, n_bytes=1 << 28):
    """GB/s that a rank receives in an all-gather over all ranks."""
    part = torch.ones(n_bytes // 4 // world.size, device=world.device)
    whole = torch.empty(part.numel() * world.size, device=world.device)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    for k in range(6):
        if k == 2:
            wait(world.device)
            began = time.perf_counter()
        gather(whole, part)
    wait(world.device)
    return 4 * (whole.numel() - part.numel()) * 4 / (time.perf_counter() - began) / 1e9


def row(config, world, flags, args):
    """One line of the table."""
    world = replace(world, mesh=mesh_shape(flags, world.size))
    shape = world.shape
    state = build(config, world, flags)
    seconds = seconds_of(state, config, args.sequences, args.rounds)
    flops = args.sequences * shape.n_data * config.seq_len * model_size(config).flops_per_token / world.size / seconds
    on_gpu = world.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(world.device)) if on_gpu else None
    held = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    costs = rank_costs(
        config, shape, sequences=args.sequences, accum=1, precision=flags.precision,
        sharded=not shape.is_plain, recompute=flags.grad_checkpointing,
    )  # fmt: skip
    sent = communication(state, config, args.sequences)
    figures = [
        f"{1000 * seconds:.1f}",
        f"{args.sequences * shape.n_data * config.seq_len / seconds / world.size:,.0f}",
        f"{flops / 1e12:.1f}",
        f"{flops / peak:.1%}" if peak else "–",
        f"{held:.2f}" if held else "–",
        f"{costs.held / GIB:.2f}",
        *(("–", "–") if sent is None else (f"{sent[0] / 1000:.1f}", f"{sent[1]:.0%}")),
    ]
    return " | ".join(figures) + " |"


def flags_of(mesh, how, precision):
    """The flags of one line."""
    settings = {}
    for word in how.split(","):
        settings |= HOW[word]
    return ParallelConfig(mesh=mesh, precision=precision, **settings)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_lm_160m")
    parser.add_argument("--mesh", nargs="+", default=[None])
    parser.add_argument("--sequences", type=int, default=8, help="on each data rank, in one micro-batch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="amp_bf16")
    parser.add_argument("--how", nargs="+", default=["plain"], help=f"{', '.join(HOW)}, or several with commas")
    args = parser.parse_args()
    config = resolve_architecture(ModelFlags(model=args.model))
    with start_world(args.device) as world:
        say = print if world.is_master else lambda *_, **__: None
        say(f"{args.model}, {args.sequences} x {config.seq_len} tokens a data rank, {world.size} x {world.device.type}")
        if world.size > 1:
            say(f"all-gather: {bandwidth(world):.1f} GB/s received a rank")
        say("| mesh | how | ms | tokens/s a rank | TFLOP/s | MFU | peak GiB | dry-run GiB | NCCL ms | hidden |")
        say("|---|---|" + "---:|" * 8)
        for mesh, how in itertools.product(args.mesh, args.how):
            try:
                figures = row(config, world, flags_of(mesh, how, args.precision), args)
            except torch.OutOfMemoryError:
                figures = "out of memory |"
            say(f"| {mesh or 'dp=-1'} | {how} | {figures}", flush=True)
            torch._dynamo.reset()
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
