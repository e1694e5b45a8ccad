"""A checkpoint of ours as a file that OpenLM's own programs read: `openlm to-openlm`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) if __package__ in (None, "") else None

from open_lm import command, storage  # noqa: E402
from open_lm.errors import ConfigError  # noqa: E402
from open_lm.flags import Parser, add_group, flag, read_group  # noqa: E402

if TYPE_CHECKING:
    from open_lm.model.architecture import ModelConfig


@dataclass(frozen=True)
class ToOpenLM:
    """Checkpoint"""

    checkpoint: str = flag("", "Run folder (its newest checkpoint), weights file, or hf://owner/name.")
    out: str = flag("", "File to write, such as epoch_1.pt; it must not exist.")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("--checkpoint is missing: give a run folder or an epoch_K.pt.")
        if not self.out.endswith(".pt"):
            raise ConfigError(f"--out {self.out!r}: give the .pt file to write.")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file and say with which flags OpenLM builds its model.

    Raises:
        ConfigError: `out` exists, or OpenLM has no such architecture.
    """
    parser = Parser(description=__doc__)
    add_group(parser, ToOpenLM)
    asked = read_group(parser.parse_args(argv), ToOpenLM)

    import torch

    from open_lm.checkpoint.load_model import load_model
    from open_lm.checkpoint.read import read_facts
    from open_lm.checkpoint.resolve import resolve
    from open_lm.weights.file import to_openlm

    if storage.exists(asked.out):
        raise ConfigError(f"--out {asked.out} exists: choose another file, or remove it.")
    found = resolve(asked.checkpoint, "weights")
    model: Any = load_model(found)
    require_known_there(model.config, asked.checkpoint)
    facts = read_facts(found)
    about = {name: facts.get(name, default) for name, default in (("epoch", 0), ("name", "open_lm"), ("step", 0))}
    with storage.open_atomic(asked.out) as file:
        torch.save({**about, "evaluation_metrics": [], "state_dict": to_openlm(model.state_dict())}, file)
    print(f"wrote {asked.out}; OpenLM needs {openlm_flags(model.config)}", flush=True)


def require_known_there(config: Any, path: str) -> None:
    """Refuse what OpenLM does not have.

    Raises:
        ConfigError: naming what it is.
    """
    from open_lm.model.architecture import ModelConfig

    own = []
    if not isinstance(config, ModelConfig):
        own.append("a model that is no transformer of ours")
    else:
        own += [f"{key} {getattr(config, key)}" for key in ("n_kv_heads", "ffn_dim") if getattr(config, key)]
        own += [f"rotary_base {config.rotary_base}"] if config.rotary_base != 10_000 else []
        own += ["experts that are not MegaBlocks'"] if config.moe_freq and config.moe_expert_type == "ffn" else []
    if own:
        raise ConfigError(f"{path}: OpenLM has no {', '.join(own)}. Export it with `openlm export`.")


def openlm_flags(config: ModelConfig) -> str:
    """The flags beside --model with which OpenLM builds this architecture."""
    names = ("model_norm", "ffn_type", "positional_embedding_type")
    words = [f"--{name.replace('_', '-')} {getattr(config, name)}" for name in names]
    return " ".join([*words, *(["--qk-norm"] if config.qk_norm else [])])


if __name__ == "__main__":
    command.run(main)
