"""Encoding of documents in bulk, by one encoder or another; huge ones in pieces."""

from __future__ import annotations

import array
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from open_lm.data.tokenizer import Tokenizer
from open_lm.errors import DataError
from open_lm.preprocess.long_text import LongText

PIECE_CHARACTERS = 1 << 20
"""A longer document is encoded in pieces of about this size: Hugging Face's encoder needs 150 times their memory."""

_WORD_END = re.compile(r"(?<=\w)(?=\s)")
_PUNCTUATION_END = re.compile(r"(?<=[^\w\s])(?=\w)")
_KIND_CHANGE = re.compile(r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])")
_SEARCHED = 1 << 20
_LONGEST_STRETCH = 16 << 20
_MARGIN = 2000


class Encoder(Protocol):
    """Texts in, their ids one after the other (uint32) and where each begins and ends (n + 1 offsets) out."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...


class ReferenceEncoder:
    """Hugging Face's own."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        lists = self._tokenizer.encode_batch(texts)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(ids) for ids in lists], dtype=np.int64)])
        return np.frombuffer(array.array("I", itertools.chain.from_iterable(lists)), np.uint32), offsets


class FastEncoder:
    """fastokens: the same ids, some thirty times faster."""

    name = "fastokens"

    def __init__(self, tokenizer: Tokenizer):
        self._backend = _fast_backend(tokenizer.to_json())

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._backend.encode_batch_flat(list(texts), add_special_tokens=False)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)


@lru_cache(maxsize=2)
def _fast_backend(tokenizer_json: str) -> Any:
    """Loading takes about half a second; a process that tries the encoder and then works with it does it once."""
    import fastokens

    return fastokens.Tokenizer.from_json_str(tokenizer_json)


def first_difference(reference: Encoder, other: Encoder, texts: Sequence[str]) -> int | None:
    """The first text that two encoders encode differently."""
    (ids, ends), (other_ids, other_ends) = reference.encode(texts), other.encode(texts)
    if np.array_equal(ids, other_ids) and np.array_equal(ends, other_ends):
        return None
    for k in range(len(texts)):
        if not np.array_equal(ids[ends[k] : ends[k + 1]], other_ids[other_ends[k] : other_ends[k + 1]]):
            return k
    raise AssertionError("different as a whole, equal in parts")


def make_encoder(name: str, tokenizer: Tokenizer) -> Encoder:
    """The encoder of that name."""
    return FastEncoder(tokenizer) if name == "fastokens" else ReferenceEncoder(tokenizer)


