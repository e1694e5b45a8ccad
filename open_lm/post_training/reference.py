"""Reference models: what preference losses and reinforcement learning keep a model close to.

The reference is held in memory, or is the trained model with its adapter off, or was asked once and is a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from open_lm import storage
from open_lm.checkpoint.load_model import load_model
from open_lm.checkpoint.read import read_checkpoint
from open_lm.data.batch import Batch
from open_lm.data.columns import Column
from open_lm.data.manifest import Shard
from open_lm.data.sources import Source
from open_lm.errors import CheckpointError, ConfigError
from open_lm.model.lora import adapters_of, adapters_off
from open_lm.post_training.config import PreferenceConfig
from open_lm.post_training.log_probs import token_log_probs
from open_lm.post_training.tasks import TaskParts
from open_lm.weights.file import clean_state_dict

COLUMN = "reference_log_prob"
"""Name of the cached log-probabilities of sequences in `Batch.extras`."""

Reference = Callable[[nn.Module, Batch, float], Tensor]
"""`reference(model, batch, temperature)`: the log-probability of each target, (B, T), without gradients."""


def build_reference(parts: TaskParts) -> Reference:
    """The reference that the flags name; `model` is the one in training.

    Raises:
        ConfigError: none is named.
        CheckpointError: it is missing or damaged.
    """
    path, config = reference_path(parts.flags), _preferences(parts.flags)
    if config.reference is None and adapters_of(parts.model):
        return _without_adapter
    if path is None:
        raise ConfigError(f"--task {parts.flags.task.task} needs a reference: give --reference, or start --pretrained.")
    kept = load_model(path, device=str(parts.world.device), dtype=parts.precision.weight_dtype).requires_grad_(False)

    def ask(_: nn.Module, batch: Batch, temperature: float) -> Tensor:
        with torch.no_grad():
            return token_log_probs(kept, batch, temperature)

    return ask


def _without_adapter(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    was_training = model.training
    model.eval()  # no dropout, no noise
    try:
        with torch.no_grad(), adapters_off(model):
            return token_log_probs(model, batch, temperature)
    finally:
        model.train(was_training)


def reference_path(flags: Any) -> str | None:
    """The weights that the flags name as the reference, None for none."""
    start = flags.checkpoint.start
    return _preferences(flags).reference or (start[0] if len(start) == 1 else None)


def _preferences(flags: Any) -> PreferenceConfig:
    return flags.preferences


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A short text that changes with any bit of the weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        if not name.endswith(".inv_freq"):
            tensor = weights[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return f"b2:{digest.hexdigest()}"


def shard_identity(shard: Shard) -> str:
    """The identity of a shard: its checksum.

    Raises:
        ConfigError: its manifest has none.
    """
    if shard.crc32 is None:
        raise ConfigError(f"shard {shard.name}: its manifest has no checksums. Make it with make_wds_manifest.")
    return f"{shard.crc32}-{shard.n_sequences}"


def write_log_probs(url: str, shards: Sequence[Shard], log_probs: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Write the log-probabilities of all samples of `shards`, in their order, (samples, rows)."""
    about = {**facts, "shards": [[shard_identity(shard), shard.n_sequences] for shard in shards]}
    buffer = io.BytesIO()
    np.savez(buffer, log_probs=log_probs, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    storage.write_bytes(url, buffer.getvalue())


def read_log_probs(url: str, sources: Iterable[Source], weights: Mapping[str, Tensor] | None, seq_len: int) -> Column:
    """The column of `sources` that `write_log_probs` wrote.

    Raises:
        CheckpointError: it was computed with other weights.
        ConfigError: it knows nothing of a shard, or was computed at another sequence length.
    """
    with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as content:
        log_probs, about = content["log_probs"], json.loads(content["about"].tobytes())
    shown = f"--reference-log-probs {storage.shown(url)}"
    if weights is not None and about["weights"] != weights_digest(weights):
        raise CheckpointError(f"{shown}: computed with other weights than this run starts from. Compute it again.")
    if about["seq_len"] != seq_len:
        raise ConfigError(f"{shown}: computed at a sequence length of {about['seq_len']}, here it is {seq_len}.")
    ends = np.cumsum([n for _, n in about["shards"]])
    parts = dict(zip([name for name, _ in about["shards"]], np.split(log_probs, ends[:-1]), strict=True))
    with contextlib.suppress(KeyError):
        return Column([[parts[shard_identity(shard)] for shard in source.shards] for source in sources])
    raise ConfigError(f"{shown}: computed of other data: a shard is not in it. Compute it again.")


def start_weights(path: str) -> dict[str, Tensor]:
    """The weights that `path` names, as a plain model has them."""
    return clean_state_dict(read_checkpoint(path))
