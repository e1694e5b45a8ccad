"""Preparing chat data: rows become labelled tokens, shuffled, packed or paired, written as shards with their ledger."""

from __future__ import annotations

import os
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.formats import token_dtype
from open_lm.data.manifest import FILENAME, write_manifest
from open_lm.data.marks import ID_BITS, IDS, PADDING, marked_dtype
from open_lm.data.shards import describe_shard, write_shard
from open_lm.data.tokenizer import Tokenizer
from open_lm.errors import DataError
from open_lm.post_training.chat.conversations import READERS, Conversation, ConversationPair, ConversationPrompt
from open_lm.post_training.chat.labels import Labelled, label_all, n_targets
from open_lm.post_training.chat.packing import pack, padded
from open_lm.post_training.chat.rows import rows_in
from open_lm.post_training.chat.template import ChatTemplate, TemplateRefusal, template_facts
from open_lm.preprocess.jsonl import Rejected
from open_lm.preprocess.packing import shuffle_keys

_CHUNK = 512
"""Rows that are tokenized at once."""
MARGINS = "margins.npy"
PROMPTS = "prompts.jsonl"


@dataclass(frozen=True)
class ChatJob:
    """One job of chat preparation. `form` is one of READERS; a sequence has `seq_len` + 1 tokens."""

    form: str
    files: tuple[str, ...]
    seq_len: int
    packing: bool = True
    truncate: bool = True
    skip_bad: bool = False
    shard_size: int = 8192
    seed: int = 42


@dataclass
class Books:
    """Counts of input and output. Every row is used, rejected or dropped; every token is kept or cut off."""

    counts: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


class Records:
    """Tokens of conversations in a file of their own, found again by number; memory holds 8 bytes for each."""

    def __init__(self, path: str, width: int):
        """`width`: sequences that belong together, 2 for pairs."""
        self._file, self._path, self.width = open(path, "wb"), path, width  # noqa: SIM115
        self.ends, self.margins = array("q", [0]), array("f")

    def add(self, sequences: list[np.ndarray], margin: float = 0.0) -> None:
        """Append sequences that belong together."""
        for tokens in sequences:
            self._file.write(tokens.astype(np.int32).tobytes())
            self.ends.append(self.ends[-1] + len(tokens))
        self.margins.append(margin)

    def __len__(self) -> int:
        return len(self.margins)

    def read(self, numbers: np.ndarray) -> Iterator[list[np.ndarray]]:
        """The records `numbers`, in that order."""
        self._file.close()
        tokens = np.memmap(self._path, np.int32, "r") if self.ends[-1] else np.zeros(0, np.int32)
        for number in numbers.tolist():
            first = number * self.width
            yield [np.array(tokens[self.ends[k] : self.ends[k + 1]]) for k in range(first, first + self.width)]


def prepare(job: ChatJob, template: ChatTemplate, tokenizer: Tokenizer, folder: str) -> dict[str, Any]:
    """Write the data set and return its ledger; the folder appears when all of it is there.

    Where `folder` is a url, the work lies in a temporary folder, and the manifest is uploaded last.

    Raises:
        DataError: a row is bad and the job does not skip those, or nothing is left to train on.
        StorageError: the folder cannot be written, which is found out first.
    """
    remote = storage.is_remote(folder)
    work = tempfile.mkdtemp(prefix="open_lm-chat-") if remote else folder.rstrip("/") + ".unfinished"
    shutil.rmtree(work, ignore_errors=True)
    storage.require_writable(work, "--output-dir")
    storage.probe_writable(folder)
    books = Books()
    write = _write_prompts if job.form == "prompts" else _write_samples
    try:
        rows = write(job, template, tokenizer, work, books)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    ledger = _ledger(job, template, tokenizer, books, rows)
    storage.write_bytes(os.path.join(work, "ledger.json"), orjson.dumps(ledger, option=orjson.OPT_INDENT_2))
    if remote:
        _upload(work, folder)
        shutil.rmtree(work)
    else:
        os.replace(work, folder)
    return ledger


def _upload(work: str, folder: str) -> None:
    """Copy all files, those that say what there is last."""
    last = (FILENAME, PROMPTS)
    for name in sorted(os.listdir(work), key=lambda name: (name in last, name)):
        with open(os.path.join(work, name), "rb") as file, storage.open_atomic(storage.join(folder, name)) as target:
            shutil.copyfileobj(file, target, 1 << 20)


