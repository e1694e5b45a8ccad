"""`openlm convert-llama`: Llama's original weights (params.json, consolidated.*.pth) to a checkpoint of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_lm import storage
from open_lm.errors import CheckpointError, ConfigError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

SPLIT_ALONG_INPUTS = ("attention.wo.weight", "feed_forward.w2.weight")
"""Weights of which every shard holds some columns; of the other matrices it holds some rows."""


@dataclass(frozen=True)
class ConvertConfig:
    """Convert"""

    input_dir: str = flag("", "Folder with params.json and consolidated.*.pth.")
    out: str = flag("", "File to write, such as llama.pt; it must not exist.")
    seq_len: int = flag(4096, "Tokens of context, which params.json does not say: 2048 for Llama 1, 4096 for Llama 2.")

    def __post_init__(self) -> None:
        if not self.input_dir:
            raise ConfigError("--input-dir is missing: give the folder with params.json.")
        if not self.out.endswith(".pt"):
            raise ConfigError(f"--out {self.out!r}: give the .pt file to write.")


def main(argv: Sequence[str] | None = None) -> None:
    """Convert as the flags ask."""
    parser = Parser(description=__doc__)
    add_group(parser, ConvertConfig)
    config = read_group(parser.parse_args(argv), ConvertConfig)
    if storage.exists(config.out):
        raise ConfigError(f"--out {config.out} exists: choose another file, or remove it.")
    convert(config)
    print(f"wrote {config.out}", flush=True)


def convert(config: ConvertConfig) -> None:
    """Join the shards, give the weights our names, and write the checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, or the shards do not make up the model.
    """
    from open_lm.checkpoint.load_model import build
    from open_lm.hf.import_ import write_checkpoint

    folder = Path(config.input_dir).expanduser()
    params = read_params(folder / "params.json")
    weights = ours(joined(folder, int(params["dim"])), int(params["n_layers"]))
    model = build(architecture(params, weights, config.seq_len), weights, str(folder), "cpu", None)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    write_checkpoint(model, folder.name, str(folder.resolve()) if has_tokenizer else None, config.out)


def read_params(path: Path) -> dict[str, Any]:
    """The content of params.json.

    Raises:
        CheckpointError: it is missing, no JSON, or lacks a size; or it asks for stretched rotary angles.
    """
    try:
        params = json.loads(path.read_text())
        missing = [name for name in ("dim", "n_layers", "n_heads") if name not in params]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}. Give the folder of the original weights.") from error
    if missing:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing. Give the folder of the original weights.")
    if params.get("use_scaled_rope"):
        raise CheckpointError(f"{path}: use_scaled_rope, which our rotary does not have. Train it with --hf-model.")
    return params


def joined(folder: Path, dim: int) -> dict[str, Tensor]:
    """The weights of all shards put together.

    Raises:
        CheckpointError: there are none, or a file is damaged.
    """
    import torch

    from open_lm.weights.file import load_file

    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(f"{folder}: no consolidated.*.pth in it. Give the folder of the original weights.")
    shards = [load_file(str(file)) for file in files]
    whole = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        if name == "rope.freqs":
            continue
        if parts[0].ndim == 1 or len(parts) == 1:
            whole[name] = parts[0]
        elif name == "tok_embeddings.weight":  # Llama 1 and 2 split its columns, Llama 3 its rows
            whole[name] = torch.cat(parts, 0 if parts[0].shape[1] == dim else 1)
        else:
            whole[name] = torch.cat(parts, 1 if name.endswith(SPLIT_ALONG_INPUTS) else 0)
    return whole


def ours(weights: Mapping[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """The same weights under our names, q, k, v and gate, value packed.

    Raises:
        CheckpointError: one is missing.
    """
    import torch

    try:
        out = {name: weights[name] for name in ("tok_embeddings.weight", "norm.weight", "output.weight")}
        for prefix in (f"layers.{layer}." for layer in range(n_layers)):
            qkv = [weights[f"{prefix}attention.{part}.weight"] for part in ("wq", "wk", "wv")]
            gate_value = [weights[f"{prefix}feed_forward.{part}.weight"] for part in ("w1", "w3")]
            out[prefix + "attention.in_proj.weight"] = torch.cat(qkv)
            out[prefix + "attention.out_proj.weight"] = weights[prefix + "attention.wo.weight"]
            out[prefix + "feed_forward.w12.weight"] = torch.cat(gate_value)
            out[prefix + "feed_forward.w3.weight"] = weights[prefix + "feed_forward.w2.weight"]
            for norm in ("attention_norm.weight", "ffn_norm.weight"):
                out[prefix + norm] = weights[prefix + norm]
    except KeyError as error:
        raise CheckpointError(f"the weights lack {error}: not all shards are here, or it is no Llama.") from error
    return out


def architecture(params: Mapping[str, Any], weights: Mapping[str, Tensor], seq_len: int) -> ModelConfig:
    """Llama's architecture in our terms."""
    n_heads, n_kv_heads = params["n_heads"], params.get("n_kv_heads")
    return ModelConfig(
        hidden_dim=params["dim"],
        n_layers=params["n_layers"],
        n_heads=n_heads,
        n_kv_heads=n_kv_heads if n_kv_heads != n_heads else None,
        seq_len=seq_len,
        vocab_size=weights["output.weight"].shape[0],
        ffn_dim=weights["layers.0.feed_forward.w3.weight"].shape[1],
        norm_eps=params.get("norm_eps", 1e-5),
        rotary_base=float(params.get("rope_theta", 10_000.0)),
        model_norm="rms_norm",
        positional_embedding_type="llama_rotary",
    )
