"""Manifests: the shards of a set, their sample counts, and where samples lie inside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from open_lm import storage
from open_lm.errors import DataError

FILENAME = "manifest.jsonl"


@dataclass(frozen=True)
class Shard:
    """One shard of a source. `layout` is [first offset, distance, size] in bytes when its samples are all alike."""

    name: str
    url: str
    n_sequences: int
    key: str | None = None
    layout: tuple[int, int, int] | None = None
    size_bytes: int | None = None
    crc32: str | None = None
    tokenizer: str | None = None
    eot_id: int | None = None
    form: str = "samples"
    """What a sample is: one sequence, or `pairs`, a chosen and a rejected one."""
    packed: bool = False
    """Whether a sequence holds several documents, marked, that attention keeps apart."""


def read_manifest(url: str) -> list[Shard]:
    """The shards a manifest names, in its order; both `num_sequences` and the older `num_chunks` count.

    Raises:
        DataError: a line is no JSON object, lacks a name or count, names a path outside the manifest's folder, or a
            shard is named twice; the line number is given.
    """
    content, folder = storage.read_bytes(url), storage.parent(url)
    shards: dict[str, Shard] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        shard = _shard(line, folder, f"manifest {storage.shown(url)}, line {number}")
        if shard.name in shards:
            raise DataError(
                f"manifest {storage.shown(url)}, line {number}: shard {shard.name} a second time. Remove one."
            )
        shards[shard.name] = shard
    if not shards:
        raise DataError(
            f"manifest {storage.shown(url)}: names no shards. Make it with open_lm.utils.make_wds_manifest."
        )
    return list(shards.values())


def _shard(line: bytes, folder: str, where: str) -> Shard:
    try:
        row = orjson.loads(line)
        name = row["shard"]
        n_sequences = row["num_sequences"] if "num_sequences" in row else row["num_chunks"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise DataError(f'{where}: found {line[:80]!r}, need {{"shard": NAME, "num_sequences": N}}.') from None
    if not isinstance(name, str) or not _is_inside(name):
        raise DataError(f"{where}: shard name {name!r:.80} must be a path inside the manifest's folder.")
    if type(n_sequences) is not int or n_sequences < 0:
        raise DataError(f"{where}: num_sequences is {n_sequences!r}, need a whole number.")
    file = name if name.endswith(".tar") else f"{name}.tar"
    return Shard(
        name=name,
        url=storage.join(folder, file),
        n_sequences=n_sequences,
        key=_typed(row, "data_key", str),
        layout=_layout(row, where),
        size_bytes=_typed(row, "bytes", int),
        crc32=_typed(row, "crc32", str),
        tokenizer=_typed(row, "tokenizer", str),
        eot_id=_typed(row, "eot_id", int),
        packed=bool(_typed(row, "packed", bool)),
        form=_typed(row, "form", str) or "samples",
    )


def _is_inside(name: str) -> bool:
    safe = name.isprintable() and "://" not in name and "\\" not in name and not name.startswith(("/", "pipe:"))
    return bool(name) and safe and ".." not in name.split("/")


def _typed(row: dict[str, Any], name: str, kind: type) -> Any:
    """An optional key of ours; None where it is missing or another program means something else by it."""
    return row[name] if type(row.get(name)) is kind else None


def _layout(row: dict[str, Any], where: str) -> tuple[int, int, int] | None:
    layout = row.get("layout")
    if layout is None:
        return None
    if not isinstance(layout, list) or len(layout) != 3 or not all(type(n) is int and n > 0 for n in layout):
        raise DataError(
            f"{where}: layout {layout!r:.80} is not [first offset, distance, size]. Make the manifest again."
        )
    return (layout[0], layout[1], layout[2])


def write_manifest(url: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write one row a shard, sorted by name, all or nothing."""
    lines = [orjson.dumps(row) for row in sorted(rows, key=lambda row: row["shard"])]
    storage.write_bytes(url, b"\n".join([*lines, b""]))


def fingerprint(shards: Sequence[Shard]) -> str:
    """A short text that changes when a shard is added, removed, renamed or changes its count; not with their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, n_sequences in sorted((shard.name, shard.n_sequences) for shard in shards):
        digest.update(f"{name}\0{n_sequences}\n".encode())
    return f"b2:{digest.hexdigest()}"
