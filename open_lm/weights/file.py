"""Weight files: read as data, never as code, and their weights under our names.

Other names are those of wrappers (DDP, compile, FSDP) and OpenLM's own: its gelu layers twice over, its experts as
MegaBlocks has them. Shapes: E experts, D model width, F hidden width of an expert.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from open_lm import storage
from open_lm.errors import CheckpointError, OpenLMError
from open_lm.model.lora import is_addition, without_additions

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Names that DDP, compile, FSDP and activation checkpointing insert between the parts of a name, in any order."""

INNER = "model."
"""Prefix of names in a class around OpenLM's model, as in DCLM's folders on the Hub."""

ROUTER = "feed_forward.router.layer.weight"
SECOND_NAMES = {"_ff_w1.weight": "feed_forward.0.weight", "_ff_w2.weight": "feed_forward.2.weight"}
"""Names under which OpenLM stores the two matrices of a gelu layer once more."""

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
    return our_weights(named_weights(state), merge=merge)


def our_weights(named: Mapping[str, Tensor], *, merge: bool = True) -> dict[str, Tensor]:
    """As `clean_state_dict`, of what `named_weights` gave.

    Raises:
        CheckpointError: experts have something that ours have not.
    """
    weights = from_openlm(named)
    return without_additions(weights) if merge and any(map(is_addition, weights)) else weights


def named_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The bare weights of a bare or wrapped dict, under the names of the program that wrote them.

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


def has_megablocks(names: Iterable[str]) -> bool:
    """Whether experts lie as MegaBlocks lays them."""
    return any(name.endswith(ROUTER) for name in names)


def has_plain_megablocks(names: Collection[str]) -> bool:
    """Whether experts lie as MegaBlocks lays them and have no gates: those of its own MLP."""
    return has_megablocks(names) and not any(name.endswith(".experts.mlp.v1") for name in names)


def from_openlm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under our names.

    Raises:
        CheckpointError: experts have something that ours have not; named.
    """
    kept = {name: tensor for name, tensor in weights.items() if "._ff_w1" not in name and "._ff_w2" not in name}
    for name in [name for name in kept if name.endswith(ROUTER)]:
        kept |= _experts_from_megablocks(kept, name.removesuffix(ROUTER))
    return kept


def only_name(name: str) -> str:
    """One name of the two that a matrix may have."""
    for second, first in SECOND_NAMES.items():
        name = name.replace(second, first)
    return name.replace("._ff_w", ".feed_forward.experts.mlp.w")


def moments_from_openlm(state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """An optimizer's moments of each weight, by our names and in our layout.

    Raises:
        CheckpointError: experts have something that ours have not; named.
    """
    out: dict[str, dict[str, Any]] = {}
    for kind in sorted({kind for moments in state.values() for kind in moments}):
        gathered = {name: moments[kind] for name, moments in state.items() if kind in moments}
        shaped = {name: value for name, value in gathered.items() if isinstance(value, Tensor) and value.ndim}
        plain = {our_name(name): value for name, value in gathered.items() if name not in shaped}
        for name, value in (plain | from_openlm(shaped)).items():
            out.setdefault(name, {})[kind] = value
    return {name: moments for name, moments in out.items() if not name.endswith(".experts.bias")}


def our_name(name: str) -> str:
    """Our name of a weight that the layout of MegaBlocks calls `name`."""
    return name.replace(".router.layer.", ".router.").replace(".mlp.w1", ".w12").replace(".mlp.w2", ".w3")


def to_openlm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names, and in the layout, that OpenLM's own code reads."""
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, part, rest = name.partition("feed_forward.")
        if part and rest == "router.weight":
            out[f"{layer}{ROUTER}"] = tensor
        elif part and rest in ("experts.w12", "experts.w3"):
            number = "1" if rest == "experts.w12" else "2"
            out[f"{layer}_ff_w{number}"] = out[f"{layer}feed_forward.experts.mlp.w{number}"] = tensor.mT.contiguous()
        else:
            out[name] = tensor
            out |= {layer + second: tensor for second, first in SECOND_NAMES.items() if part + rest == first}
        if part and rest == "experts.w3":  # never read there, but part of the state
            out[f"{layer}feed_forward.experts.bias"] = tensor.new_zeros(tensor.shape[1])
    return out


def _experts_from_megablocks(weights: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """The experts of one layer, taken out of `weights`.

    MegaBlocks' MoE keeps w1 as (E, D, F) and w2 as (E, F, D); its dropless one all of w1, v1 and w2 as (E F, D).
    """
    router = weights.pop(layer + ROUTER)
    prefix = f"{layer}feed_forward.experts."
    parts = {name: weights.pop(prefix + name, None) for name in ("mlp.w1", "mlp.v1", "mlp.w2", "bias")}
    w1, v1, w2, bias = parts.values()
    if w1 is None or w2 is None:
        raise CheckpointError(f"{prefix}mlp.w1 or w2 is missing beside {layer}{ROUTER}. Use another copy.")
    if bias is not None and bias.any():
        raise CheckpointError(f"{prefix}bias is not zero: our experts have no biases.")
    n_experts = len(router)
    if w1.ndim == 2:
        w1, w2 = w1.unflatten(0, (n_experts, -1)), w2.unflatten(0, (n_experts, -1)).mT
        v1 = None if v1 is None else v1.unflatten(0, (n_experts, -1))
    else:
        w1, w2 = w1.mT, w2.mT
    return {
        f"{layer}feed_forward.router.weight": router,
        f"{layer}feed_forward.experts.w12": (w1 if v1 is None else torch.cat((w1, v1), dim=1)).contiguous(),
        f"{layer}feed_forward.experts.w3": w2.contiguous(),
    }
