"""Conversations to shards for instruction tuning: only the answers are trained on."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_lm import command, storage
from open_lm.data.config import SAMPLE_FORMATS
from open_lm.errors import ConfigError, DataError
from open_lm.flags import Parser, add_group, flag, read_group


@dataclass(frozen=True)
class MakeAssistantData:
    """Input and output"""

    input_files: tuple[str, ...] = flag(
        (),
        "Conversations, one a line: .jsonl(.zst, .gz) with messages, conversations, prompt and response, "
        "or instruction and output.",
    )
    output_dir: str = flag("", "Folder for the shards, manifest.jsonl and ledger.json. It appears when all is there.")
    tokenizer: str = flag("EleutherAI/gpt-neox-20b", "Hub id, local Hugging Face folder, or tokenizer.json file.")
    seqlen: int = flag(2048, "Tokens a model sees at once; longer conversations are rejected and counted.")
    mask_token_id: int | None = flag(
        None,
        "Id that marks where an answer begins; training takes it out again. None: the first unused one.",
    )
    shard_size: int = flag(8192, "Samples in a shard; the last one may hold fewer.")
    data_key: str = flag("npy", "How a sample's ids are written.", choices=SAMPLE_FORMATS)
    seed: int = flag(42, "Of the shuffle.")
    on_bad_line: str = flag(
        "stop", "A line that is no conversation: stop, or skip and count it.", choices=("stop", "skip")
    )

    def __post_init__(self) -> None:
        if not self.input_files or not self.output_dir:
            raise ConfigError(f"{'--output-dir' if self.input_files else '--input-files'}: not given. See --help.")
        for name in ("seqlen", "shard_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 1 or more.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Make the data set; its ledger."""
    parser = Parser(prog="make_assistant_data.py", description=__doc__)
    add_group(parser, MakeAssistantData)
    flags = read_group(parser.parse_args(argv), MakeAssistantData)
    if os.path.exists(flags.output_dir):
        raise ConfigError(f"--output-dir {flags.output_dir}: exists already. Choose another folder.")

    from open_lm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(flags.tokenizer)
    marker_id = tokenizer.vocab_size if flags.mask_token_id is None else flags.mask_token_id
    samples, counts, rejected = read_conversations(flags, tokenizer, marker_id)
    if not samples:
        raise DataError(
            f"--input-files: no conversation gives a sample ({dict(rejected)}). Check the files and --seqlen."
        )
    ledger = {
        "conversations": {"in": counts["in"], "used": counts["used"], "rejected": dict(sorted(rejected.items()))},
        "answers": {"in": counts["answers"], "samples": len(samples), "too_long": counts["too_long"]},
        "samples": len(samples),
        "seq_len": flags.seqlen,
        "tokens_per_sample": flags.seqlen + 2,
        "tokenizer": tokenizer.name,
        "mask_token_id": marker_id,
        "pad_id": tokenizer.pad_id,
    }
    write(flags, samples, max(tokenizer.vocab_size, marker_id + 1), ledger)
    print(
        f"conversations  {counts['in']:,} in = {counts['used']:,} used + {sum(rejected.values()):,} rejected "
        f"{dict(rejected)}"
    )
    print(f"answers        {counts['answers']:,} in = {len(samples):,} samples + {counts['too_long']:,} too long")
    print(
        f"train with     --dataset-manifest {flags.output_dir}/manifest.jsonl --target-mask-left {marker_id} "
        f"--squash-mask-left --target-mask-individual {tokenizer.pad_id}"
    )
    return ledger


def read_conversations(flags: MakeAssistantData, tokenizer: Any, marker_id: int) -> tuple[list[Any], Counter, Counter]:
    """All samples, what was counted, and conversations rejected by reason.

    Raises:
        DataError: a line is no conversation and --on-bad-line is stop.
    """
    from open_lm.preprocess.chat import answer_samples, messages_of
    from open_lm.preprocess.jsonl import Rejected, expand_inputs, read_lines

    samples: list[Any] = []
    counts: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for url in expand_inputs(flags.input_files, "--input-files"):
        for number, line in enumerate(read_lines(url, max_line_bytes=256 << 20), 1):
            turns = messages_of(line) if line.content is not None else Rejected("too_long")
            if turns is None:
                continue
            counts["in"] += 1
            if isinstance(turns, Rejected):
                if flags.on_bad_line == "stop":
                    raise DataError(
                        f"{storage.shown(url)}, line {number}: {turns.reason.replace('_', ' ')}: "
                        f"{(line.content or b'')[:60]!r}. Repair it, or leave such lines out with --on-bad-line skip."
                    )
                rejected[turns.reason] += 1
                continue
            counts["used"] += 1
            for sample in answer_samples(turns, tokenizer, marker_id=marker_id, sample_tokens=flags.seqlen + 2):
                counts["answers"] += 1
                if isinstance(sample, Rejected):
                    counts["too_long"] += 1
                else:
                    samples.append(sample)
    return samples, counts, rejected


def write(flags: MakeAssistantData, samples: list[Any], vocab_size: int, ledger: dict[str, Any]) -> None:
    """Shuffle the samples and write the folder; it takes its name when it is whole."""
    import shutil

    import numpy as np
    import orjson

    from open_lm.data.formats import token_dtype
    from open_lm.data.manifest import write_manifest
    from open_lm.data.shards import describe_shard, write_shard
    from open_lm.preprocess.packing import shuffle_keys

    order = np.argsort(shuffle_keys(len(samples), seed=flags.seed, block="chat"), kind="stable")
    unfinished = flags.output_dir.rstrip("/") + ".unfinished"
    rows: list[dict[str, Any]] = []
    shutil.rmtree(unfinished, ignore_errors=True)
    storage.require_writable(unfinished, "--output-dir")
    for start in range(0, len(order), flags.shard_size):
        name = f"{len(rows):08d}"
        table = np.stack([samples[k] for k in order[start : start + flags.shard_size]]).astype(token_dtype(vocab_size))
        with storage.open_atomic(os.path.join(unfinished, f"{name}.tar")) as file:
            write_shard(file, table, flags.data_key, first_number=start)
        content = storage.read_bytes(os.path.join(unfinished, f"{name}.tar"))
        rows.append({"shard": name, **describe_shard(content, name), "tokenizer": flags.tokenizer})
    write_manifest(os.path.join(unfinished, "manifest.jsonl"), rows)
    storage.write_bytes(os.path.join(unfinished, "ledger.json"), orjson.dumps(ledger, option=orjson.OPT_INDENT_2))
    os.replace(unfinished, flags.output_dir)


if __name__ == "__main__":
    command.run(main)
