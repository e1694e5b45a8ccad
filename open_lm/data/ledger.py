"""Where every document and token went: the books of a data set, which must balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import orjson

from open_lm import text
from open_lm.data.preprocess import TAILS, Job, Workplace
from open_lm.errors import DataError


def make_ledger(job: Job, work: Workplace, blocks: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ledger of a finished job, from the records of its tasks.

    Raises:
        DataError: documents or tokens are missing or too many: a bug, or somebody touched the unfinished work.
    """
    totals: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for name in blocks:
        record = work.done(name) or {}
        totals.update({key: record[key] for key in ("lines", "blank_lines", "bytes", "tokenized", "tokens")})
        rejected.update(record["rejected"])
    samples = sum(row["num_sequences"] for row in rows)
    ledger = {
        "documents": {
            "in": totals["lines"] - totals["blank_lines"],
            "tokenized": totals["tokenized"],
            "rejected": dict(sorted(rejected.items())),
        },
        "blank_lines": totals["blank_lines"],
        "text_bytes": totals["bytes"],
        "tokens": {
            "in": totals["tokens"],
            "in_shards": samples * job.sample_tokens,
            "tail": (work.done(TAILS) or {})["tail"],
        },
        "samples": samples,
        "shards": len(rows),
        "seq_len": job.seq_len,
        "tokens_per_sample": job.sample_tokens,
        "vocab_size": job.vocab_size,
        "tokenizer": job.tokenizer,
        "job": orjson.loads(job.to_json()),
    }
    _check(ledger)
    return ledger


def _check(ledger: dict[str, Any]) -> None:
    documents, tokens = ledger["documents"], ledger["tokens"]
    accounted = documents["tokenized"] + sum(documents["rejected"].values())
    if documents["in"] != accounted or tokens["in"] != tokens["in_shards"] + tokens["tail"]:
        raise DataError(
            f"the books do not balance: documents in {documents['in']}, accounted for {accounted}; "
            f"tokens in {tokens['in']}, in shards and tail {tokens['in_shards'] + tokens['tail']}. "
            "Nothing was published. Start anew with --overwrite."
        )


def lines(ledger: dict[str, Any]) -> list[str]:
    """The ledger as a person reads it."""
    documents, tokens = ledger["documents"], ledger["tokens"]
    reasons = ", ".join(f"{n} {reason}" for reason, n in documents["rejected"].items())
    n_rejected = sum(documents["rejected"].values())
    return [
        f"documents  {documents['in']:,} in = {documents['tokenized']:,} tokenized + {n_rejected:,} rejected"
        + (f" ({reasons})" if reasons else ""),
        f"tokens     {tokens['in']:,} in = {tokens['in_shards']:,} in shards + {tokens['tail']:,} tail",
        f"samples    {ledger['samples']:,} of {ledger['tokens_per_sample']:,} tokens in {ledger['shards']:,} shards"
        f" ({text.count(tokens['in_shards'])} tokens from {text.size(ledger['text_bytes'])} of text)",
    ]
