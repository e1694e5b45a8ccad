"""Walks through the code (`make walks`): the files and functions that a value enters on its way, seen by a profiler.

A stop is a change from one file of open_lm to another; the plumbing (files, flags, text) is passed through without one.
`--list` prints the functions in the order of their first call, `--json` the counts alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = f"{ROOT / 'open_lm'}/"
PLUMBING = ("storage/", "text.py", "progress.py", "errors.py", "flags.py")
SEQ_LEN = 16


@dataclass(frozen=True)
class Walk:
    """The calls of a piece of work, in order: (file, function)."""

    calls: list[tuple[str, str]]

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(file for file, _ in self.calls))

    @property
    def functions(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys(self.calls))

    @property
    def n_stops(self) -> int:
        return sum(a[0] != b[0] for a, b in zip(self.calls, self.calls[1:], strict=False))


def watched(work: Callable[[], Any], *, start: str = "", end: str = "") -> Walk:
    """The walk of a second run of `work` (the first imports), from the call of `start` to that of `end`."""
    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        file = code.co_filename.removeprefix(PACKAGE)
        if event == "call" and file != code.co_filename and not file.startswith(PLUMBING) and code.co_name[0] != "<":
            calls.append((file, getattr(code, "co_qualname", code.co_name)))  # Python 3.10 has no qualified names

    work()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    names = [name for _, name in calls]
    return Walk(calls[names.index(start) if start else 0 : names.index(end) if end else len(calls)])


def checkpoint_name(folder: Path) -> Walk:
    """The name of a run, until its weights are there to be put into a model."""
    from open_lm import load_model
    from open_lm.main import main

    main([
        "--dataset-type", "synthetic", "--model", "open_lm_test_tiny", "--device", "cpu", "--precision", "fp32",
        "--global-batch-size", "2", "--train-steps", "1", "--warmup", "0", "--workers", "0", "--logs", str(folder),
        "--name", "run",
    ])  # fmt: skip
    path = str(folder / "run" / "checkpoints" / "epoch_1.pt")
    return watched(lambda: load_model(path), end="create_model")


def manifest(folder: Path) -> Walk:
    """The url of a manifest, until the loader stands."""
    import numpy as np

    from open_lm.data.config import DataConfig
    from open_lm.data.loader import build_loader
    from open_lm.data.manifest import write_manifest
    from open_lm.data.shards import write_shard

    samples = np.arange(40 * (SEQ_LEN + 1), dtype="<u2").reshape(40, -1) % 16
    with open(folder / "00000000.tar", "wb") as file:
        write_shard(file, samples, "npy")
    url = str(folder / "manifest.jsonl")
    write_manifest(url, [{"shard": "00000000", "num_sequences": len(samples)}])
    config = DataConfig(dataset_manifest=(url,), workers=0)

    def build() -> None:
        build_loader(config, vocab_size=16, seq_len=SEQ_LEN, global_batch=2, rank=0, world_size=1, seed=0)

    return watched(build, start="build_loader")


def document(folder: Path) -> Walk:
    """A line of jsonl, until its tokens lie in a shard."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from open_lm.commands.prepare import main

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "a.jsonl").write_text(json.dumps({"text": "a document that is turned into tokens"}) + "\n")
    arguments = [
        "--input-files", str(folder / "a.jsonl"), "--tokenizer", str(folder / "tokenizer.json"), "--seqlen", "4",
        "--num-workers", "1", "--overwrite", "--output-dir", str(folder / "shards"),
    ]  # fmt: skip
    return watched(lambda: main(arguments), start="tokenize", end="_publish")


def run_length(folder: Path) -> Walk:
    """--train-tokens and the batch size, until the learning rate of a step."""
    from open_lm.params import parse_args, read_config
    from open_lm.train.run_length import build_schedule, global_batch_size, run_length_of

    config = read_config(parse_args(["--dataset-type", "synthetic", "--train-tokens", "9999", "--warmup", "2"]))

    def work() -> float:
        length = run_length_of(config.train, global_batch_size(config.train, 1) * SEQ_LEN, None, SEQ_LEN)
        return build_schedule(config.schedule, length)(3)

    return watched(work)


WALKS: dict[str, Callable[[Path], Walk]] = {
    "checkpoint name": checkpoint_name,
    "manifest": manifest,
    "document": document,
    "run length": run_length,
}


def main() -> None:
    """Print the counts of every walk."""
    parser = argparse.ArgumentParser(prog="walks.py", description="Walks through the code")
    parser.add_argument("--list", action="store_true", help="Print the functions, too.")
    parser.add_argument("--json", action="store_true", help="Print the counts as JSON.")
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    counts: dict[str, dict[str, int]] = {}
    for name, walk_of in WALKS.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            walk = walk_of(Path(folder))
        counts[name] = {"files": len(walk.files), "functions": len(walk.functions), "stops": walk.n_stops}
        if flags.json:
            continue
        print(f"{name:16} {len(walk.files):3} files {len(walk.functions):4} functions {walk.n_stops:4} stops")
        for file, function in walk.functions if flags.list else ():
            print(f"    {file:36} {function}")
    if flags.json:
        print(json.dumps(counts))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
