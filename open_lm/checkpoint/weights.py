"""How weight files are read: only data, never code, whatever prefixes they carry."""

from __future__ import annotations

from typing import Any

import torch

from open_lm import storage
from open_lm.errors import CheckpointError


def load_file(path: str) -> dict[str, Any]:
    """The dict in the file at `path`."""
    try:
        with storage.open_read(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: {error}") from error


def clean_state_dict(state: dict[str, Any]) -> dict[str, Any]:
    """The bare weights, without the prefixes of wrappers."""
    weights = state.get("state_dict", state)
    return {name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in weights.items()}
