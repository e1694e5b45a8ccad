"""`openlm generate`: prompts in, text out, from any checkpoint."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.generation.config import GenerateConfig
from open_lm.generation.stream import TextStream
from open_lm.model.config import ModelFlags


@dataclass(frozen=True)
class PromptConfig:
    """Prompts"""

    checkpoint: str = flag("", "Run folder (its newest checkpoint) or weights file.")
    tokenizer: str | None = flag(
        None, "Hub id, local folder or tokenizer.json. None: the one the checkpoint names, if it names one."
    )
    input_text: tuple[str, ...] = flag((), "Prompts; each is continued. An empty one starts a new text.")
    interactive: bool = flag(False, "Read prompts from the terminal, a line each, until it ends (Ctrl-D).")
    stop: tuple[str, ...] = flag((), "Strings that end a text where they appear; they are left out.")
    stream: bool = flag(False, "Show the text while it is written; of several prompts, one after the other.")
    output: str | None = flag(None, "Also write the texts to this file, one JSON object a line: prompt, text.")
    device: str | None = flag(None, "Where to compute, such as cpu or cuda:0. None: the GPU if there is one.")
    dtype: str | None = flag(
        None, "Type of the weights. None: the checkpoint's.", choices=("float32", "bfloat16", "float16")
    )

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("--checkpoint is missing: give a run folder or an epoch_K.pt.")
        if bool(self.input_text) == self.interactive:
            raise ConfigError('give prompts as --input-text "Once upon" …, or --interactive to type them; one of both.')
        if not all(self.stop):
            raise ConfigError("--stop holds an empty string, which every text has. Leave it out.")


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Continue every prompt, print the texts, and return them."""
    parser = Parser(description=__doc__)
    for group in (PromptConfig, GenerateConfig, ModelFlags):
        add_group(parser, group)
    args = parser.parse_args(argv)
    asked, config = read_group(args, PromptConfig), read_group(args, GenerateConfig)
    if (asked.stream or asked.interactive) and config.num_beams > 1:
        raise ConfigError("--num-beams knows the text only at its end: leave out --stream and --interactive.")
    writer = TextWriter(asked, config, read_group(args, ModelFlags))
    if asked.interactive:
        texts = [(prompt, writer.shown(prompt)) for prompt in typed()]
    elif asked.stream:
        texts = [(prompt, writer.shown(prompt)) for prompt in asked.input_text]
    else:
        texts = list(zip(asked.input_text, writer.together(asked.input_text), strict=True))
        for prompt, text in texts:
            print(f"{prompt}{text}\n", flush=True)
    if asked.output:
        rows = [json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) for prompt, text in texts]
        storage.write_text(asked.output, "".join(row + "\n" for row in rows))
    return [text for _, text in texts]


def typed() -> Iterator[str]:
    """The lines a person types (or a pipe holds), until the end of input."""
    with contextlib.suppress(EOFError):
        while True:
            yield input("> " if sys.stdin.isatty() else "")


class TextWriter:
    """A model and its tokenizer, ready to continue texts."""

    def __init__(self, asked: PromptConfig, config: GenerateConfig, flags: ModelFlags):
        import torch

        from open_lm.checkpoint.load_model import load_model, stored_tokenizer
        from open_lm.checkpoint.resolve import resolve
        from open_lm.data.tokenizer import load_tokenizer

        given_tokenizer = load_tokenizer(asked.tokenizer) if asked.tokenizer else None
        found = resolve(asked.checkpoint)
        self.tokenizer = given_tokenizer or load_tokenizer(stored_tokenizer(found))
        device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(found, device=device, dtype=asked.dtype, **given(flags))
        self.config, self.stops = config, asked.stop

    def together(self, prompts: Sequence[str]) -> list[str]:
        """The continuation of each prompt, all in one batch."""
        ids = self._encoded(prompts)
        streams = [TextStream(self.tokenizer, self.stops, before=one) for one in ids]
        watch = (lambda row, tokens: streams[row].watch(row, tokens)) if self.stops else None
        rows = self._generate(ids, watch)
        return [stream.finish(tokens) for stream, tokens in zip(streams, rows, strict=True)]

    def shown(self, prompt: str) -> str:
        """The continuation of one prompt, printed as it is generated."""
        print(prompt, end="", flush=True)
        ids = self._encoded([prompt])
        stream = TextStream(self.tokenizer, self.stops, lambda text: print(text, end="", flush=True), ids[0])
        (tokens,) = self._generate(ids, stream.watch)
        text = stream.finish(tokens)
        print("\n", flush=True)
        return text

    def _encoded(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of each prompt, with BOS where the tokenizer puts one; an empty prompt starts a new text."""
        return [self.tokenizer.encode_prompt(prompt) or [self.tokenizer.eot_id] for prompt in prompts]

    def _generate(self, ids: Sequence[list[int]], watch: Any) -> list[list[int]]:
        from open_lm.generation.decode import generate

        return generate(self.model, ids, self.config, stop_ids=[self.tokenizer.eot_id], watch=watch)


def given(flags: ModelFlags) -> dict[str, Any]:
    """The flags that were set to something of their own; the others leave it to the checkpoint."""
    return {name: value for name, value in vars(flags).items() if value != getattr(ModelFlags(), name)}
