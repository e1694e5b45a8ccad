"""Memory of a rank: --dry-run's figure against what ranks hold."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from gloo import run_ranks
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train.test_meshes import make_state

from open_lm.data.batch import Batch
from open_lm.mesh import MeshShape, parse_mesh, shape_for
from open_lm.model.architecture import ModelConfig
from open_lm.run.kept_memory import kept_bytes
from open_lm.run.mesh_costs import costs_of_run, rank_costs
from open_lm.train.averagers import parse_averagers
from open_lm.train.averaging import WeightAverage
from open_lm.train.config import OptimizerConfig, ParallelConfig, mesh_shape
from open_lm.train.step import train_step
from open_lm.train.timing import Timing

CONFIG = {"hidden_dim": 64, "n_heads": 4, "n_kv_heads": 2, "n_layers": 6, "seq_len": 256, "vocab_size": 64,
          "ffn_dim": 192}  # fmt: skip


def own(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def kept_by(state, ids_BT):
    """Bytes that autograd keeps of a forward pass, without weights."""
    kept = {}

    def keep(tensor):
        kept[own(tensor).untyped_storage()._cdata] = own(tensor).untyped_storage()
        return tensor

    batch = Batch(ids_BT, ids_BT)
    batch = batch if state.part is None else batch.of_part(state.part)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        state.model(batch.inputs_BT, **batch.model_inputs, head=lambda hidden, weight: hidden.sum())
        whole = {own(p).untyped_storage()._cdata for p in state.model.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in whole)


def _measure(world, mesh, folder):
    parallel = ParallelConfig(mesh=mesh)
    world = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
    state = make_state(world, parallel, CONFIG)
    held = sum(own(p).nbytes for p in state.model.parameters())
    found = kept_by(state, torch.zeros(4, 256, dtype=torch.long))
    if world.rank == 0:
        torch.save((found, 4 * held), f"{folder}/{mesh}.pt")


@pytest.mark.parametrize("mesh", ["tp=2", "cp=2"])
def test_activations_and_state_of_a_rank_are_as_forecast(tmp_path, mesh):
    run_ranks(_measure, 2, mesh, str(tmp_path))
    activations, state = torch.load(tmp_path / f"{mesh}.pt")
    shape, config = shape_for(parse_mesh(mesh), 2), ModelConfig(**CONFIG)
    costs = rank_costs(config, shape, sequences=4, accum=1, precision="fp32", sharded=True, recompute=False)
    assert costs.state == pytest.approx(state, rel=0.15)
    kept = kept_bytes(config, shape, 4, "fp32", recompute=False)
    assert kept.blocks + kept.around == pytest.approx(activations, rel=0.02)


LARGER = {"hidden_dim": 256, "n_heads": 8, "n_kv_heads": 4, "n_layers": 8, "seq_len": 512, "vocab_size": 2048,
          "ffn_dim": 704}  # fmt: skip


def a_step(state, accum=1):
    size = (8 // state.world.shape.n_data, state.model.config.seq_len + 1)
    batch = Batch.from_samples(torch.randint(0, state.model.config.vocab_size, size))
    batch = batch if state.part is None else batch.of_part(state.part)
    train_step(state, batch, accum=accum, clip=1.0, timing=Timing(state.world.device))


class Held(TorchDispatchMode):
    """The most memory of live tensors beside `own_tensors`, on whichever thread they are let go."""

    def __init__(self, own_tensors):
        super().__init__()
        self._own = {own(tensor).untyped_storage()._cdata for tensor in own_tensors}
        self._seen, self._added, self._last, self.peak = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor, whose own storage is none
                storage = getattr(tensor, "elem", tensor).untyped_storage()  # of one that a collective still writes
                if storage._cdata not in self._own and storage._cdata not in self._seen:
                    self._seen[storage._cdata] = StorageWeakRef(storage)
                    self._added += storage.nbytes()
        if self._last + self._added > self.peak:
            self._recount()
        return result

    def _recount(self):
        live = {key: torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for key, ref in self._seen.items()}
        self._seen = {key: self._seen[key] for key, storage in live.items() if storage is not None}
        self._last, self._added = sum(storage.nbytes() for storage in live.values() if storage is not None), 0
        self.peak = max(self.peak, self._last)


def _peak(world, mesh, changes, flags, how, folder):
    """The most memory that torch held in the second step, when the optimizer's state is there."""
    parallel, accum = ParallelConfig(mesh=mesh, **flags), how.get("accum", 1)
    world = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
    state = make_state(world, parallel, changes, how.get("optimizer", "adamw"), precision=parallel.precision)
    state.averages = [WeightAverage(spec, state.model) for spec in parse_averagers(how.get("averagers"))]
    a_step(state, accum)
    moments = [t for optimizer in state.optimizers for held in optimizer.state.values() for t in held.values()]
    resting = [*state.model.parameters(), *moments, *(t for average in state.averages for t in average._averages)]
    with Held(resting) as held:
        a_step(state, accum)
    if world.rank == 0:
        torch.save(sum(own(tensor).nbytes for tensor in resting) + held.peak, f"{folder}/peak.pt")