def _write_samples(
    job: ChatJob, template: ChatTemplate, tokenizer: Tokenizer, work: str, books: Books
) -> list[dict[str, Any]]:
    width = 2 if job.form == "pairs" else 1
    path = os.path.join(work, "records.bin")
    records = Records(path, width)
    for found in _parsed(job, books):
        _add_labelled(found, records, job, template, tokenizer, books)
    if not len(records):
        reasons = {**books.rejected, **books.dropped}
        raise DataError(f"--input-files: nothing is left to train on ({reasons}). Check the files and --seqlen.")
    order = np.argsort(shuffle_keys(len(records), seed=job.seed, block="chat"), kind="stable")
    rows = _write_shards(job, tokenizer, work, _samples(job, records, order, tokenizer.pad_id), books)
    if width == 2 and any(records.margins):
        np.save(os.path.join(work, MARGINS), np.array(records.margins, np.float32)[order])
    os.unlink(path)
    write_manifest(os.path.join(work, FILENAME), rows)
    return rows


def _parsed(job: ChatJob, books: Books) -> Iterator[list[Any]]:
    """The rows in chunks, parsed; those that are none of the form are counted, or end the job."""
    chunk: list[Any] = []
    for url in job.files:
        for where, fields in rows_in(url):
            books.counts["in"] += 1
            found = fields if isinstance(fields, Rejected) else READERS[job.form](fields)
            if isinstance(found, Rejected):
                _reject(found, where, job, books)
                continue
            chunk.append((where, found))
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
    yield chunk


def _reject(found: Rejected, where: str, job: ChatJob, books: Books) -> None:
    if not job.skip_bad:
        raise DataError(
            f"{where}: {found.reason.replace('_', ' ')}. Repair it, or leave such rows out with --on-bad-line skip."
        )
    books.rejected[found.reason] += 1


def _add_labelled(
    chunk: list[tuple[str, Conversation | ConversationPair]],
    records: Records,
    job: ChatJob,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    books: Books,
) -> None:
    """Label one chunk of rows and keep what fits."""
    sides = [[one.chosen, one.rejected] if isinstance(one, ConversationPair) else [one] for _, one in chunk]
    labelled = iter(label_all([side for pair in sides for side in pair], template, tokenizer))
    for (where, one), pair in zip(chunk, sides, strict=True):
        found = [next(labelled) for _ in pair]
        if fault := _fault(found):
            _reject(fault, where, job, books)
            continue
        _keep(
            cast("list[Labelled]", found), one.margin if isinstance(one, ConversationPair) else 0.0, records, job, books
        )


def _fault(found: list[Labelled | Rejected]) -> Rejected | None:
    """The reason to leave out one row, if there is one; equal sides too, for a template may trim what differs."""
    good = [one.tokens for one in found if isinstance(one, Labelled)]
    if len(good) == 2 and np.array_equal(good[0], good[1]):
        return Rejected("equal_sides")
    return next((one for one in found if isinstance(one, Rejected)), None)


def _keep(found: list[Labelled], margin: float, records: Records, job: ChatJob, books: Books) -> None:
    """Add one row's sequences to the records, cut to length where the job allows that."""
    size = job.seq_len + 1
    lengths = [len(one.tokens) for one in found]
    kept = [one.tokens[:size] for one in found]
    if max(lengths) > size and not job.truncate:
        books.dropped["too_long"] += 1
        return
    if not all(map(n_targets, kept)):
        books.dropped["no_target_after_truncation"] += 1
        return
    if len(kept) == 2 and np.array_equal(kept[0], kept[1]):
        books.dropped["equal_sides_after_truncation"] += 1
        return
    books.counts["used"] += 1
    books.counts["truncated"] += max(lengths) > size
    books.counts["tokens"] += sum(lengths)
    books.counts["cut_off"] += sum(lengths) - sum(map(len, kept))
    books.counts["trained"] += sum(map(n_targets, kept))
    books.counts["added_end"] += sum(one.added_end for one in found)
    records.add(kept, margin)


def _samples(job: ChatJob, records: Records, order: np.ndarray, pad_id: int) -> Iterator[np.ndarray]:
    """The samples, each of the length that its form has."""
    size = job.seq_len + 1
    sequences = records.read(order)
    if job.form == "pairs":
        for pair in sequences:
            yield np.concatenate([padded([side], size, pad_id) for side in pair])
        return
    alone = (one for (one,) in sequences)
    for parts in pack(alone, size) if job.packing else ([one] for one in alone):
        yield padded(parts, size, pad_id)


