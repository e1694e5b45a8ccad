"""`load_model`: a model from a checkpoint file, a run folder, a transformers folder or the Hub."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from open_lm.checkpoint.read import architecture_named, read_facts, read_found
from open_lm.checkpoint.resolve import Name, resolve
from open_lm.data.tokenizer import tokenizer_near
from open_lm.errors import CheckpointError, ConfigError
from open_lm.model import create_model
from open_lm.model.config import ModelConfig, ModelFlags
from open_lm.model.transformer import Transformer
from open_lm.weights.file import has_plain_megablocks, named_weights, our_weights

EMBEDDING = "positional_embedding_type"


def load_model(
    path: Name, *, model: str | None = None, device: str = "cpu", dtype: Any = None, **architecture: Any
) -> Transformer:
    """The model stored at `path`, in eval mode: a Transformer, or a Mamba, which is called alike.

    `path` is an epoch_K.pt, a run folder, a folder of transformers (Llama, OLMo, GPT-NeoX or one that OpenLM exported),
    or hf://owner/name[@revision]. `model` (a registered name, a JSON file, or hf://…) and `architecture`
    (`model_norm="rms_norm"`) say what it is where the file does not. `dtype` is that of the weights ("bfloat16" or a
    torch.dtype); None keeps the file's.

    Raises:
        CheckpointError: the file is missing or damaged, holds no weights of this architecture, or none is known.
        ConfigError: no such `model`.
        StorageError: it cannot be downloaded.
    """
    dtype = torch_dtype(dtype)
    return build(*read_model(path, model, architecture), device, dtype).eval()


def read_model(
    path: Name, model: str | None, architecture: dict[str, Any]
) -> tuple[ModelConfig, dict[str, Tensor], str]:
    """The architecture of a checkpoint, its weights under our names, and the name it was asked for by.

    Raises:
        CheckpointError, ConfigError, StorageError: as `load_model`.
    """
    found = resolve(path, "weights")
    content = read_found(found)
    named = named_weights(content)
    plain_experts, weights = has_plain_megablocks(named), our_weights(named)
    config = checked(config_in(content, found.name), found.name, model, architecture)
    return (replace(config, moe_expert_type="megablocks") if plain_experts else config), weights, found.name


def stored_tokenizer(name: Name) -> str:
    """The tokenizer that a checkpoint says it was trained with, or lies beside.

    Raises:
        CheckpointError: it does not say.
    """
    found = resolve(name)
    if found.kind == "folder" and (Path(found.path) / "tokenizer.json").exists():
        return found.path
    named = (read_facts(found).get("config") or {}).get("tokenizer")
    if not named:
        raise CheckpointError(f"{found.name} does not name its tokenizer: give --tokenizer.")
    return tokenizer_near(named, found.path)


def stored_chat_template(name: Name) -> str | None:
    """The source of the chat template that a checkpoint says its data were made with; None where it says none."""
    return (read_facts(resolve(name)).get("config") or {}).get("chat_template")


def config_in(content: dict[str, Any], path: str) -> ModelConfig | None:
    """The architecture that a checkpoint states, if it does."""
    stored = (content.get("config") or {}).get("model")
    return ModelConfig.from_dict(stored, path) if stored else None


def checked(stored: ModelConfig | None, path: str, model: str | None, architecture: dict[str, Any]) -> ModelConfig:
    """The architecture that the file states, checked against what was asked for; without a statement what was asked.

    Raises:
        CheckpointError: none is known, or the two differ.
    """
    asked = architecture_named(ModelFlags(model=model, **architecture)) if model else None
    if stored is None and asked is None:
        raise CheckpointError(f"{path} does not say which model it is of: give --model and its flags.")
    if stored is None:
        assert asked is not None
        if asked.to_dict().get(EMBEDDING) == "rotary" and EMBEDDING not in architecture:
            logging.warning(
                "%s does not state its positional embedding, and its weights look the same for all of them: rotary is "
                "assumed. Give --positional-embedding-type where it is head_rotary or llama_rotary.", path,
            )  # fmt: skip
        return asked
    if asked is not None or architecture:
        require_same(stored, asked.to_dict() if asked else architecture, path)
    return stored


def require_same(config: ModelConfig, asked: dict[str, Any], path: str) -> None:
    """Refuse a checkpoint whose stated architecture is not the one asked for; how attention is computed may differ.

    Raises:
        CheckpointError: naming each key that differs.
    """
    stored = config.to_dict()
    free = {"moe_backend"} if stored.get("attn_name") == "custom_attn" else {"moe_backend", "attn_name"}
    differences = [
        f"{key} {stored[key]!r} (asked {value!r})"
        for key, value in asked.items()
        if key not in free and key in stored and stored[key] != value
    ]
    if differences:
        raise CheckpointError(
            f"{path} is of another model: {', '.join(differences)}. Leave out --model and its flags to take its own."
        )


def build(
    config: ModelConfig, weights: dict[str, Tensor], path: str, device: str, dtype: torch.dtype | None
) -> Transformer:
    """A model of `config` that holds copies of `weights`; no initialisation is computed in between.

    Raises:
        CheckpointError: a weight is missing, left over, or has another shape.
    """
    with torch.device("meta"):
        model = cast("Transformer", create_model(config))
    weights = under_every_name(model, weights)
    require_fit(model, weights, path)
    kept = {name: tensor.to(device, dtype, copy=True) for name, tensor in weights.items() if not is_constant(name)}
    model.load_state_dict(kept, assign=True, strict=False)
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device=device)
            cast("Any", module).reset_parameters()
    return model


def under_every_name(model: Transformer, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, those that `model` ties under all their names, however many of them the file has."""
    names_of = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of[id(parameter)].append(name)
    tied: dict[str, Tensor] = {}
    for names in names_of.values():
        found = [weights[name] for name in names if name in weights]
        tied |= dict.fromkeys(names, found[0]) if found else {}
    return weights | tied


def is_constant(name: str) -> bool:
    """Whether a name is that of a constant, which files may hold or not."""
    return name.endswith(".inv_freq")


def require_fit(model: Transformer, weights: dict[str, Tensor], path: str) -> None:
    """Refuse weights that are not those of `model`.

    Raises:
        CheckpointError: naming the first weights that are missing, left over, or of another shape.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if not is_constant(name)}
    found = {name: tuple(value.shape) for name, value in weights.items() if not is_constant(name)}
    wrong = [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is left over" for name in found if name not in expected),
        *(
            f"{name} is {found[name]}, the model's {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{path} is not of this architecture: {'; '.join(wrong[:3])}{more}. Give the --model and flags it was "
            "trained with."
        )


def torch_dtype(dtype: Any) -> torch.dtype | None:
    """`"bfloat16"` or `torch.bfloat16` as the latter; None stays None.

    Raises:
        ConfigError: torch has no such type.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype {dtype!r}: no type of torch. Choose float32, bfloat16 or float16.")
    return found
