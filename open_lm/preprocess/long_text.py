"""Long documents, decoded piece by piece: never held as one text, which may take four bytes for each character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

import orjson

from open_lm.preprocess.jsonl import Rejected

LONG_BYTES = 4 << 20
"""Lines, members and text files above it are decoded in pieces."""

_PIECE_BYTES = 1 << 20
_STRING_BYTES = 1 << 20
_UNITS = re.compile(
    rb"(?:[^\\]+|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\[^u])*"
)
"""Whole characters and escapes of a JSON string; a pair of surrogates is one."""


class LongText:
    """The text of a long document: UTF-8, or the inside of a JSON string."""

    def __init__(self, content: memoryview, *, escaped: bool):
        self._content, self._escaped = content, escaped

    def __len__(self) -> int:
        """Bytes, which are at least as many as characters."""
        return len(self._content)

    def pieces(self) -> Iterator[str]:
        """The text in order; ValueError where it is no UTF-8, or no JSON string."""
        if self._escaped:
            yield from self._unescaped()
            return
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        for start in range(0, len(self._content), _PIECE_BYTES):
            stop = start + _PIECE_BYTES
            yield decoder.decode(self._content[start:stop], stop >= len(self._content))

    def _unescaped(self) -> Iterator[str]:
        start, size = 0, len(self._content)
        while start < size:
            stop = _UNITS.match(self._content, start, min(start + _PIECE_BYTES, size)).end()  # type: ignore[union-attr]
            while stop < size and self._content[stop] & 0xC0 == 0x80:  # inside a character
                stop -= 1
            if stop <= start:
                raise ValueError("no JSON string")
            yield orjson.loads(b'"' + self._content[start:stop] + b'"')
            start = stop


def long_document(content: bytes, content_key: str) -> str | LongText | Rejected | None:
    """As `document_text`, of a long line: its long strings are set aside, the rest is parsed as JSON."""
    if not content.strip():
        return None
    strings: list[memoryview] = []
    try:
        row = orjson.loads(_without_long_strings(content, strings))
    except orjson.JSONDecodeError:
        return bad_json(content)
    if not isinstance(row, dict) or content_key not in row:
        return Rejected("missing_key")
    found = row[content_key]
    if not isinstance(found, str):
        return Rejected("not_text")
    place = re.fullmatch("\0long:([0-9]+)", found)
    if place is None or int(place[1]) >= len(strings):
        return found or Rejected("empty")
    return sound(LongText(strings[int(place[1])], escaped=True)) or bad_json(content)


def bad_json(content: bytes) -> Rejected:
    """The reason why a line cannot be parsed."""
    return Rejected("malformed_json" if sound(LongText(memoryview(content), escaped=False)) else "invalid_utf8")


def sound(text: LongText) -> LongText | None:
    """`text`, when all of it can be decoded."""
    try:
        for _ in text.pieces():
            pass
    except ValueError:
        return None
    return text


def _without_long_strings(content: bytes, strings: list[memoryview]) -> bytes:
    """The line with each long string replaced by its number in `strings`."""
    parts: list[bytes] = []
    view, used, start = memoryview(content), 0, content.find(b'"')
    while start >= 0:
        stop = _end_of_string(content, start + 1)
        if stop < 0:
            break
        if stop - start > _STRING_BYTES:
            parts += [content[used : start + 1], b"\\u0000long:%d" % len(strings)]
            strings.append(view[start + 1 : stop])
            used = stop
        start = content.find(b'"', stop + 1)
    return b"".join([*parts, content[used:]])


def _end_of_string(content: bytes, start: int) -> int:
    """The quote that ends the string from `start`: one behind an even number of backslashes."""
    place = content.find(b'"', start)
    while place >= 0:
        first = place
        while first > start and content[first - 1] == 0x5C:
            first -= 1
        if (place - first) % 2 == 0:
            return place
        place = content.find(b'"', place + 1)
    return -1
