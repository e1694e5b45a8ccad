"""`openlm tokenizer`: byte-level BPE from one's own text, into a folder that transformers can load."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from open_lm import storage
from open_lm.errors import ConfigError, DataError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.preprocess.jsonl import BAD_LINE_REASONS, JSON_ENDINGS, WHOLE, Rejected, expand_inputs, is_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
SPECIAL_TOKENS = (END_OF_TEXT, PADDING)
"""In the order of their ids, as in GPT-NeoX's tokenizer: 0 ends a document, 1 fills what is never trained on."""
N_BYTES = 256
OPEN_FILES = 64
MAX_LINE_BYTES = 16 << 20
"""Longer documents are skipped: one would dominate the merges."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer"""

    input_files: tuple[str, ...] = flag(
        (), "Files, globs or folders of .jsonl (also .zst, .gz), .txt or .md to learn from."
    )
    output_dir: str = flag("tokenizer", "Folder for tokenizer.json and tokenizer_config.json.")
    vocab_size: int = flag(4096, "Entries of the vocabulary, the two special tokens and the 256 bytes included.")
    content_key: str = flag("text", "Key of the text in each line.")
    max_megabytes: float = flag(
        16.0, "Megabytes (10^6 bytes) of text to learn from, taken evenly; the rest is skipped."
    )

    def __post_init__(self) -> None:
        if not self.input_files:
            raise ConfigError("--input-files is missing: name the text to learn from.")
        if self.vocab_size < N_BYTES + len(SPECIAL_TOKENS):
            raise ConfigError(
                f"--vocab-size {self.vocab_size}: needs at least {N_BYTES + len(SPECIAL_TOKENS)}, "
                "for every byte and the special tokens."
            )
        if self.max_megabytes <= 0:
            raise ConfigError(f"--max-megabytes {self.max_megabytes} must be above 0.")


def main(argv: Sequence[str] | None = None) -> Tokenizer:
    """Train the tokenizer, write it and return it."""
    parser = Parser(description="Train a byte-level BPE tokenizer on jsonl or text files.")
    add_group(parser, TokenizerConfig)
    config = read_group(parser.parse_args(argv), TokenizerConfig)
    paths = expand_inputs(config.input_files, "--input-files", (*JSON_ENDINGS, *WHOLE))
    storage.require_writable(config.output_dir, "--output-dir")
    texts = sample(paths, config.content_key, round(config.max_megabytes * 1e6))
    tokenizer = train(texts, config.vocab_size)
    write(tokenizer, config.output_dir)
    say(tokenizer, texts, config.output_dir)
    return tokenizer


def sample(paths: Sequence[str], key: str, limit_bytes: int) -> list[str]:
    """Texts of all files in turn, one document each, until `limit_bytes` are reached or the files end.

    Of more than `OPEN_FILES` files so many at a time, each group with its share of what is left.

    Raises:
        DataError: a line is no JSON object with a text under `key`.
    """
    texts: list[str] = []
    left = limit_bytes
    for start in range(0, len(paths), OPEN_FILES):
        group = paths[start : start + OPEN_FILES]
        if left > 0:
            found = _in_turn(group, key, -(-left * len(group) // (len(paths) - start)))
            left -= sum(len(content.encode()) for content in found)
            texts += found
    return texts


def _in_turn(paths: Sequence[str], key: str, limit_bytes: int) -> list[str]:
    streams = [documents(path, key) for path in paths]
    texts: list[str] = []
    size_bytes = 0
    while streams:
        for stream in list(streams):
            content = next(stream, None)
            if content is None:
                streams.remove(stream)
                continue
            texts.append(content)
            size_bytes += len(content.encode())
            if size_bytes >= limit_bytes:
                return texts
    return texts


def documents(url: str, key: str) -> Iterator[str]:
    """The text of each line of a raw file, compressed or not, or of a text file; empty and overlong ones are skipped.

    Raises:
        DataError: a line is no JSON object with a text under `key`.
    """
    from open_lm.preprocess.input import document_of, read_documents  # with numpy, which --help does without
    from open_lm.preprocess.long_text import LongText

    for number, line in enumerate(read_documents(url, key, max_bytes=MAX_LINE_BYTES), 1):
        content = document_of(url, line, key) if line.content is not None else None
        if isinstance(content, Rejected) and content.reason in BAD_LINE_REASONS:
            if is_whole(url):
                raise DataError(f"{url}: not UTF-8. Convert it (iconv -f latin1 -t utf-8), or leave it out.")
            raise DataError(f"{url}, line {number}: {content.reason}; need a JSON object with text under {key!r}.")
        if isinstance(content, str):
            yield content
        elif isinstance(content, LongText):
            yield "".join(content.pieces())


def train(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE learned from `texts`; the same texts give the same tokenizer.

    Raises:
        DataError: the texts hold too few different words for so many entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: the text gives only {tokenizer.get_vocab_size()} entries. "
            "Lower it, or give more text."
        )
    return tokenizer


def write(tokenizer: Tokenizer, folder: str) -> None:
    """Write the folder that AutoTokenizer and --tokenizer load; tokenizer.json comes last, so it says all is there."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
    }
    storage.write_text(storage.join(folder, "tokenizer_config.json"), json.dumps(settings, indent=2) + "\n")
    storage.write_text(storage.join(folder, "tokenizer.json"), tokenizer.to_str())


def say(tokenizer: Tokenizer, texts: Sequence[str], folder: str) -> None:
    """Print what was learned, and how it splits a line."""
    size_bytes = sum(len(content.encode()) for content in texts)
    example = "def main(argv: Sequence[str] | None = None) -> None:"
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(example).ids]
    shown = texts[:: max(len(texts) // 100, 1)]
    n_tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(shown))
    per_token = sum(len(content.encode()) for content in shown) / n_tokens
    print(f"{tokenizer.get_vocab_size()} entries from {len(texts)} documents, {size_bytes / 1e6:.1f} MB, in {folder}")
    print(f"{per_token:.2f} bytes a token; ids: 0 {END_OF_TEXT}, 1 {PADDING}")
    print("│".join(pieces))