def _write_shards(
    job: ChatJob, tokenizer: Tokenizer, work: str, samples: Iterator[np.ndarray], books: Books
) -> list[dict[str, Any]]:
    """The shards; the manifest's rows."""
    dtype = marked_dtype(token_dtype(tokenizer.vocab_size))
    rows: list[dict[str, Any]] = []
    written = 0
    while chunk := [tokens for _, tokens in zip(range(job.shard_size), samples, strict=False)]:
        joined = np.stack(chunk)
        table = np.empty(joined.shape, dtype)
        table["ids"], table["marks"] = joined & IDS, joined >> ID_BITS
        books.counts["padding"] += int((table["marks"] == PADDING).sum())
        name = f"{len(rows):08d}"
        path = os.path.join(work, f"{name}.tar")
        with storage.open_atomic(path) as file:
            write_shard(file, table, "npy", first_number=written)
        facts: dict[str, Any] = {"tokenizer": tokenizer.name, "eot_id": tokenizer.eot_id, "seq_len": job.seq_len}
        form = "pairs" if job.form == "pairs" else "samples"
        facts |= {"form": form, "packed": form == "samples" and job.packing}
        rows.append({"shard": name, **describe_shard(storage.read_bytes(path), name), **facts})
        written += len(chunk)
    return rows


def _write_prompts(
    job: ChatJob, template: ChatTemplate, tokenizer: Tokenizer, work: str, books: Books
) -> list[dict[str, Any]]:
    """Prompts as ids beside the rows they come from, in shuffled order; no shards. Memory holds 8 bytes for each."""
    path, ends = os.path.join(work, "records.bin"), array("q", [0])
    with open(path, "wb") as spool:
        for where, prompt in (one for chunk in _parsed(job, books) for one in chunk):
            ids = _prompt_ids(prompt, template, tokenizer)
            if isinstance(ids, Rejected):
                _reject(ids, where, job, books)
            elif len(ids) >= job.seq_len:
                books.dropped["too_long"] += 1
            else:
                books.counts["used"] += 1
                books.counts["tokens"] += len(ids)
                ends.append(ends[-1] + spool.write(orjson.dumps({**prompt.row, "prompt_ids": ids}) + b"\n"))
    if len(ends) == 1:
        raise DataError(f"--input-files: no prompt is left ({dict(books.rejected | books.dropped)}). Check the files.")
    order = np.argsort(shuffle_keys(len(ends) - 1, seed=job.seed, block="prompts"), kind="stable")
    lines = np.memmap(path, np.uint8, "r")
    with storage.open_atomic(os.path.join(work, PROMPTS)) as file:
        file.writelines(lines[ends[k] : ends[k + 1]].tobytes() for k in order.tolist())
    os.unlink(path)
    return []


def _prompt_ids(prompt: ConversationPrompt, template: ChatTemplate, tokenizer: Tokenizer) -> list[int] | Rejected:
    try:
        ids = tokenizer.encode(template.prompt(prompt.messages))
    except TemplateRefusal:
        return Rejected("template_refuses")
    return ids or Rejected("nothing_rendered")


def _end_of_answers(template: ChatTemplate, tokenizer: Tokenizer) -> int:
    """The token that ends an answer: the last one trained on in a conversation of two messages."""
    example = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    (found,) = label_all([example], template, tokenizer)
    if isinstance(found, Rejected):
        return tokenizer.eot_id
    trained = found.tokens[found.tokens >> ID_BITS == 0]
    return int(trained[-1]) & IDS


def _ledger(
    job: ChatJob, template: ChatTemplate, tokenizer: Tokenizer, books: Books, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The ledger of all rows and tokens.

    Raises:
        DataError: the sums do not balance: a bug.
    """
    counts, samples = books.counts, sum(row["num_sequences"] for row in rows)
    in_shards = samples * (2 if job.form == "pairs" else 1) * (job.seq_len + 1)
    tokens = {name: counts[name] for name in ("tokens", "cut_off", "padding", "trained")}
    rest = counts["in"] - counts["used"] - books.rejected.total() - books.dropped.total()
    if rest or (rows and counts["tokens"] - counts["cut_off"] + counts["padding"] != in_shards):
        raise DataError(f"the ledger does not balance ({counts}, {samples} samples): this is a bug, nothing is kept.")
    about: Callable[[Counter[str]], dict[str, int]] = lambda counter: dict(sorted(counter.items()))  # noqa: E731
    return {
        "form": job.form,
        job.form: {
            "in": counts["in"],
            "used": counts["used"],
            "truncated": counts["truncated"],
            "rejected": about(books.rejected),
            "dropped": about(books.dropped),
        },
        "tokens": {
            "in": tokens["tokens"],
            **{k: v for k, v in tokens.items() if k != "tokens"},
            "in_shards": in_shards,
        },
        "samples": samples,
        "end_of_text_added": counts["added_end"],
        "seq_len": job.seq_len,
        "tokens_per_sample": job.seq_len + 1 if samples else 0,
        "tokenizer": tokenizer.name,
        "pad_id": tokenizer.pad_id,
        "stop_ids": [_end_of_answers(template, tokenizer)],
        **template_facts(template),
    }
