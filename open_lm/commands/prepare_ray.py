"""`openlm prepare-ray`: text to shards on a Ray cluster; the tasks, packing and ledger of `openlm prepare`."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_lm import storage, text
from open_lm.data.config import ENCODERS, SAMPLE_FORMATS
from open_lm.errors import ConfigError, StorageError
from open_lm.flags import Parser, add_group, flag, read_group

SUFFIXES = (".json", ".jsonl", ".zst", ".zstd", ".gz", ".tar")
IGNORED = ("ray_spill_location", "presort", "allow_imbalanced_write")
"""Flags of OpenLM's tool that nothing depends on here: no data pass through Ray, and shards are always equal."""


@dataclass(frozen=True)
class TokenizeShuffle:
    """Input and output"""

    input: str = flag("", "Folders, files or globs of raw data, joined by commas; all nodes must be able to read them.")
    output: str = flag("", "Folder or url of the shards, manifest.jsonl and ledger.json; all nodes write there.")
    content_key: str = flag("text", "Key of a line's JSON object; for .tar: txt, json:KEY, or npy (ids, no text).")
    seqlen: int = flag(2048, "Tokens a model sees at once. A sample is one longer.", least=1)
    tokenizer: str = flag("EleutherAI/gpt-neox-20b", "Hub id, local Hugging Face folder, or tokenizer.json file.")
    wds_chunk_size: int = flag(8192, "Samples in a shard; the last one may hold fewer.", least=1)
    seed: int = flag(42, "Of the shuffle, of the choice of files and of sampling.")
    suffixes: tuple[str, ...] = flag(SUFFIXES, "Endings of the files that are read.")
    subset: int | None = flag(None, "Read only so many files, chosen by --seed.", least=1)
    subfraction: float | None = flag(None, "Read only this part of the files, chosen by --seed.", above=0)
    vocab_size: int | None = flag(
        None,
        "Vocabulary of the model. Ids must be below it; negative ones (only --content_key npy has them) count from its "
        "end. None: that of the tokenizer.",
    )
    do_sample: bool = flag(False, "Write the samples of each source as often as --default_dataset_yaml says.")
    default_dataset_yaml: str | None = flag(None, "With --do_sample: the sources, their markers and frequencies.")
    no_shuffle: bool = flag(False, "Leave the samples in the order of the files.")
    data_key: str = flag("npy", "How a sample's ids are written.", choices=SAMPLE_FORMATS)
    on_bad_line: str = flag(
        "stop", "A line or member that is not a document: stop, or skip and count it.", choices=("stop", "skip")
    )
    max_document_bytes: int = flag(256 << 20, "Longer lines are rejected and counted, not read into memory.", least=1)
    encoder: str = flag("auto", "As of `openlm prepare`; all nodes must have it.", choices=ENCODERS)
    resume: bool = flag(False, "Go on with the work a killed run left; the result is the same byte for byte.")
    overwrite: bool = flag(False, "Replace what the output folder holds, once the new data is there.")
    ray_address: str | None = flag(None, "Of the cluster's head. None: $RAY_ADDRESS, else a cluster on this machine.")
    ray_dashboard_host: str = flag("127.0.0.1", "Where a cluster that is started here shows its dashboard.")
    force_parallelism: int | None = flag(
        None, "Tasks at a time. None: as many as the cluster has cores for, also those that join later.", least=1
    )
    ray_task_memory_gb: float | None = flag(None, "Memory that Ray reserves for each task. None: none.", above=0)
    ray_runtime_env: str | None = flag(None, "JSON or YAML file passed to ray.init as runtime_env. None: none.")
    force_num_cores: int | None = flag(None, "Cores of a cluster that is started here. None: all.", least=1)
    num_writers_per_node: int | None = flag(None, "Shards written at a time, for each node. None: any number.", least=1)
    ray_spill_location: str | None = flag(None, "Accepted and ignored: no data pass through Ray's object store.")
    presort: bool = flag(False, "Accepted and ignored: files are always taken in the order of their names.")
    allow_imbalanced_write: bool = flag(False, "Accepted and ignored: all shards but the last hold equally many.")

    def __post_init__(self) -> None:
        if not self.input or not self.output:
            raise ConfigError(f"{'--output' if self.input else '--input'}: not given. See --help.")
        if self.subfraction is not None and self.subfraction > 1:
            raise ConfigError(f"--subfraction {self.subfraction}: must be at most 1.")
        if self.do_sample and self.default_dataset_yaml is None:
            raise ConfigError("--do_sample: needs --default_dataset_yaml, the sources and how often they are written.")
        ignored = [f"--{name}" for name in IGNORED if getattr(self, name)]
        if ignored:
            logging.warning("%s: has no meaning here and is ignored. See --help.", ", ".join(ignored))
        if self.ray_dashboard_host not in ("127.0.0.1", "localhost", "::1"):
            logging.warning(
                "--ray_dashboard_host %s: whoever reaches it can run programs here; it knows no password.",
                self.ray_dashboard_host,
            )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Make the data set the flags describe; the ledger of what went where."""
    parser = Parser(description=__doc__)
    add_group(parser, TokenizeShuffle, separator="_")
    flags = read_group(parser.parse_args(argv), TokenizeShuffle)

    from open_lm.preprocess import accounting
    from open_lm.preprocess.encoder_choice import choose_encoder, memory_file
    from open_lm.preprocess.input import sample_texts
    from open_lm.preprocess.make import Destination, build_data_set
    from open_lm.preprocess.ray_workers import RayTasks, connect

    job, tokenizer = make_job(flags)
    sample = sample_texts([url for url, _ in job.inputs], job.content_key)
    encoder, why = choose_encoder(tokenizer, flags.encoder, sample, memory_file())
    print(f"reading    {len(job.inputs):,} files, {text.size(sum(size for _, size in job.inputs))}")
    print(f"encoder    {encoder}: {why}", flush=True)
    started, output = time.monotonic(), absolute(flags.output)
    ray = connect(
        flags.ray_address,
        n_cores=flags.force_num_cores,
        dashboard_host=flags.ray_dashboard_host,
        runtime_env=runtime_env(flags.ray_runtime_env),
    )
    try:
        n_nodes = sum(node["Alive"] for node in ray.nodes())
        n_tasks = flags.force_parallelism or max(1, int(ray.cluster_resources().get("CPU", 1)))
        print(f"cluster    {n_nodes} nodes, {n_tasks} tasks at a time", flush=True)
        ledger = build_data_set(
            job,
            Destination(output, output.rstrip("/") + ".unfinished"),
            tokenizer.to_json(),
            n_workers=n_tasks,
            n_writers=min(n_tasks, (flags.num_writers_per_node or n_tasks) * n_nodes),
            encoder=encoder,
            resume=flags.resume,
            overwrite=flags.overwrite,
            run=RayTasks(
                ray,
                follow=flags.force_parallelism is None and flags.num_writers_per_node is None,
                memory_bytes=int(flags.ray_task_memory_gb * 1e9) if flags.ray_task_memory_gb else None,
            ),
        )
    finally:
        ray.shutdown()
    print("\n".join(accounting.lines(ledger)))
    rate = text.count(ledger["tokens"]["in"] / (time.monotonic() - started))
    print(f"written    {storage.shown(output)} in {text.duration(time.monotonic() - started)} ({rate} tokens/s)")
    return ledger


def runtime_env(path: str | None) -> dict[str, Any] | None:
    """The `runtime_env` of ray.init, from a file.

    Raises:
        ConfigError: it holds no mapping.
    """
    if path is None:
        return None
    import yaml

    try:
        found = yaml.safe_load(storage.read_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"--ray_runtime_env {path}: not yaml ({error}).") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--ray_runtime_env {path}: holds no mapping. See Ray's documentation of runtime_env.")
    return found


def make_job(flags: TokenizeShuffle) -> tuple[Any, Any]:
    """The job the flags describe, and its tokenizer.

    Raises:
        ConfigError: the vocabulary is smaller than the tokenizer's, or the yaml of sources is not one.
        StorageError: there are no files.
    """
    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.preprocess import job as jobs
    from open_lm.preprocess.input import member_ending
    from open_lm.preprocess.jsonl import TAR, expand_inputs
    from open_lm.preprocess.source_rates import assign

    inputs = tuple(absolute(part) for part in flags.input.split(",") if part)
    urls = chosen(expand_inputs(inputs, "--input", flags.suffixes, within=True), flags)
    if any(url.endswith(TAR) for url in urls):
        member_ending(flags.content_key, "--content_key")
    tokenizer = load_tokenizer(flags.tokenizer)
    vocab_size = flags.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"--vocab_size {vocab_size}: must be {tokenizer.vocab_size} or more, as the tokenizer.")
    sampling: dict[str, Any] = {}
    if flags.do_sample and flags.default_dataset_yaml:  # DCLM's wrapper names the yaml with and without sampling
        sampling = assign(urls, flags.default_dataset_yaml, "--default_dataset_yaml")
    job = jobs.make_job(
        urls,
        tokenizer,
        vocab_size=vocab_size,
        seq_len=flags.seqlen,
        shard_size=flags.wds_chunk_size,
        data_key=flags.data_key,
        content_key=flags.content_key,
        seed=flags.seed,
        on_bad_line=flags.on_bad_line,
        max_document_bytes=flags.max_document_bytes,
        shuffle=not flags.no_shuffle,
        **sampling,
    )
    return job, tokenizer


def chosen(urls: list[str], flags: TokenizeShuffle) -> list[str]:
    """The files of --subset and --subfraction: the first in the order of a hash of seed and name."""
    from open_lm.data.permutations import key

    n = min(len(urls), flags.subset or len(urls))
    if flags.subfraction is not None:
        n = int(n * flags.subfraction)
    if not n:
        raise StorageError(f"--subfraction {flags.subfraction}: of {len(urls)} files none is left. Give more.")
    return sorted(sorted(urls, key=lambda url: int(key("file", flags.seed, os.path.basename(url), url)))[:n])


def absolute(path: str) -> str:
    """A url as it is, a local path from the root: Ray's workers have working folders of their own."""
    return path if storage.is_remote(path) else str(storage.local_path(path).absolute())
