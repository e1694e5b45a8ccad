"""Manifests: the shards of a set, their sample counts, and where samples lie inside them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import orjson

from open_lm import storage
from open_lm.errors import DataError

FILENAME = "manifest.jsonl"


class Shard(NamedTuple):
    """One shard of a source.

    `layout` is [first offset, distance, size] in bytes when its samples are all alike; `first_number` the name of the
    first sample when they are named by consecutive numbers; `form` what a sample is: one sequence, or `pairs`, a chosen
    and a rejected one; `packed` whether a sequence holds several documents, marked, that attention keeps apart.
    """

    name: str
    url: str
    n_sequences: int
    key: str | None = None
    layout: tuple[int, int, int] | None = None
    size_bytes: int | None = None
    crc32: str | None = None
    tokenizer: str | None = None
    eot_id: int | None = None
    first_number: int | None = None
    form: str = "samples"
    packed: bool = False


def read_manifest(url: str) -> list[Shard]:
    """The shards a manifest names, in its order; both `num_sequences` and the older `num_chunks` count.

    Raises:
        DataError: a line is no JSON object, lacks a name or count, names a path outside the manifest's folder, or a
            shard is named twice; the line number is given.
    """
    content, folder = storage.read_bytes(url), storage.parent(url)
    shards: dict[str, Shard] = {}
    same: dict[Any, Any] = {}  # equal values are kept once: a hundred thousand rows say the same
    number = 0
    try:
        for line in content.splitlines():
            number += 1
            if not line.strip():
                continue
            shard = _shard(line, folder, same)
            if shards.setdefault(shard.url, shard) is not shard:
                raise DataError(f"duplicate shard {shard.name}. Remove one.")
    except DataError as error:
        raise DataError(f"manifest {storage.shown(url)}, line {number}: {error}") from None
    if not shards:
        raise DataError(f"manifest {storage.shown(url)}: names no shards. Make it with `openlm manifest`.")
    return list(shards.values())


def _shard(line: bytes, folder: str, same: dict[Any, Any]) -> Shard:
    try:
        row = orjson.loads(line)
        name = row["shard"]
        n_sequences = row["num_sequences"] if "num_sequences" in row else row["num_chunks"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise DataError(f'found {line[:80]!r}, need {{"shard": NAME, "num_sequences": N}}.') from None
    if not isinstance(name, str) or not _is_inside(name):
        raise DataError(f"shard name {name!r:.80} must be a path inside the manifest's folder.")
    if type(n_sequences) is not int or not 0 <= n_sequences < 1 << 48:
        raise DataError(f"num_sequences is {n_sequences!r:.80}, need a whole number.")
    file = name if name.endswith(".tar") else f"{name}.tar"
    get = row.get
    layout = get("layout")
    if layout is not None:
        layout = _layout(layout)
        layout = same.setdefault(layout, layout)
    return Shard(
        name,
        storage.join(folder, file),
        n_sequences,
        _typed(get("data_key"), str, same),
        layout,
        _typed(get("bytes"), int),
        _typed(get("crc32"), str),
        _typed(get("tokenizer"), str, same),
        _typed(get("eot_id"), int),
        _first_number(get("first_key"), get("last_key"), n_sequences),
        _typed(get("form"), str, same) or "samples",
        get("packed") is True,
    )


def _is_inside(name: str) -> bool:
    safe = name.isprintable() and "://" not in name and "\\" not in name and not name.startswith(("/", "pipe:"))
    return bool(name) and safe and (".." not in name or ".." not in name.split("/"))


def _typed(value: Any, kind: type, same: dict[Any, Any] | None = None) -> Any:
    """An optional key of ours; None where it is missing or another program means something else by it."""
    if type(value) is not kind:
        return None
    return value if same is None else same.setdefault(value, value)


def _layout(layout: Any) -> tuple[int, int, int]:
    good = isinstance(layout, list) and len(layout) == 3 and all(type(n) is int and 0 < n < 1 << 48 for n in layout)
    if not good or layout[1] < layout[2]:
        raise DataError(f"layout {layout!r:.80} is not [first offset, distance, size]. Make the manifest again.")
    return (layout[0], layout[1], layout[2])


def _first_number(first: Any, last: Any, n: int) -> int | None:
    numbered = isinstance(first, str) and isinstance(last, str) and len(first) == len(last) == 12
    if not (numbered and first.isascii() and last.isascii() and first.isdecimal() and last.isdecimal()):
        return None
    return int(first) if int(last) - int(first) + 1 == n else None


def write_manifest(url: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write one row a shard, sorted by name, all or nothing."""
    lines = [orjson.dumps(row) for row in sorted(rows, key=lambda row: row["shard"])]
    storage.write_bytes(url, b"\n".join([*lines, b""]))


def fingerprint(shards: Sequence[Shard]) -> str:
    """A short text that changes when a shard is added, removed, renamed or changes its count; not with their order."""
    return _digest(shards, lambda shard: f"{shard.name}\0{shard.n_sequences}\n")


def content_fingerprint(shards: Sequence[Shard]) -> str | None:
    """As `fingerprint`, and changes with any byte of any shard; None where a manifest has no checksums."""
    if not shards or any(shard.crc32 is None for shard in shards):
        return None
    return _digest(shards, lambda shard: f"{shard.name}\0{shard.n_sequences}\0{shard.size_bytes}\0{shard.crc32}\n")


def _digest(shards: Sequence[Shard], text: Callable[[Shard], str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for shard in sorted(shards, key=lambda shard: (shard.name, shard.n_sequences)):
        digest.update(text(shard).encode(errors="surrogateescape"))
    return f"b2:{digest.hexdigest()}"
