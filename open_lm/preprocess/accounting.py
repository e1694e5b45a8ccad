"""Ledger of preprocessing: every document and token accounted for; its sums must balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from open_lm import text
from open_lm.errors import DataError
from open_lm.preprocess.job import Job

BlockRecords = Mapping[str, Mapping[str, Any]]
"""Records of finished blocks, by name."""


def make_ledger(job: Job, blocks: BlockRecords, tails: BlockRecords, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ledger of a finished job, from the records of its blocks.

    Raises:
        DataError: documents or tokens are missing or too many: a bug, or somebody touched the unfinished work.
    """
    samples = sum(row["num_sequences"] for row in rows)
    came_in, n_tokens = _came_in(blocks)
    tokens = {
        "in": n_tokens,
        "in_shards": samples * job.sample_tokens,
        "tail": sum(record["tail"] for record in tails.values()),
    }
    ledger = came_in | {"tokens": tokens, "samples": samples, "shards": len(rows)} | _settings(job)
    if job.sampling:
        ledger["sampling"] = _sampling(job, blocks, tails)
    _check(ledger)
    return ledger


def make_flat_ledger(job: Job, blocks: BlockRecords, arrays: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ledger of a job that wrote flat arrays: every token is in one of them.

    Raises:
        DataError: as `make_ledger`.
    """
    came_in, n_tokens = _came_in(blocks)
    in_arrays = sum(array["tokens"] for array in arrays)
    samples = sum(array["tokens"] // job.sample_tokens for array in arrays)
    about = {"samples": samples, "shards": len(arrays), "arrays": list(arrays), "dtype": job.dtype.name}
    tokens = {"in": n_tokens, "in_shards": in_arrays, "tail": 0}
    ledger = came_in | {"tokens": tokens} | about | _settings(job)
    _check(ledger)
    return ledger


def _came_in(blocks: BlockRecords) -> tuple[dict[str, Any], int]:
    """Counts of documents and lines by outcome, and the number of their tokens."""
    totals: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for record in blocks.values():
        totals.update({key: record[key] for key in ("lines", "blank_lines", "bytes", "tokenized", "tokens")})
        rejected.update(record["rejected"])
    documents = {
        "in": totals["lines"] - totals["blank_lines"],
        "tokenized": totals["tokenized"],
        "rejected": dict(sorted(rejected.items())),
    }
    came_in = {"documents": documents, "blank_lines": totals["blank_lines"], "text_bytes": totals["bytes"]}
    return came_in, totals["tokens"]


def _settings(job: Job) -> dict[str, Any]:
    return {
        "seq_len": job.seq_len,
        "tokens_per_sample": job.sample_tokens,
        "vocab_size": job.vocab_size,
        "tokenizer": job.tokenizer,
        "job": orjson.loads(job.json),
    }


def _sampling(job: Job, blocks: BlockRecords, tails: BlockRecords) -> dict[str, dict[str, float]]:
    """Of each source how many samples there are, and how many were written."""
    found = {name: {"frequency": often, "samples": 0, "written": 0} for name, often in job.sampling}
    sources = [*(job.source(block) for block in blocks), *range(len(job.sampling))]
    for source, record in zip(sources, [*blocks.values(), *tails.values()], strict=True):
        books = found[job.sampling[source][0]]
        books["samples"] += record["packed"]
        books["written"] += record["samples"]
    written = sum(books["written"] for books in found.values())
    return {name: books | {"share": books["written"] / max(1, written)} for name, books in found.items()}


def _check(ledger: dict[str, Any]) -> None:
    documents, tokens = ledger["documents"], ledger["tokens"]
    accounted = documents["tokenized"] + sum(documents["rejected"].values())
    by_source = ledger.get("sampling", {}).values()
    added = sum(books["written"] - books["samples"] for books in by_source) * ledger["tokens_per_sample"]
    tokens_out = tokens["in_shards"] - added + tokens["tail"]
    if documents["in"] != accounted or tokens["in"] != tokens_out:
        raise DataError(
            f"the books do not balance: documents in {documents['in']}, accounted for {accounted}; "
            f"tokens in {tokens['in']}, in shards (without copies) and tail {tokens_out}. "
            "Nothing was published. Start again with --overwrite."
        )


def lines(ledger: dict[str, Any]) -> list[str]:
    """The ledger as a person reads it."""
    documents, tokens = ledger["documents"], ledger["tokens"]
    reasons = ", ".join(f"{n} {reason}" for reason, n in documents["rejected"].items())
    n_rejected = sum(documents["rejected"].values())
    sampling = ledger.get("sampling", {})
    kind = f"arrays of {ledger['dtype']}" if "arrays" in ledger else "shards"
    added = sum(books["written"] - books["samples"] for books in sampling.values()) * ledger["tokens_per_sample"]
    copied = f" {'+' if added >= 0 else '-'} {abs(added):,} by sampling" if sampling else ""
    return [
        f"documents  {documents['in']:,} in = {documents['tokenized']:,} tokenized + {n_rejected:,} rejected"
        + (f" ({reasons})" if reasons else ""),
        f"tokens     {tokens['in']:,} in{copied} = {tokens['in_shards']:,} in {kind} + {tokens['tail']:,} tail",
        f"samples    {ledger['samples']:,} of {ledger['tokens_per_sample']:,} tokens in {ledger['shards']:,} {kind}"
        f" ({text.count(tokens['in_shards'])} tokens from {text.size(ledger['text_bytes'])} of text)",
        *(
            f"source     {name}: {books['samples']:,} samples, {books['written']:,} written "
            f"(x{books['frequency']:g}), {100 * books['share']:.2f} % of the data"
            for name, books in sampling.items()
        ),
    ]