SHALLOW = LARGER | {"n_layers": 2}
NARROW = LARGER | {"n_layers": 4, "seq_len": 64}
LISTED = {"hidden_dim": 128, "n_heads": 4, "n_layers": 2, "seq_len": 256, "vocab_size": 16384, "ffn_dim": 352}
EXPERTS = {"n_kv_heads": 8, "moe_freq": 2, "moe_num_experts": 4, "moe_capacity_factor": 0.0}
LIMITED = {"n_kv_heads": 8, "moe_freq": 2, "moe_num_experts": 4}
FULL, LOW = {"precision": "fp32"}, {"precision": "amp_bf16"}
AGAIN = {"precision": "amp_bf16", "grad_checkpointing": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes", "flags", "how"),
    [
        ("cp=2", LARGER, FULL, {}),
        ("tp=2", SHALLOW, LOW, {}),
        ("tp=2", SHALLOW, AGAIN, {}),
        ("cp=2", SHALLOW, AGAIN, {}),
        ("fsdp=2", SHALLOW, LOW, {}),
        ("tp=2", LISTED, FULL, {}),
        ("cp=2", LISTED, FULL, {}),
        ("ep=2", SHALLOW | LIMITED, FULL, {}),
        ("fsdp=2", NARROW, FULL, {"accum": 4, "averagers": "ema_0.9_1,ema_0.99_1"}),
        ("tp=2", NARROW, FULL, {"accum": 4, "averagers": "ema_0.9_1,ema_0.99_1"}),
        ("fsdp=2", NARROW, FULL, {"accum": 4, "optimizer": "lion"}),
        ("fsdp=2", NARROW, FULL | {"fsdp_whole_gradients": True}, {"accum": 2}),
        ("cp=2", LARGER, LOW | {"grad_checkpointing_mode": "every-2"}, {}),
    ],
)
def test_the_peak_of_a_step_is_as_forecast(tmp_path, mesh, changes, flags, how):
    run_ranks(_peak, 2, mesh, changes, flags, how, str(tmp_path))
    assert forecast(mesh, changes, flags, **how).held == pytest.approx(torch.load(tmp_path / "peak.pt"), rel=0.15)


def forecast(mesh, changes, flags, *, accum=1, **optimizer):
    parallel, shape = ParallelConfig(mesh=mesh, **flags), shape_for(parse_mesh(mesh), 2)
    run = SimpleNamespace(parallel=parallel, optimizer=OptimizerConfig(**optimizer))
    return costs_of_run(run, ModelConfig(**changes), shape, sequences=8 // shape.n_data, accum=accum)


def test_traffic_is_what_the_axes_send():
    config = ModelConfig(**CONFIG)

    def traffic(**axes):
        shape = MeshShape(**axes)
        return rank_costs(config, shape, sequences=4, accum=1, precision="fp32", sharded=True, recompute=False).traffic

    assert not any(traffic().values())
    n, tables = sum(p.numel() for p in make_state_parameters(config)), 2 * 64 * 64
    assert traffic(fsdp=4)["fsdp"] == (3 * n - tables) * 4 * 3 // 4
    assert traffic(dp=2)["dp"] == n * 4
    assert traffic(tp=2)["tp"] == (8 * 6 + 4) * 4 * 256 * 64 * 4 // 2
    assert traffic(cp=2)["cp"] == 2 * 6 * 4 * 128 * 2 * 2 * 16 * 4


def make_state_parameters(config):
    from open_lm.model import create_model

    return create_model(config).parameters()


class Received(TorchDispatchMode):
    """Counts the bytes that collectives of two ranks bring to this one."""

    n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        first = (
            sum(t.nbytes for t in (args[0] if isinstance(args[0], list) else args[:1]) if torch.is_tensor(t))
            if args
            else 0
        )
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            self.n_bytes += abs(args[0].nbytes - args[1].nbytes)
        elif name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            self.n_bytes += abs(result.nbytes - first)
        elif name in ("allreduce_", "all_reduce"):
            self.n_bytes += first
        elif name == "all_to_all_single":
            self.n_bytes += result.nbytes // 2
        return result


def _count(world, mesh, changes, flags, folder):
    parallel = ParallelConfig(mesh=mesh, **flags)
    world = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
    state = make_state(world, parallel, changes, precision=parallel.precision)
    a_step(state)
    with Received() as received:
        a_step(state)
    mean = sum(world.gather(received.n_bytes)) / world.size  # one rank's experts may be sent more
    if world.rank == 0:
        torch.save(mean, f"{folder}/{mesh}.pt")


SHORT = {"hidden_dim": 128, "n_heads": 8, "n_kv_heads": 4, "n_layers": 3, "seq_len": 128, "vocab_size": 256,
         "ffn_dim": 384}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes", "flags"),
    [
        ("fsdp=2", {}, FULL),
        ("fsdp=2", {}, {**LOW, "fsdp_amp": True}),
        ("tp=2", {}, LOW),
        ("tp=2", {}, AGAIN),
        ("cp=2", {}, AGAIN),
        ("ep=2", EXPERTS, LOW),
        ("tp=2", EXPERTS, LOW),
    ],
)
def test_traffic_is_what_collectives_bring(tmp_path, mesh, changes, flags):
    run_ranks(_count, 2, mesh, SHORT | changes, flags, str(tmp_path))
    costs = forecast(mesh, SHORT | changes, flags)
    assert sum(costs.traffic.values()) == pytest.approx(torch.load(tmp_path / f"{mesh}.pt"), rel=0.05)
