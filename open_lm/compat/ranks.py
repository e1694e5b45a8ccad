"""Ranks as OpenLM's scripts see them: `world_info_from_env`, `init_distributed_device`, `is_master`, …"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist

from open_lm.distributed import pick_device, process_group_backend, ranks_from_environment


def world_info_from_env() -> tuple[int, int, int]:
    """`(local rank, global rank, world size)` as torchrun, SLURM or OpenMPI told this process."""
    rank, size, local_rank = ranks_from_environment()
    return local_rank, rank, size


def init_distributed_device(args: Namespace) -> torch.device:
    """Join the ranks that were launched together, and set `distributed`, `world_size`, `rank`, `local_rank`, `device`.

    Raises:
        DeviceError: there are fewer GPUs than ranks.
    """
    args.local_rank, args.rank, args.world_size = world_info_from_env()
    device = pick_device(getattr(args, "device", None) or "auto", args.local_rank)
    args.distributed = args.world_size > 1 or bool(getattr(args, "force_distributed", False))
    if args.distributed and not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        backend = process_group_backend(getattr(args, "dist_backend", None), device)
        dist.init_process_group(
            backend if device.type == "cuda" else "gloo", rank=args.rank, world_size=args.world_size
        )
    args.device = str(device)
    return device


def is_master(args: Namespace, local: bool = False) -> bool:
    """Whether this is rank 0, of the run or of its machine."""
    return getattr(args, "local_rank" if local else "rank", 0) == 0


def broadcast_object(args: Namespace, obj: Any, src: int = 0) -> Any:
    """The object of rank `src`, on every rank."""
    if not dist.is_initialized():
        return obj
    box = [obj if args.rank == src else None]
    dist.broadcast_object_list(box, src=src, device=torch.device("cpu"))
    return box[0]