class DocumentEncoder:
    """Documents to ids, an end-of-text id after each. A fast encoder is compared with the reference now and then."""

    def __init__(self, tokenizer: Tokenizer, encoder: str, dtype: np.dtype):
        self._tokenizer, self._dtype = tokenizer, dtype
        self._encoder, self._reference = make_encoder(encoder, tokenizer), ReferenceEncoder(tokenizer)
        self._unchecked_characters = 0

    def encode(self, documents: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of documents of one kind (texts, vectors of ids, or one LongText) in order, an end-of-text id behind
        each; and behind which id each ends (n offsets).

        Raises:
            DataError: the fast encoder and the reference differ on one of the texts compared.
            Unsplittable: the LongText has no place to cut for too long a stretch.
        """
        if isinstance(documents[0], np.ndarray):
            return self._ended(documents)
        return self.encode_long(documents[0]) if isinstance(documents[0], LongText) else self.encode_texts(documents)

    def _ended(self, documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Documents that are ids already, one after the other, an end-of-text id behind each that has none."""
        last = self._tokenizer.eot_id
        end = np.array([last], self._dtype)
        parts = [part for ids in documents for part in ((ids,) if ids[-1] == last else (ids, end))]
        lengths = [len(ids) + (ids[-1] != last) for ids in documents]
        return np.concatenate(parts).astype(self._dtype), np.cumsum(lengths)

    def encode_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts in order, exactly those of each whole text, each followed by the end-of-text id; and
        behind which id each text ends (n offsets).

        Raises:
            DataError: the fast encoder and the reference differ on one of the texts compared.
        """
        self._check(texts)
        pieces: list[str] = []
        last_piece = np.empty(len(texts), np.int64)
        for number, text in enumerate(texts):
            pieces += [text] if len(text) <= PIECE_CHARACTERS else cut_safely(self._encoder, text)
            last_piece[number] = len(pieces)
        ids, offsets = self._encode_in_groups(pieces)
        joined = np.empty(len(ids) + len(texts), self._dtype)
        ends = offsets[last_piece] + np.arange(len(texts))
        is_id = np.ones(len(joined), bool)
        is_id[ends] = False
        joined[is_id], joined[ends] = ids, self._tokenizer.eot_id
        return joined, ends + 1

    def encode_long(self, text: LongText) -> tuple[np.ndarray, np.ndarray]:
        """As `encode_texts`, of one long document, which is never held as a whole.

        Raises:
            Unsplittable: it has no place to cut for too long a stretch.
        """
        parts = []
        for piece in pieces_of(self._encoder, text.pieces()):
            self._check([piece])
            parts.append(self._fitting(self._encode_in_groups([piece])[0]))
        joined = np.concatenate([*parts, np.array([self._tokenizer.eot_id], self._dtype)])
        return joined, np.array([len(joined)])

    def _fitting(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and int(ids.max()) > np.iinfo(self._dtype).max:
            raise DataError(
                f"--tokenizer {self._tokenizer.name}: gives id {int(ids.max())}, too large for {self._dtype}. "
                "Its vocabulary has gaps: start over with --overwrite."
            )
        return ids.astype(self._dtype)

    def _encode_in_groups(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As the encoder's own `encode`, but a few pieces at a time: its memory grows with their size."""
        ids, ends = [np.zeros(0, self._dtype)], [np.zeros(1, np.int64)]
        for group in _groups(pieces, 2 * PIECE_CHARACTERS):
            some_ids, some_offsets = self._encoder.encode(group)
            ids.append(self._fitting(some_ids))
            ends.append(ends[-1][-1] + some_offsets[1:])
        return np.concatenate(ids), np.concatenate(ends)

    def _check(self, texts: Sequence[str]) -> None:
        """Compare one document in about a thousand, by size: it costs some percent of the time."""
        if self._encoder.name == "tokenizers":
            return
        for text in texts:
            self._unchecked_characters += len(text)
            if self._unchecked_characters > 1000 * min(len(text), _MARGIN):
                self._unchecked_characters = 0
                if first_difference(self._reference, self._encoder, [text[:_MARGIN]]) is not None:
                    raise DataError(
                        f"--encoder {self._encoder.name}: other ids than tokenizers gives for the document that begins "
                        f"{text[:60]!r}. Start again with --overwrite --encoder tokenizers."
                    )


def _groups(texts: Sequence[str], max_characters: int) -> Iterator[list[str]]:
    """`texts` in order, in lists of at most `max_characters`, or of one text that is longer."""
    group: list[str] = []
    held = 0
    for text in texts:
        if group and held + len(text) > max_characters:
            yield group
            group, held = [], 0
        group.append(text)
        held += len(text)
    if group:
        yield group


def cut_safely(encoder: Encoder, text: str, piece: int = PIECE_CHARACTERS) -> list[str]:
    """`text` in pieces whose ids, joined, are those of the whole.

    A cut is made where a word ends, and only where encoding the surroundings in two gives the ids of encoding them at
    once. Where no such place is found, the piece goes on.
    """
    pieces, start = [], 0
    while len(text) - start > piece:
        cut = _safe_cut(encoder, text, start + piece)
        if cut is None:
            break
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def pieces_of(encoder: Encoder, texts: Iterable[str], piece: int = PIECE_CHARACTERS) -> Iterator[str]:
    """The text that `texts` make together, cut as `cut_safely` does, from little of it at a time.

    Raises:
        Unsplittable: no place to cut is found in `_LONGEST_STRETCH` characters.
    """
    held = ""
    for text in texts:
        held += text
        while len(held) >= 2 * piece + _MARGIN:
            cut = _safe_cut(encoder, held, piece, len(held) - _MARGIN)
            if cut is None:
                if len(held) > _LONGEST_STRETCH:
                    raise Unsplittable(f"no place to cut in {len(held):,} characters")
                break
            yield held[:cut]
            held = held[cut:]
    yield from cut_safely(encoder, held, piece)


class Unsplittable(Exception):
    """A document that would have to be encoded at once, and is too large for that."""


def _safe_cut(encoder: Encoder, text: str, near: int, stop: int | None = None) -> int | None:
    """A place from `near` on where ids do not change: where a word ends; in text without spaces after punctuation, or
    between letters and digits."""
    stop = min(near + _SEARCHED, len(text) if stop is None else stop)
    for pattern in (_WORD_END, _PUNCTUATION_END, _KIND_CHANGE):
        for match in itertools.islice(pattern.finditer(text, near, stop), 100):
            cut = match.start()
            left, right = text[max(0, cut - _MARGIN) : cut], text[cut : cut + _MARGIN]
            ids, offsets = encoder.encode([left + right, left, right])
            if np.array_equal(ids[: offsets[1]], ids[offsets[1] :]):
                return cut
    return None
