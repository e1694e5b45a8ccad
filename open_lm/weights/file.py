"""Weight files, read as data, never as code, without the name prefixes that wrappers leave."""

from __future__ import annotations

import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from open_lm import storage
from open_lm.errors import CheckpointError, OpenLMError
from open_lm.model.lora import is_addition, without_additions
from open_lm.weights.openlm_names import from_openlm

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Names that DDP, compile, FSDP and activation checkpointing insert between the parts of a name, in any order."""

INNER = "model."
"""Prefix of names in a class around OpenLM's model, as in DCLM's folders on the Hub."""

NUMPY_SCALARS = [
    numpy.dtype,
    *(type(numpy.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")),
    (numpy._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]
    (numpy._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
]
"""Beside torch's own list: OpenLM's optimizer files hold learning rates as numpy scalars."""


def load_file(path: str) -> dict[str, Any]:
    """The dict in a .pt file, or the tensors of a .safetensors file, on the CPU and, if local, mapped, not read.

    Raises:
        CheckpointError: the file is missing, damaged, holds anything but plain data, or expands beyond its own size.
    """
    try:
        if not storage.is_remote(path):
            return _load_local(storage.local_path(path), path)
        with tempfile.NamedTemporaryFile(suffix=Path(path).suffix) as copy, storage.open_read(path) as source:
            shutil.copyfileobj(source, copy, 16 << 20)
            copy.flush()
            return _load_local(Path(copy.name), path)
    except OpenLMError as error:
        raise CheckpointError(str(error)) from error


def _load_local(path: Path, shown: str) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{shown}: no such file. Give an epoch_K.pt.")
    if path.suffix == ".safetensors":
        return _load_safetensors(path, shown)
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _require_plain_archive(path, shown)
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{shown}: {_unpickling_reason(error)}") from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{shown}: damaged or not a checkpoint ({reason}). Use another copy.") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{shown}: holds a {type(content).__name__}, not a dict of weights.")
    return dict(content)


def _load_safetensors(path: Path, shown: str) -> dict[str, Any]:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{shown}: damaged or not safetensors ({error}). Use another copy.") from error


def _unpickling_reason(error: pickle.UnpicklingError) -> str:
    """The fault of a pickle, from torch's long message."""
    for line in str(error).splitlines():
        if "Unsupported global: GLOBAL" in line or "Unsupported class" in line:
            name = line.split("GLOBAL")[-1].split()[0] if "GLOBAL" in line else line
            return (
                f"it holds an object of type {name}, which could run code when read. If you trust its origin, read it "
                "once with torch.load(path, weights_only=False) and torch.save its state_dict alone."
            )
    reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
    return f"damaged, no checkpoint, or more than plain data ({reason}). Use another copy."


def _require_plain_archive(path: Path, shown: str) -> None:
    """Refuse archives that torch.save does not write: compressed, overlapping or absolute members, paths with `..`."""
    try:
        members = zipfile.ZipFile(path).infolist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{shown}: damaged ({error}). Use another copy.") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{shown}: holds compressed members, which torch.save never writes. Refused.")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{shown}: claims to hold more bytes than the file has. Refused.")
    for member in members:
        if member.filename.startswith(("/", "\\")) or ".." in Path(member.filename).parts:
            raise CheckpointError(f"{shown}: holds the member {member.filename!r}, a path outside itself. Refused.")


def clean_state_dict(state: Mapping[str, Any], *, merge: bool = True) -> dict[str, Tensor]:
    """The bare weights of a bare or wrapped dict, under our names: no wrappers' prefixes, none of OpenLM's own names.

    With `merge` they are those of a plain model: adapters are merged, value heads left out.

    Raises:
        CheckpointError: there are no weights in it, or experts have something that ours have not.
    """
    weights = from_openlm(named_weights(state))
    return without_additions(weights) if merge and any(map(is_addition, weights)) else weights


def named_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same under the names of the program that wrote them.

    Raises:
        CheckpointError: there are no weights in it.
    """
    weights = {plain_name(name): tensor for name, tensor in tensors_in(state).items()}
    if f"{INNER}tok_embeddings.weight" in weights:
        return {name.removeprefix(INNER): tensor for name, tensor in weights.items()}
    return weights


def tensors_in(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The dict of tensors in `state`: itself, its `state_dict`, or the one dict of weights that it wraps otherwise."""
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if state and all(isinstance(value, Tensor) for value in state.values()):
        return state
    inner = [value for value in state.values() if isinstance(value, Mapping) and _looks_like_weights(value)]
    if len(inner) == 1:
        return inner[0]
    found = ", ".join(list(map(str, state))[:8]) or "nothing"
    raise CheckpointError(f"no weights in this checkpoint: found {found}. Give an epoch_K.pt or bare weights.")


def _looks_like_weights(value: Mapping[str, Any]) -> bool:
    return (
        bool(value) and all(isinstance(v, Tensor) for v in value.values()) and any(v.ndim > 1 for v in value.values())
    )


def plain_name(name: str) -> str:
    """A parameter's name without what DDP and torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
