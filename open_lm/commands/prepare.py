"""`openlm prepare`: text to shards on one machine; every document and token is accounted for."""

import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_lm import storage, text
from open_lm.data.config import ENCODERS, SAMPLE_FORMATS
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group

ID_BYTES = {"uint16": 2, "uint32": 4}
OTHER_DATA = {
    "--chat": "open_lm.commands.prepare_chat",
    "--reference-log-probs": "open_lm.post_training.reference_log_probs",
}
"""Flags that ask for other data than text -> the command that makes it, whose flags then count."""


@dataclass(frozen=True)
class Make2048:
    """Input and output"""

    input_files: tuple[str, ...] = flag(
        (),
        "Raw text: paths, urls, globs or folders of .jsonl, .jsonl.zst, .jsonl.gz, one document a line; of .txt and "
        ".md, one a file; or of .tar, one a member.",
    )
    output_dir: str = flag(
        "", "Folder or url for the shards, manifest.jsonl and ledger.json. It appears when all is there."
    )
    content_key: str = flag(
        "text",
        "Key of a line's JSON object that holds the document; for .tar: txt, json:KEY, or npy (ids, no text).",
    )
    tokenizer: str = flag(
        "EleutherAI/gpt-neox-20b",
        "Hub id, local Hugging Face folder, or tokenizer.json file. It names the end of text.",
    )
    tmp_dir: str | None = flag(
        None, "Local folder for unfinished work when the output is a url. None: the current folder."
    )
    upload_to_s3: bool = flag(
        False, "Write to $S3_BASE/<name of --output-dir> instead; unfinished work stays beside --output-dir."
    )
    seqlen: int = flag(2048, "Tokens a model sees at once. A sample is one longer, since targets are shifted by one.")
    shard_size: int = flag(8192, "Samples in a shard; the last one may hold fewer.")
    data_key: str = flag("npy", "How a sample's ids are written; npy is the fastest.", choices=SAMPLE_FORMATS)
    format: str = flag(
        "webdataset",
        "webdataset: shards of samples. npy-flat: arrays as OLMo and dolma read them, ids of whole documents in .npy "
        "without header, their places and origins in .csv.gz; shuffled in blocks of up to 128 MiB of text.",
        choices=("webdataset", "npy-flat"),
    )
    dtype: str = flag(
        "auto", "Of ids in npy. auto: uint16 where the vocabulary fits, else uint32.", choices=("auto", *ID_BYTES)
    )
    seed: int = flag(42, "Of the shuffle, a permutation of all samples.")
    num_workers: int = flag(0, "Processes. 0: one for each core. The shards do not depend on it.")
    num_consumers: int = flag(0, "Processes of the writing half, OpenLM's flag. 0: --num-workers.")
    on_bad_line: str = flag(
        "stop", "A line that is no JSON object with text: stop, or skip and count it.", choices=("stop", "skip")
    )
    max_document_bytes: int = flag(256 << 20, "Longer lines are rejected and counted, not read into memory.")
    encoder: str = flag(
        "auto",
        "auto: fastokens, if installed and exact on a sample of the text; else tokenizers. The ids are the same.",
        choices=ENCODERS,
    )
    resume: bool = flag(False, "Go on with the work a killed run left; the result is the same byte for byte.")
    overwrite: bool = flag(False, "Replace what the output folder holds, once the new data is there.")
    dry_run: bool = flag(False, "Say what would be read and written, and stop.")
    chat: bool = flag(
        False,
        "Make conversations, pairs or prompts instead, as `openlm prepare-chat`: with its flags, which "
        "`openlm prepare --chat --help` lists.",
    )
    reference_log_probs: bool = flag(
        False,
        "Compute log-probabilities of pairs under a reference model instead, as `openlm reference-log-probs`: with its "
        "flags, which `openlm prepare --reference-log-probs --help` lists; a word after it is its --out.",
    )

    def __post_init__(self) -> None:
        if not self.input_files or not self.output_dir:
            missing = "--input-files" if not self.input_files else "--output-dir"
            raise ConfigError(f"{missing}: not given. See --help.")
        if self.format == "npy-flat" and self.data_key != "npy":
            raise ConfigError(f"--data-key {self.data_key}: --format npy-flat writes no members. Leave it out.")
        for name in ("seqlen", "shard_size", "max_document_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 1 or more.")


