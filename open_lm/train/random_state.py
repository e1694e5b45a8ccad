"""Random numbers of each rank (dropout, noise): different on every rank, saved, and the same after a resume."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Reseed torch's generators from the run's seed, this rank and the step."""
    text = f"random numbers of seed {seed}, rank {rank}, from step {step}"
    torch.manual_seed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little"))


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of this rank's generators, as plain tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(
    saved: Sequence[dict[str, Any]] | None, *, device: torch.device, rank: int, size: int, seed: int, step: int
) -> None:
    """Go on with the numbers of this rank where `saved`, one state a rank, left them; with another number of ranks, or
    another kind of device, from new ones that follow from seed, step and rank."""
    mine = saved[rank] if saved and len(saved) == size else None
    if mine is None or ("cuda" in mine) != (device.type == "cuda"):
        if saved is not None:
            logging.info("random numbers restart at step %d: the checkpoint is of other ranks or devices.", step)
        seed_rank(seed, rank, step)
        return
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], device)
