"""JSON arrays: a file that is one array of objects, its elements one after the other, in bounded memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from open_lm import storage
from open_lm.errors import DataError
from open_lm.preprocess.jsonl import open_unpacked

MAX_ELEMENT_CHARACTERS = 64 << 20
_PIECE = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_AFTER_ELEMENT = tuple(" \t\r\n,]")
_JSON = (".json", ".json.gz", ".json.zst", ".json.zstd")


def is_array(url: str) -> bool:
    """Whether a .json file, packed or not, is an array and not a line for each document."""
    if not url.endswith(_JSON):
        return False
    with open_unpacked(url) as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def array_rows(url: str) -> Iterator[bytes]:
    """Each element of the array as one line of JSON, as it stands there.

    Raises:
        DataError: it is no array, is cut off, or holds an element above `MAX_ELEMENT_CHARACTERS`.
    """
    n_rows, array, last = 0, _ArrayText(), False
    with open_unpacked(url) as file:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        try:
            while not last:
                piece = file.read(max(_PIECE, array.n_waiting))  # doubled for a long element, which is parsed again
                last = not piece
                array.add(decoder.decode(piece, last), last)
                for row in array.elements():
                    n_rows += 1
                    yield row
        except ValueError as error:  # of the array, or of its UTF-8
            raise DataError(
                f"{storage.shown(url)}: its JSON array, after {n_rows} elements: {error}. Repair it, or copy it again."
            ) from None


class _ArrayText:
    """The text that has been read and not yet used, and what is expected next: `[`, an element, `,` or the end."""

    def __init__(self) -> None:
        self._text, self._place, self._last, self._expected = "", 0, False, "["
        self._decoder = json.JSONDecoder()

    @property
    def n_waiting(self) -> int:
        return len(self._text) - self._place

    def add(self, text: str, last: bool) -> None:
        self._text, self._place, self._last = self._text[self._place :] + text, 0, last

    def elements(self) -> Iterator[bytes]:
        """The elements that are there whole; ValueError says what is wrong."""
        while sign := self._next_sign():
            if sign == self._expected or (sign == "]" and self._expected in ("first", ",")):
                self._place += 1
                self._expected = {"[": "first", ",": "element", "]": "end"}[sign]
            elif self._expected not in ("first", "element"):
                raise ValueError(f"found {sign!r}, expected {self._expected!r}")
            else:
                stop = self._end_of_element()
                if stop is None:
                    return
                row, self._place, self._expected = self._text[self._place : stop], stop, ","
                yield re.sub(r"[\r\n]+", " ", row).encode()  # between its parts: in strings they are escaped
        if self._last and self._expected != "end":
            raise ValueError("it is cut off")

    def _next_sign(self) -> str:
        self._place = _SPACE.match(self._text, self._place).end()  # type: ignore[union-attr]  # it matches always
        return self._text[self._place : self._place + 1]

    def _end_of_element(self) -> int | None:
        try:
            _, stop = self._decoder.raw_decode(self._text, self._place)
        except json.JSONDecodeError as error:
            if self._last or self.n_waiting > MAX_ELEMENT_CHARACTERS:
                raise ValueError(f"{error.msg} in an element, or one of over {MAX_ELEMENT_CHARACTERS:,}") from None
            return None
        ended = self._last or self._text[self._place] in '{["' or self._text[stop : stop + 1] in _AFTER_ELEMENT
        return stop if ended else None  # a number may go on
