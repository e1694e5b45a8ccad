"""The `World` of ranks: its devices, and the few things ranks tell each other."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from open_lm.errors import DeviceError, OpenLMError, everywhere
from open_lm.flags import late_names
from open_lm.mesh import AXES, MeshShape

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=1)
"""Time that ranks wait for one that reads or writes files: the slowest disk decides, the watchdog sees what hangs. A
rank that ended is noticed at once all the same."""

_LEFT: list[Any] = []
"""The process groups that were left, kept until the process ends. Gloo's destructor holds Python's lock while it waits
for a thread that may need that lock to let go of a tensor: a run that was done never ended (seen with torch 2.13)."""


@dataclass(frozen=True)
class World:
    """The ranks of a run as one of them sees it. With one process every method works without communication."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: MeshShape | None = None
    """Division of data and model among the ranks; None: each has other data and the whole model."""
    patient: dist.ProcessGroup | None = field(default=None, compare=False)
    """The ranks once more, over gloo with PATIENCE: for what waits on files. None: the default group."""

    @property
    def shape(self) -> MeshShape:
        """The mesh of the ranks."""
        return self.mesh or MeshShape(dp=self.size)

    @property
    def data_rank(self) -> int:
        """Number of this rank's share (of `shape.n_data`) of the sequences."""
        return self.shape.data_rank(self.rank)

    @property
    def share_rank(self) -> int:
        """Number of this rank among the `shape.n_shares` with work of their own; those of one tp group do the same."""
        return self.shape.share_rank(self.rank)

    @property
    def meshes(self) -> Meshes:
        """torch's device meshes of the ranks, made once; the first call is for all ranks together."""
        return _meshes(self.shape, self.device.type)

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks with data of their own, on this rank's device."""
        total = values.detach().to(self.device, copy=True)
        if self.shape.n_shares > 1:
            dist.all_reduce(total, group=self.meshes.shares if self.shape.tp > 1 else None)
        return total

    def sum_with_claims(self, values: Tensor, claims: Sequence[bool]) -> tuple[Tensor, Tensor | None]:
        """The sum of `values` as `sum` gives it, and of each of `claims` the number of ranks that make it.

        One exchange for both. Without claims, or with one process, the second is None.
        """
        if not claims or self.size == 1:
            return self.sum(values), None
        own = [values.new_full((1,), int(claim)) for claim in claims]  # filled there: a copy would wait for the GPU
        total = torch.cat((values.detach().reshape(-1), *own)).to(self.device)
        dist.all_reduce(total)  # over all ranks, those of one tp group too: they count the same
        counts, made = total.split((values.numel(), len(claims)))
        counts = counts / self.shape.tp if counts.is_floating_point() else counts // self.shape.tp
        return counts.reshape(values.shape), made

    def any(self, claim: bool) -> bool:
        """Whether `claim` holds on at least one rank; every rank gets the same answer. No rank waits for its GPU."""
        if self.size == 1:
            return claim
        claims = torch.tensor(int(claim))
        dist.all_reduce(claims)
        return bool(claims.item())

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"), group=self.patient)
        return box[0]

    def wait_for_all(self) -> None:
        """Return when every rank has called this, however long that takes."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def gather_shares(self, value: Any) -> list[Any]:
        """The `value` of every rank with data of its own, in order, on every rank."""
        return self.gather(value)[:: self.shape.tp]

    def on_rank0(self, work: Callable[[], T]) -> T:
        """The result of `work` on rank 0, on every rank; an OpenLMError it raises is raised on every rank."""
        if self.size == 1:
            return work()
        outcome: Any = None
        if self.is_master:
            try:
                outcome = work()
            except OpenLMError as error:
                outcome = error
        outcome = self.broadcast(outcome)
        if isinstance(outcome, OpenLMError):
            raise everywhere(outcome)
        return outcome


class Meshes:
    """The ranks as torch's device meshes, each made when it is first asked for, by all ranks together."""

    def __init__(self, shape: MeshShape, device_type: str):
        self._shape, self._device_type = shape, device_type

    @cached_property
    def _world(self) -> DeviceMesh:
        return init_device_mesh(self._device_type, (self._shape.size,), mesh_dim_names=("world",))

    @cached_property
    def weights(self) -> DeviceMesh:
        """Over which FSDP shards weights: a row of ranks, or rows of copies where there are several."""
        return self._dense["copy", "shard"] if self._shape.dp > 1 else self._dense["shard"]

    @cached_property
    def tensor(self) -> DeviceMesh:
        """The ranks that divide each matrix of this one."""
        return self._dense["divide"]

    @cached_property
    def _dense(self) -> DeviceMesh:
        shape = self._shape
        return self._world._unflatten(0, (shape.dp, shape.n_shards, shape.tp), ("copy", "shard", "divide"))

    @cached_property
    def context(self) -> DeviceMesh:
        """The ranks that share out the sequences of this one."""
        return self._world._unflatten(0, tuple(getattr(self._shape, axis) for axis in AXES), AXES)["cp"]

    @cached_property
    def experts(self) -> DeviceMesh:
        """The ranks that share out the experts, in rows of those that divide each matrix where there are several."""
        return self._sparse["expert", "expert_divide"] if self._shape.tp > 1 else self._sparse["expert"]

    @cached_property
    def expert_weights(self) -> DeviceMesh:
        """Over which FSDP shards the weights of the experts that a rank holds."""
        return self._sparse["expert_copy", "expert_shard"] if self._shape.dp > 1 else self._sparse["expert_shard"]

    @cached_property
    def _sparse(self) -> DeviceMesh:
        shape = self._shape
        sizes = (shape.dp, shape.fsdp * shape.cp, shape.ep, shape.tp)
        return self._world._unflatten(0, sizes, ("expert_copy", "expert_shard", "expert", "expert_divide"))

    @cached_property
    def shares(self) -> dist.ProcessGroup:
        """One rank of every group that does the same work, this one among them."""
        shape = self._shape
        return self._world._unflatten(0, (shape.n_shares, shape.tp), ("share", "same"))["share"].get_group()


