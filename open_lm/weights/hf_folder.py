"""Folders of transformers models, read without running any of their code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from open_lm.errors import CheckpointError
from open_lm.model.architecture import MambaConfig, ModelConfig
from open_lm.model.feed_forward import default_width
from open_lm.weights.file import clean_state_dict, load_file, tensors_in
from open_lm.weights.from_hf import from_native

INNER_KEYS = ("params_args_dict", "params")
"""Keys under which folders on the Hub keep OpenLM's parameters: DCLM's, and those of PyTorchModelHubMixin."""

OPENLM_NAMES = {
    "dim": "hidden_dim", "apply_qk_norm": "qk_norm", "norm_type": "model_norm", "window": "sliding_window",
}  # fmt: skip
"""Names of OpenLM's parameters that its JSON files call otherwise."""

WHOLE = ("model.safetensors", "pytorch_model.bin")
"""Names of transformers for a file with all weights; what lies beside it is something else."""

EXPERT_KEYS = ("moe_num_experts", "moe_top_k", "moe_expert_type", "moe_capacity_factor", "moe_loss_weight")
"""Parameters that a model without experts may state all the same."""


def from_transformers(folder: Path) -> tuple[ModelConfig | None, dict[str, Tensor]]:
    """Our config and weights of the model in `folder`; None for a config.json that says nothing of an architecture.

    Raises:
        CheckpointError: the folder is damaged, or the model has something that our architectures do not; named.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json in it. Give a folder that holds a model as transformers writes it."
        )
    values = _read_json(folder / "config.json")
    stored: dict[str, Tensor] = {}
    for file in weight_files(folder):
        stored |= tensors_in(load_file(str(file)))
    weights = clean_state_dict(stored)
    try:
        if values.get("model_type", "open_lm") in ("open_lm", "openlm"):
            return own_config(values, f"{folder}/config.json"), weights
        return from_native(values, weights)
    except KeyError as error:
        raise CheckpointError(f"{folder}: {error} is missing in its config or weights. Download it again.") from error
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def own_config(values: Mapping[str, Any], origin: str) -> ModelConfig | None:
    """The architecture in a config.json that we exported, or that has OpenLM's or mamba-ssm's keys; else None."""
    if "d_model" in values:
        return cast("ModelConfig", mamba_config(values, origin))
    values = openlm_values(values)
    known = {f.name for f in fields(ModelConfig)}
    ours = {name: value for name, value in values.items() if name in known}
    if "hidden_dim" not in ours:
        return None
    if values.get("attn_activation"):
        ours["attn_name"] = "custom_attn"
    if "ffn_width" in values:
        width, derived = values["ffn_width"], default_width(ours["ffn_type"], ours["hidden_dim"])
        ours |= {
            "ffn_dim": None if width == derived else width,
            "weight_tying": bool(values.get("tie_word_embeddings")),
        }
    return ModelConfig.from_dict(ours, origin)


def openlm_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an architecture, wherever a folder keeps them and whatever it calls them."""
    inner = next((values[name] for name in INNER_KEYS if isinstance(values.get(name), Mapping)), values)
    if "dim" not in inner:
        return dict(values)
    given = {name: value for name, value in inner.items() if value is not None}
    out = {OPENLM_NAMES.get(name, name): value for name, value in given.items()} | given
    out["weight_tying"] = bool(given.get("weight_tying") or given.get("tie_word_embeddings"))
    if out.get("n_kv_heads") == out.get("n_heads"):
        out.pop("n_kv_heads", None)
    if out.get("attn_name") != "custom_attn":  # how attention was computed there says nothing about the weights
        for name in ("attn_name", "attn_activation", "attn_seq_scalar", "attn_seq_scalar_alpha"):
            out.pop(name, None)
    if out.get("moe_freq"):
        return {"moe_expert_type": "megablocks", **out}
    return {name: value for name, value in out.items() if name not in EXPERT_KEYS}


def mamba_config(values: Mapping[str, Any], origin: str) -> MambaConfig:
    """The architecture in a config.json as mamba-ssm writes it.

    Raises:
        CheckpointError: it has layers of another kind.
    """
    inner = dict(values.get("ssm_cfg") or {})
    if inner.pop("layer", "Mamba1") != "Mamba1" or values.get("attn_layer_idx") or not values.get("rms_norm", True):
        raise CheckpointError("attention, Mamba 2 or layer norms among its layers: ours are Mamba 1 with rms norms.")
    multiple = values.get("pad_vocab_size_multiple", 8)
    return MambaConfig(
        d_model=values["d_model"],
        n_layer=values["n_layer"],
        vocab_size=-(-values["vocab_size"] // multiple) * multiple,
        seq_len=values.get("seq_len", 2048),
        tie_embeddings=values.get("tie_embeddings", True),
        **{name: inner[name] for name in ("d_state", "d_conv", "expand") if name in inner},
    )


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder: safetensors if there are any, else .pt or .bin, whole or in shards.

    Raises:
        CheckpointError: there are none, several that are no shards of one, or an index names a file elsewhere.
    """
    for pattern in ("*.safetensors", "*.pt", "*.bin"):
        found = sorted(path for path in folder.glob(pattern) if path.name != "training_args.bin")
        indexes = sorted(folder.glob(f"{pattern}.index.json"))
        if indexes:
            return _shards(indexes[0])
        found = [path for path in found if path.name in WHOLE] or found
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(f"{folder}: several files of weights ({names}). Name one of them.")
        if found:
            return found
    raise CheckpointError(f"{folder}: no weights (.safetensors, .pt or .bin) in it.")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(_read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: no index of weights ({error!r}). Download it again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: names {name!r}, a file outside its folder. Refused.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: {name} is missing. Download the folder again.")
    return [index.parent / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Download it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not keys and values. Download it again.")
    return values
