"""Rows of chat data: jsonl (packed or not), parquet and data sets of the Hugging Face Hub, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from open_lm import storage
from open_lm.preprocess.hub_dataset import PARQUET, json_rows_of_parquet, select
from open_lm.preprocess.json_array import array_rows, is_array
from open_lm.preprocess.jsonl import JSON_ENDINGS, Line, Rejected, expand_inputs, read_lines

MAX_LINE_BYTES = 256 << 20
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row: where it stands, for messages, and its fields; or why it has none."""

    where: str
    fields: dict[str, Any] | Rejected


def files_named(inputs: tuple[str, ...], dataset: str | None, config: str | None, split: str) -> list[str]:
    """The files of --input-files, or of one split of the data set --dataset; an unpinned one at its newest commit.

    Raises:
        StorageError: a file or data set does not exist.
        DataError: a file has another ending, or nothing fits the split.
    """
    if dataset is None:
        return expand_inputs(inputs, "--input-files", (*JSON_ENDINGS, PARQUET), within=True)
    return [file.url for file in select(dataset, config, split)]


def rows_in(url: str) -> Iterator[Row]:
    """All rows of one file; blank lines are none."""
    shown = storage.shown(url)
    if url.endswith(PARQUET):
        for number, content in enumerate(json_rows_of_parquet(url), 1):
            yield Row(f"{shown}, row {number}", orjson.loads(content))
        return
    if is_array(url):
        for number, content in enumerate(array_rows(url), 1):
            yield Row(f"{shown}, element {number}", _fields(Line(-1, content)) or Rejected("unknown_form"))
        return
    for number, line in enumerate(read_lines(url, max_line_bytes=MAX_LINE_BYTES), 1):
        fields = _fields(line)
        if fields is not None:
            yield Row(f"{shown}, line {number}", fields)


def _fields(line: Line) -> dict[str, Any] | Rejected | None:
    if line.content is None:
        return Rejected("too_long_line")
    content = line.content.removeprefix(_BOM) if line.offset == 0 else line.content
    if not content.strip():
        return None
    try:
        row = orjson.loads(content)
    except orjson.JSONDecodeError:
        return Rejected("malformed_json")
    return row if isinstance(row, dict) else Rejected("unknown_form")


def described(files: list[str]) -> list[str]:
    """The files as the ledger names them, without secrets in urls."""
    return [storage.shown(url) if "://" in url else str(Path(url)) for url in files]