_MESHES: dict[tuple[Any, ...], Meshes] = {}


def _meshes(shape: MeshShape, device_type: str) -> Meshes:
    group = dist.distributed_c10d._get_default_group()
    key = (shape, device_type, id(group))
    if key not in _MESHES:
        _MESHES[key] = Meshes(shape, device_type)
    return _MESHES[key]


def ranks_from_environment(env: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """`(rank, world size, local rank)` as torchrun, SLURM or OpenMPI told this process; (0, 1, 0) when none did."""
    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ):
        if rank in env and size in env:
            return int(env[rank]), int(env[size]), int(env.get(local, 0))
    return 0, 1, 0


def process_group_backend(name: str | None, device: torch.device) -> str:
    """The back end of collectives: always gloo for tensors on CPUs, `name` (None: nccl) for those on GPUs."""
    return f"cpu:gloo,cuda:{name or 'nccl'}" if device.type == "cuda" else name or "gloo"


def pick_device(name: str, local_rank: int, *, by_rank: bool = True) -> torch.device:
    """The device of this rank: `name` is auto (a GPU when there is one), cpu or cuda.

    Raises:
        DeviceError: `cuda` was asked for and there is none, or there are fewer GPUs than local ranks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch sees no GPU here. Use --device cpu, or install a CUDA build of torch.")
    index = local_rank if by_rank else 0
    if index >= torch.cuda.device_count():
        n_gpus = torch.cuda.device_count()
        raise DeviceError(
            f"local rank {local_rank} has no GPU: {n_gpus} found. Set --nproc-per-node to at most {n_gpus}."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextlib.contextmanager
def start_world(
    device: str = "auto",
    backend: str | None = None,
    *,
    init_method: str = "env://",
    timeout_seconds: float = 600,
    device_by_rank: bool = True,
    force_group: bool = False,
    mesh: Callable[[int], MeshShape] | None = None,
) -> Iterator[World]:
    """Join the ranks that were launched together and leave them when the block ends.

    `backend` None means nccl for GPUs and gloo for CPUs; `force_group` makes a process group even for one rank; `mesh`
    gives the shape for a number of ranks.
    """
    rank, size, local_rank = ranks_from_environment()
    world = World(
        rank, size, local_rank, pick_device(device, local_rank, by_rank=device_by_rank), mesh(size) if mesh else None
    )
    if size == 1 and not force_group:
        yield world
        return
    if init_method == "env://":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group(
        process_group_backend(backend, world.device),
        init_method=init_method,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        device_id=world.device if world.device.type == "cuda" else None,
    )
    is_lost = False
    try:
        yield replace(world, patient=patient_group())
    except BaseException as error:
        is_lost = not isinstance(error, OpenLMError) or isinstance(error, DeviceError)
        raise
    finally:
        leave(world, is_lost=is_lost)


def patient_group() -> dist.ProcessGroup:
    """All ranks once more, over gloo with PATIENCE; those that do not join within the timeout of the default group are
    lost. Every rank must call this."""
    joining = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
    group = dist.new_group(backend="gloo", timeout=joining)
    dist.distributed_c10d._set_pg_timeout(PATIENCE, group)
    return group


def leave(world: World, *, is_lost: bool) -> None:
    """Leave the other ranks. After a failure on GPUs (`is_lost`) the groups are left to the end of the process: NCCL
    would wait for collectives that another rank never joins, and hide the error behind a hang."""
    _LEFT.extend(dist.distributed_c10d._world.pg_map)
    if not (is_lost and world.device.type == "cuda"):
        dist.destroy_process_group()


__getattr__ = late_names(
    __name__,
    "open_lm.compat.ranks",
    ("broadcast_object", "init_distributed_device", "is_master", "world_info_from_env"),
)
