"""Export of a checkpoint to a folder that transformers, vLLM, llama.cpp and lm-eval load."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm.command import run
from open_lm.errors import CheckpointError, ConfigError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.model.config import ModelFlags

TOLERANCE = 1e-3
"""Largest difference of logits (fp32) between the model here and the one loaded from the folder."""


@dataclass(frozen=True)
class ExportConfig:
    """Export"""

    checkpoint: str = flag("", "Run folder (its newest checkpoint), weights file, or hf://owner/name.")
    out: str = flag("", "Folder to write; it must not exist.")
    tokenizer: str | None = flag(None, "Hub id, local folder or tokenizer.json that goes with it. None: none.")
    dtype: str | None = flag(
        None, "Type of the written weights. None: the checkpoint's.", choices=("float32", "bfloat16", "float16")
    )
    push: str | None = flag(None, "owner/name on the Hub to upload the folder to (made private if new).")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("--checkpoint is missing: give a run folder or an epoch_K.pt.")
        if not self.out:
            raise ConfigError("--out is missing: give the folder to write.")
        if self.push and len(self.push.split("/")) != 2:
            raise ConfigError(f"--push {self.push}: need owner/name.")


def main(argv: Sequence[str] | None = None) -> float:
    """Export as the flags ask; returns the largest difference of logits after reloading."""
    parser = Parser(prog="open_lm.hf.export", description=__doc__)
    for group in (ExportConfig, ModelFlags):
        add_group(parser, group)
    args = parser.parse_args(argv)
    flags = read_group(args, ModelFlags)
    given = {name: value for name, value in vars(flags).items() if value != getattr(ModelFlags(), name)}
    return export(read_group(args, ExportConfig), **given)


def export(config: ExportConfig, **architecture: Any) -> float:
    """Write the folder, load it again, and return the largest difference of logits.

    Raises:
        ConfigError: `out` exists, or the model cannot be exported.
        CheckpointError: the reloaded model differs; the folder is then not left behind.
    """
    from open_lm.checkpoint.load_model import load_model, stored_facts
    from open_lm.hf.classes import save, to_transformers
    from open_lm.hf.model_card import model_card
    from open_lm.weights.hub import push

    out = Path(config.out).expanduser()
    if out.exists():
        raise ConfigError(f"--out {config.out} exists: choose another folder, or remove it.")
    model = load_model(config.checkpoint, dtype=config.dtype, **architecture)
    facts = stored_facts(config.checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        theirs = to_transformers(model.config, model.state_dict())
        if config.tokenizer:
            add_tokenizer(config.tokenizer, theirs, part)
        save(theirs, part)
        difference = largest_difference(model, part)
        card = model_card(out.name, facts, model, type(theirs).__name__, difference)
        (part / "README.md").write_text(card)
        part.chmod(0o755)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(
        f"wrote {type(theirs).__name__} to {out}; logits after reloading differ by at most {difference:.2g}", flush=True
    )
    if config.push:
        print(f"pushed to {push(out, config.push)}", flush=True)
    return difference


def add_tokenizer(name: str, theirs: Any, folder: Path) -> None:
    """Put the tokenizer into `folder`, and its end-of-text and padding ids into the configs of `theirs`.

    Raises:
        ConfigError: it has more tokens than the model.
    """
    from tokenizers import Tokenizer
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    from open_lm.data.tokenizer import load_tokenizer

    ours = load_tokenizer(name)
    if ours.vocab_size > theirs.config.vocab_size:
        raise ConfigError(
            f"--tokenizer {name} has {ours.vocab_size} tokens, the model {theirs.config.vocab_size}: give the one "
            "it was trained with."
        )
    theirs.config.eos_token_id, theirs.config.pad_token_id = ours.eot_id, ours.pad_id
    theirs.generation_config = GenerationConfig(eos_token_id=ours.eot_id, pad_token_id=ours.pad_id)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(ours.to_json()),
        eos_token=ours.token_of(ours.eot_id),
        pad_token=ours.token_of(ours.pad_id),
        model_max_length=theirs.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def largest_difference(model: Any, folder: Path) -> float:
    """Between the logits of `model` and of what transformers loads from `folder`, both in fp32, over random tokens.

    Raises:
        CheckpointError: it is above TOLERANCE.
    """
    import torch
    from transformers import AutoModelForCausalLM

    own_code = (folder / "modeling_openlm.py").exists()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=own_code).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(64, model.config.seq_len))
    ids_BT = torch.randint(model.config.vocab_size, shape, generator=generator)
    with torch.inference_mode():
        difference = (model.float()(ids_BT)[0] - theirs(ids_BT).logits.float()).abs().max().item()
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the exported model differs: logits after reloading are off by {difference:.3g}, more than {TOLERANCE}. "
            "Nothing was written. Please report the architecture."
        )
    return difference


if __name__ == "__main__":
    run(main)