def main(argv: Sequence[str] | None = None) -> Any:
    """Make the data set the flags describe; the ledger of what went where."""
    words = list(sys.argv[1:] if argv is None else argv)
    if other := named_other(words):
        return make_other(other, words)
    parser = Parser(description=__doc__)
    add_group(parser, Make2048)
    flags = read_group(parser.parse_args(words), Make2048)

    from open_lm.preprocess import accounting
    from open_lm.preprocess.encoder_choice import choose_encoder, memory_file
    from open_lm.preprocess.input import sample_texts
    from open_lm.preprocess.make import build_data_set

    job, tokenizer = make_job(flags)
    encoder, why = choose_encoder(
        tokenizer, flags.encoder, sample_texts([url for url, _ in job.inputs], job.content_key), memory_file()
    )
    print(f"{describe(job, flags)}\nencoder    {encoder}: {why}", flush=True)
    if flags.dry_run:
        return {}
    started = time.monotonic()
    ledger = build_data_set(
        job,
        where_to(flags),
        tokenizer.to_json(),
        n_workers=n_workers(flags),
        n_writers=flags.num_consumers or None,
        encoder=encoder,
        resume=flags.resume,
        overwrite=flags.overwrite,
    )
    seconds = time.monotonic() - started
    print("\n".join(accounting.lines(ledger)))
    rate = text.count(ledger["tokens"]["in"] / seconds)
    print(f"written    {flags.output_dir} in {text.duration(seconds)} ({rate} tokens/s)")
    return ledger


def named_other(words: Sequence[str]) -> str | None:
    """The word that asks for other data than text, if one does: a flag of OTHER_DATA, however it is spelled.

    Raises:
        ConfigError: two do.
    """
    found = [word for word in words if _flag_of(word) in OTHER_DATA]
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(found)}: they are different data. Give one of them.")
    return found[0] if found else None


def _flag_of(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def make_other(other: str, words: list[str]) -> Any:
    """Run the command that makes what the flag `other` among `words` asks for."""
    at, spelled, file = words.index(other), _flag_of(other), other.partition("=")[2]
    rest = [file, *words[at + 1 :]] if file else words[at + 1 :]
    if spelled == "--reference-log-probs" and rest and not rest[0].startswith("-"):
        rest = ["--out", *rest]
    if not sys.argv[0].endswith(spelled):
        sys.argv = [f"{sys.argv[0]} {spelled}", *words]  # what usage and messages call the command
    return importlib.import_module(OTHER_DATA[spelled]).main([*words[:at], *rest])


def make_job(flags: Make2048) -> tuple[Any, Any]:
    """The job the flags describe, and its tokenizer.

    Raises:
        ConfigError: the ids do not fit --dtype.
    """
    import numpy as np

    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.preprocess import job as jobs
    from open_lm.preprocess.input import member_ending
    from open_lm.preprocess.jsonl import JSON_ENDINGS, TAR, WHOLE, expand_inputs

    urls = expand_inputs(flags.input_files, "--input-files", (*JSON_ENDINGS, *WHOLE, TAR))
    if any(url.endswith(TAR) for url in urls):
        member_ending(flags.content_key)
    tokenizer = load_tokenizer(flags.tokenizer)
    job = jobs.make_job(
        urls,
        tokenizer,
        seq_len=flags.seqlen,
        shard_size=flags.shard_size,
        data_key=flags.data_key,
        content_key=flags.content_key,
        seed=flags.seed,
        on_bad_line=flags.on_bad_line,
        max_document_bytes=flags.max_document_bytes,
        form=flags.format,
        id_bytes=ID_BYTES.get(flags.dtype, 0),
    )
    if job.vocab_size > np.iinfo(job.dtype).max + 1:
        raise ConfigError(f"--dtype {flags.dtype}: holds no ids of a vocabulary of {job.vocab_size}. Give uint32.")
    return job, tokenizer


def where_to(flags: Make2048) -> Any:
    """The destination the flags name.

    Raises:
        ConfigError: --upload-to-s3 without the environment variable S3_BASE.
    """
    from open_lm.preprocess.make import Destination, destination

    if not flags.upload_to_s3:
        return destination(flags.output_dir, flags.tmp_dir)
    base = os.environ.get("S3_BASE", "").lstrip("/")
    if not base:
        raise ConfigError("--upload-to-s3: S3_BASE is not set. Set it to the prefix to write below: s3://bucket/data.")
    if not storage.is_remote(base):  # as in OpenLM, where it is a bucket and what follows in it
        base = f"s3://{base}"
    local = destination(flags.output_dir)
    return Destination(storage.join(base, os.path.basename(local.folder)), local.workplace)


def n_workers(flags: Make2048) -> int:
    """One process a core, unless the flag says otherwise."""
    return flags.num_workers or len(os.sched_getaffinity(0))


def describe(job: Any, flags: Make2048) -> str:
    """A summary of the input and the output, one line each."""
    is_flat = flags.format == "npy-flat"
    kind, form = ("arrays", f"flat {job.dtype.name}") if is_flat else ("shards", f".{job.data_key}")
    return (
        f"reading    {len(job.inputs):,} files, {text.size(sum(size for _, size in job.inputs))}\n"
        f"tokenizer  {job.tokenizer}: {job.vocab_size:,} ids, end of text {job.eot_token!r}\n"
        f"writing    {flags.output_dir}: {kind} of {job.shard_size:,} samples "
        f"of {job.sample_tokens:,} tokens ({form})"
    )
