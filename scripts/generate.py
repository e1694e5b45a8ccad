"""What does a model write? Prompts in, text out, from any checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_lm import storage
from open_lm.command import run
from open_lm.errors import CheckpointError, ConfigError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.generate.config import GenerateConfig
from open_lm.model.config import ModelFlags


@dataclass(frozen=True)
class PromptConfig:
    """Prompts"""

    checkpoint: str = flag("", "Run folder (its newest checkpoint) or weights file.")
    tokenizer: str | None = flag(
        None, "Hub id, local folder or tokenizer.json. None: the one the checkpoint names, if it names one."
    )
    input_text: tuple[str, ...] = flag((), "Prompts; each is continued. An empty one starts a new text.")
    output: str | None = flag(None, "Also write the texts to this file, one JSON object a line: prompt, text.")
    device: str | None = flag(None, "Where to compute, such as cpu or cuda:0. None: the GPU if there is one.")
    dtype: str | None = flag(
        None, "Type of the weights. None: the checkpoint's.", choices=("float32", "bfloat16", "float16")
    )

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("--checkpoint is missing: give a run folder or an epoch_K.pt.")
        if not self.input_text:
            raise ConfigError('--input-text is missing: give one or more prompts, such as --input-text "Once upon".')


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Continue every prompt, print the texts, and return them."""
    parser = Parser(prog="generate.py", description=__doc__)
    for group in (PromptConfig, GenerateConfig, ModelFlags):
        add_group(parser, group)
    args = parser.parse_args(argv)
    prompts, config = read_group(args, PromptConfig), read_group(args, GenerateConfig)
    texts = continuations(prompts, config, read_group(args, ModelFlags))
    for prompt, text in zip(prompts.input_text, texts, strict=True):
        print(f"{prompt}{text}\n", flush=True)
    if prompts.output:
        rows = [{"prompt": p, "text": text} for p, text in zip(prompts.input_text, texts, strict=True)]
        storage.write_text(prompts.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return texts


def continuations(prompts: PromptConfig, config: GenerateConfig, flags: ModelFlags) -> list[str]:
    """What the model writes after each prompt."""
    import torch

    from open_lm.data.tokenizers import load_tokenizer
    from open_lm.generate.decode import generate
    from open_lm.loading import load_model

    tokenizer = load_tokenizer(prompts.tokenizer or stored_tokenizer(prompts.checkpoint))
    device = prompts.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_model(prompts.checkpoint, device=device, dtype=prompts.dtype, **given(flags))
    ids = [tokenizer.encode(text) or [tokenizer.eot_id] for text in prompts.input_text]
    return [tokenizer.decode(new) for new in generate(model, ids, config, stop_ids=[tokenizer.eot_id])]


def given(flags: ModelFlags) -> dict[str, Any]:
    """The flags that were set to something of their own; the others leave it to the checkpoint."""
    return {name: value for name, value in vars(flags).items() if value != getattr(ModelFlags(), name)}


def stored_tokenizer(checkpoint: str) -> str:
    """The tokenizer that a checkpoint says it was trained with.

    Raises:
        CheckpointError: it does not say.
    """
    from open_lm.checkpoint.weights import load_file
    from open_lm.loading import weights_file

    named = (load_file(weights_file(checkpoint)).get("config") or {}).get("tokenizer")
    if not named:
        raise CheckpointError(f"{checkpoint} does not name its tokenizer: give --tokenizer.")
    return named


if __name__ == "__main__":
    run(main)
