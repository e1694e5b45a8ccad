"""Import of a transformers model as a checkpoint of ours, to train, score or export again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.command import run
from open_lm.errors import CheckpointError, ConfigError
from open_lm.flags import Parser, add_group, flag, read_group

TOLERANCE = 1e-3
"""Largest difference of logits (fp32) between the model of transformers and ours."""


@dataclass(frozen=True)
class ImportConfig:
    """Import"""

    model: str = flag("", "owner/name on the Hub (owner/name@revision), or a local folder: Llama, OLMo or GPT-NeoX.")
    out: str = flag("", "File to write, such as llama.pt; it must not exist.")
    check: bool = flag(True, "Also load the model in transformers and compare logits; needs memory for both.")

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("--model is missing: give owner/name or a local folder.")
        if not self.out.endswith(".pt"):
            raise ConfigError(f"--out {self.out!r}: give the .pt file to write.")


def main(argv: Sequence[str] | None = None) -> float | None:
    """Import as the flags ask; returns the largest difference of logits, if it was looked at."""
    parser = Parser(prog="open_lm.hf.import_", description=__doc__)
    add_group(parser, ImportConfig)
    return import_model(read_group(parser.parse_args(argv), ImportConfig))


def import_model(config: ImportConfig) -> float | None:
    """Write the checkpoint; returns the largest difference of logits, if it was looked at.

    Raises:
        ConfigError: `out` exists, or there is no such folder.
        CheckpointError: our architectures cannot express the model (what is missing is named), or logits differ.
        StorageError: it cannot be downloaded.
    """
    from open_lm.checkpoint.load_model import build
    from open_lm.weights.hf_folder import from_transformers
    from open_lm.weights.hub import download

    if storage.exists(config.out):
        raise ConfigError(f"--out {config.out} exists: choose another file, or remove it.")
    local = Path(config.model).expanduser()
    if not local.is_dir() and config.model.startswith(("/", ".", "~")):
        raise ConfigError(f"--model {config.model}: no such folder. Give a local folder, or owner/name on the Hub.")
    folder = local if local.is_dir() else download(f"hf://{config.model.removeprefix('hf://')}")
    architecture, weights = from_transformers(folder)
    if architecture is None:
        raise CheckpointError(f"{config.model}: its config.json does not say which architecture it is.")
    model = build(architecture, weights, config.model, "cpu", None)
    difference = largest_difference(model, folder) if config.check else None
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    tokenizer = (str(folder.resolve()) if local.is_dir() else config.model) if has_tokenizer else None
    write_checkpoint(model, config.model, tokenizer, config.out)
    said = "" if difference is None else f"; logits differ from transformers' by at most {difference:.2g}"
    print(f"wrote {config.out}{said}", flush=True)
    return difference


def write_checkpoint(model: Any, name: str, tokenizer: str | None, out: str) -> None:
    """Save `model` as a checkpoint that knows its architecture, in OpenLM's format."""
    import torch

    about = {"epoch": 0, "name": name, "step": 0, "evaluation_metrics": []}
    config = {"model": model.config.to_dict(), "flags": {}, "tokenizer": tokenizer}
    with storage.open_atomic(out) as file:
        torch.save({**about, "state_dict": model.state_dict(), "config": config}, file)


def largest_difference(model: Any, folder: Path) -> float:
    """Between the logits of transformers' own class and of `model`, both in fp32, over random tokens.

    Raises:
        CheckpointError: it is above TOLERANCE.
    """
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, (2, min(64, model.config.seq_len)), generator=generator)
    with torch.inference_mode():
        difference = (copy.deepcopy(model).float()(ids_BT)[0] - theirs(ids_BT).logits).abs().max().item()
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: logits differ from transformers' by {difference:.3g}, more than {TOLERANCE}. Nothing was "
            "written. Please report the model."
        )
    return difference


if __name__ == "__main__":
    run(main)
