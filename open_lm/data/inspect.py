"""Data set inspection: samples as text, counts, integrity, and the samples a training step used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm import command, storage, text
from open_lm.data.config import DataConfig
from open_lm.errors import ConfigError, DataError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.progress import progress


@dataclass(frozen=True)
class Inspect:
    """Samples to show"""

    path: str = flag("", "A shard, a manifest, or a folder of shards with its manifest.")
    run: str = flag("", "The folder of a training run, instead of --path: with --step, the samples it used then.")
    samples: int = flag(3, "How many samples to print, from the first shard on.")
    tokens: int = flag(64, "How many tokens of each to print. 0: all.")
    decode: bool = flag(False, "Print samples as text; needs --tokenizer, or a manifest that names it.")
    tokenizer: str | None = flag(None, "Tokenizer for --decode. None: the one the manifest names.")
    vocab_size: int | None = flag(None, "With --verify: ids from here on are errors. None: whatever the ids are.")
    verify: bool = flag(False, "Read every sample of every shard, and check it against the manifest.")
    data_key: str = flag("auto", "Extension of the samples.")
    step: int | None = flag(
        None,
        "Print the samples of this training step, counted from 0; needs --seed and --global-batch-size of the run.",
    )
    seed: int = flag(0, "Of the run whose --step is asked for.")
    global_batch_size: int | None = flag(
        None, "Of the run whose --step is asked for. None: what its checkpoints or flags say; with --path 64."
    )

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.run):
            raise ConfigError("--path or --run: give one: a shard, a manifest, a folder; or the folder of a run.")
        if self.run and self.step is None:
            raise ConfigError("--run: needs --step, the training step whose samples to show.")


def main(argv: Sequence[str] | None = None) -> None:
    """Print what the flags ask for."""
    parser = Parser(prog="openlm inspect", description=__doc__)
    add_group(parser, Inspect)
    flags = read_group(parser.parse_args(_with_path(argv)), Inspect)
    if flags.step is not None:
        print("\n".join(_step(flags, flags.step)))
        return
    shards = list(_shards(flags))
    n_sequences = sum(shard.n_sequences for shard in shards)
    print(f"{storage.shown(flags.path)}: {len(shards):,} shards, {n_sequences:,} sequences")
    if flags.verify:
        print(f"all shards OK: {text.count(verify(shards, flags))} tokens read")
    for line in _first_samples(shards, flags):
        print(line)


def _with_path(argv: Sequence[str] | None) -> list[str]:
    """The path may stand alone, without its flag."""
    import sys

    args = list(sys.argv[1:] if argv is None else argv)
    return ["--path", *args] if args and not args[0].startswith("-") else args


def _shards(flags: Inspect) -> Iterator[Any]:
    from open_lm.data.manifest import FILENAME, read_manifest
    from open_lm.data.sources import open_source

    path = flags.path.rstrip("/")
    is_folder = not storage.is_remote(path) and os.path.isdir(storage.local_path(path))
    if path.endswith(".jsonl"):
        yield from read_manifest(path)
    elif path.endswith(".tar") or not is_folder:
        yield from open_source(path, flags.data_key).shards
    elif storage.exists(storage.join(path, FILENAME)):
        yield from read_manifest(storage.join(path, FILENAME))
    else:
        yield from open_source(storage.join(path, "*.tar"), flags.data_key).shards


def verify(shards: Sequence[Any], flags: Inspect) -> int:
    """Read all samples; the number of tokens.

    Raises:
        DataError: something is damaged or not what the manifest says; every faulty shard is named.
    """
    import zlib

    from open_lm.data.shards import read_samples

    problems, n_tokens, lengths = [], 0, set()
    for shard in progress(shards, unit="shard", label="verify"):
        try:
            content = storage.read_bytes(shard.url)
            if shard.size_bytes not in (None, len(content)):
                raise DataError(f"shard {shard.url}: {len(content)} bytes, the manifest says {shard.size_bytes}.")
            if shard.crc32 and f"{zlib.crc32(content):08x}" != shard.crc32:
                raise DataError(f"shard {shard.url}: its crc32 is not the manifest's: bytes have changed.")
            n = 0
            for _, tokens in read_samples(shard.url, key=flags.data_key, vocab_size=flags.vocab_size):
                n, n_tokens = n + 1, n_tokens + len(tokens)
                lengths.add(len(tokens))
            if n != shard.n_sequences:
                raise DataError(f"shard {shard.url}: {n} samples, the manifest says {shard.n_sequences}.")
        except DataError as error:
            problems.append(str(error))
    if len(lengths) > 1:
        problems.append(f"samples of different lengths: {sorted(lengths)[:10]}.")
    if problems:
        raise DataError(f"{len(problems)} problems:\n  " + "\n  ".join(problems[:50]))
    return n_tokens


def _first_samples(shards: Sequence[Any], flags: Inspect) -> Iterator[str]:
    from open_lm.data.shards import read_samples

    decode, left = _decoder(shards, flags), flags.samples
    for shard in shards:
        for name, tokens in read_samples(shard.url, key=flags.data_key) if left > 0 else ():
            yield f"{shard.name}/{name}: {decode(tokens)}"
            left -= 1
            if left <= 0:
                return


def _step(flags: Inspect, step: int) -> Iterator[str]:
    """The samples of one step, in the order of the batch."""
    from open_lm.data.mixture import make_batch_positions, make_plan
    from open_lm.data.run_data import run_settings
    from open_lm.data.shards import read_samples
    from open_lm.data.sources import Source, open_sources

    if flags.run:
        config, seed, global_batch, batch_positions = run_settings(flags.run, step, flags.global_batch_size)
        if config.dataset_type != "auto" and config.dataset_type != "webdataset":
            raise ConfigError(f"--run: its data is of --dataset-type {config.dataset_type}; only shards can be shown.")
        sources = open_sources(config)
    else:
        config, seed, global_batch = DataConfig(), flags.seed, flags.global_batch_size or 64
        batch_positions = make_batch_positions(config, global_batch=global_batch, rank=0, world_size=1)
        sources = [Source(flags.path, tuple(_shards(flags)))]
    plan = make_plan(sources, config, seed=seed, global_batch=global_batch)
    found = plan.locate(batch_positions.positions_of(step))
    places = list(zip(found.source.tolist(), found.shard.tolist(), found.place.tolist(), strict=True))
    shards = {(source, number): sources[source].shards[number] for source, number, _ in places}
    samples = {name: list(read_samples(shard.url, key=flags.data_key)) for name, shard in shards.items()}
    decode = _decoder(list(shards.values()), flags)
    for row, (source, number, place) in enumerate(places):
        name, tokens = samples[source, number][place]
        yield f"step {step} row {row}: {shards[source, number].name}/{name}: {decode(tokens)}"


def _decoder(shards: Sequence[Any], flags: Inspect) -> Any:
    limit = flags.tokens or None
    if not flags.decode:
        return lambda tokens: " ".join(map(str, tokens[:limit].tolist()))
    from open_lm.data.tokenizer import load_tokenizer, tokenizer_near

    named = (tokenizer_near(shard.tokenizer, shard.url) for shard in shards if shard.tokenizer)
    name = flags.tokenizer or next(named, None)
    if name is None:
        raise ConfigError("--decode: the manifest names no tokenizer. Give --tokenizer.")
    tokenizer = load_tokenizer(name)
    return lambda tokens: repr(tokenizer.decode((tokens[:limit] % tokenizer.vocab_size).tolist()))


if __name__ == "__main__":
    command.run(main)
