"""Adapters between runs and PEFT: a run's adapter as a folder that PEFT reads, or PEFT's merged into a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.command import run
from open_lm.errors import CheckpointError, ConfigError
from open_lm.flags import Parser, add_group, flag, read_group


@dataclass(frozen=True)
class ConvertAdapter:
    """Adapter"""

    checkpoint: str = flag("", "Run trained with --lora-rank (or its epoch_K.pt); with --adapter any base model.")
    adapter: str | None = flag(None, "PEFT folder to merge into --checkpoint. None: the adapter that it holds.")
    out: str = flag("", "Folder for PEFT's two files; with --adapter the epoch_K.pt to write. It must not exist.")
    base: str = flag("", "Name of the base model, for adapter_config.json.")

    def __post_init__(self) -> None:
        for name in ("checkpoint", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name}: not given. See --help.")
        if os.path.exists(self.out):
            raise ConfigError(f"--out {self.out} exists: choose another place.")


def main(argv: Sequence[str] | None = None) -> str:
    """Convert as the flags ask; returns what was written."""
    parser = Parser(prog="openlm adapter", description=__doc__)
    add_group(parser, ConvertAdapter)
    flags = read_group(parser.parse_args(argv), ConvertAdapter)
    written = export(flags) if flags.adapter is None else merge(flags, flags.adapter)
    print(f"written: {written}", flush=True)
    return written


def export(flags: ConvertAdapter) -> str:
    """The adapter of a run as PEFT's folder.

    Raises:
        CheckpointError: the checkpoint holds none.
    """
    from open_lm.post_training.peft_format import save_adapter

    model, stored = adapted_model(flags.checkpoint)
    rslora = bool((stored.get("flags") or {}).get("rslora"))
    return str(save_adapter(model, model.config, flags.out, base=flags.base, rslora=rslora))


def adapted_model(path: str) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint with its adapters apart, and the config that the checkpoint states."""
    from open_lm.checkpoint.load_model import build, config_in
    from open_lm.checkpoint.read import read_checkpoint
    from open_lm.model.lora import add_adapter, is_addition
    from open_lm.weights.file import clean_state_dict

    content = read_checkpoint(path)
    weights, config = clean_state_dict(content, merge=False), config_in(content, path)
    if config is None:
        raise CheckpointError(f"{path} does not say which model it is of: give a checkpoint of a run.")
    model = build(config, {n: w for n, w in weights.items() if not is_addition(n)}, path, "cpu", None)
    for name in [name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")]:
        a, scale = weights[f"{name}.lora_A"], weights[f"{name}.lora_scale"].item()
        magnitude = weights.get(f"{name}.lora_magnitude")
        layer = add_adapter(model.get_submodule(name), len(a), scale, with_magnitude=magnitude is not None)
        layer.load_state_dict({n.removeprefix(f"{name}."): w for n, w in weights.items() if n.startswith(f"{name}.")})
    return model, content.get("config") or {}


def merge(flags: ConvertAdapter, adapter: str) -> str:
    """A checkpoint of the base model with PEFT's adapter in its weights."""
    import torch

    from open_lm import storage
    from open_lm.checkpoint.load_model import load_model
    from open_lm.model.lora import without_additions
    from open_lm.post_training.peft_format import load_adapter

    model = load_model(flags.checkpoint)
    load_adapter(model, model.config, adapter)
    content = {"state_dict": without_additions(model.state_dict()), "config": {"model": model.config.to_dict()}}
    with storage.open_atomic(flags.out) as file:
        torch.save(content, file)
    return flags.out


if __name__ == "__main__":
    run(main)
