"""Documents of raw files: lines of JSON, members of tars (texts, JSON, ids), whole texts; others carry a reason."""

from __future__ import annotations

import codecs
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.formats import NPY
from open_lm.data.shards import check_ids
from open_lm.errors import ConfigError, DataError
from open_lm.preprocess.flat_blocks import Origin, origin_of
from open_lm.preprocess.job import FLAT, Job
from open_lm.preprocess.jsonl import BAD_LINE_REASONS, TAR, WHOLE, FileLine, Line, Rejected, read_lines
from open_lm.preprocess.long_text import LONG_BYTES, LongText, long_document, sound


def member_ending(content_key: str, flag_name: str = "--content-key") -> str:
    """Predicate of members that hold documents: those of `txt`, `json:KEY` or `npy`.

    Raises:
        ConfigError: it is none of these.
    """
    kind, _, key = content_key.partition(":")
    if kind not in ("txt", "json", "npy") or (kind == "json") != bool(key):
        raise ConfigError(f"{flag_name} {content_key}: for .tar inputs give txt, json:KEY, or npy (ids already).")
    return "." + kind


def read_members(url: str, content_key: str, *, max_bytes: int) -> Iterator[Line]:
    """The members that hold documents, as lines; `offset` is where a member's header begins.

    Raises:
        DataError: the tar is cut off or damaged, or holds no such member; the file is named.
    """
    ending, n = member_ending(content_key), 0
    with storage.open_read(url) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it would remember every one
                    if not member.isfile() or not member.name.endswith(ending):
                        continue
                    n += 1
                    if member.size > max_bytes:
                        yield Line(member.offset, None)
                        continue
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if len(content) != member.size:
                        raise _damaged(url, member.offset, f"{member.name} is cut off")
                    yield Line(member.offset, content)
                _check_end(file, tar.offset, url)
        except tarfile.TarError as error:
            raise _damaged(url, file.tell(), str(error)) from None
    if not n:
        raise DataError(f"{storage.shown(url)}: holds no member *{ending}. Check --content-key {content_key}.")


def _check_end(file: IO[bytes], end: int, url: str) -> None:
    """tarfile takes a cut, a hole or garbage between members for the end; after a true end there are only zeros."""
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise _damaged(url, end, "no end mark")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise _damaged(url, end, "more data after the end mark")


def _damaged(url: str, offset: int, what: str) -> DataError:
    return DataError(f"{storage.shown(url)}: cut off or damaged at byte {offset} ({what}). Copy it again.")


def member_document(line: Line, content_key: str) -> str | LongText | np.ndarray | Rejected | None:
    """The text of one member, or its ids where they are tokens already.  `line.content` is not None."""
    kind, _, key = content_key.partition(":")
    content = line.content or b""
    if kind == "json":
        return line_document(Line(-1, content), key)
    if kind == "npy":
        return _ids(content)
    if len(content) > LONG_BYTES:
        return _long(content)
    try:
        return content.decode() or Rejected("empty")
    except UnicodeDecodeError:
        return Rejected("invalid_utf8")


def _ids(content: bytes) -> np.ndarray | Rejected:
    try:
        tokens = NPY.decode(content)
    except ValueError:
        return Rejected("not_ids")
    return tokens if len(tokens) else Rejected("empty")


def read_documents(url: str, content_key: str, *, max_bytes: int) -> Iterator[Line]:
    """The lines of a raw file, or the members of a tar that hold documents; longer ones have no content."""
    if url.endswith(TAR):
        return read_members(url, content_key, max_bytes=max_bytes)
    return read_whole(url, max_bytes) if url.endswith(WHOLE) else read_lines(url, max_line_bytes=max_bytes)


def read_whole(url: str, max_bytes: int) -> Iterator[Line]:
    """The one document of a text file."""
    with storage.open_read(url) as file:
        content = file.read(max_bytes + 1)
    yield Line(0, content if len(content) <= max_bytes else None)


def whole_document(line: Line) -> str | LongText | Rejected:
    """The text of a text file; one of nothing but space is empty."""
    if len(line.content or b"") > LONG_BYTES:
        return _long(line.content or b"")
    try:
        text = (line.content or b"").removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return Rejected("invalid_utf8")
    return text if text.strip() else Rejected("empty")


def _long(content: bytes) -> LongText | Rejected:
    return sound(LongText(memoryview(content), escaped=False)) or Rejected("invalid_utf8")


def document_text(line: Line, content_key: str) -> str | Rejected | None:
    """The text of one JSON line; None for a blank line.  `line.content` is not None."""
    content = line.content or b""
    if line.offset == 0 and content.startswith(codecs.BOM_UTF8):
        content = content[len(codecs.BOM_UTF8) :]
    if not content.strip():
        return None
    try:
        row = orjson.loads(content)
    except orjson.JSONDecodeError:
        return Rejected("malformed_json" if _is_utf8(content) else "invalid_utf8")
    if not isinstance(row, dict) or content_key not in row:
        return Rejected("missing_key")
    text = row[content_key]
    if not isinstance(text, str):
        return Rejected("not_text")
    return text or Rejected("empty")


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
        return True
    except UnicodeDecodeError:
        return False


def line_document(line: Line, content_key: str) -> str | LongText | Rejected | None:
    """The text of one JSON line; None for a blank one.  `line.content` is not None."""
    content = line.content or b""
    if len(content) <= LONG_BYTES:
        return document_text(line, content_key)
    return long_document(content.removeprefix(codecs.BOM_UTF8) if line.offset == 0 else content, content_key)


def document_of(url: str, line: Line, content_key: str) -> str | LongText | np.ndarray | Rejected | None:
    """The document that one line or member of `url` holds; None for a blank line.  `line.content` is not None."""
    if url.endswith(WHOLE):
        return whole_document(line)
    return member_document(line, content_key) if url.endswith(TAR) else line_document(line, content_key)


class Documents(NamedTuple):
    """Documents of one kind: texts, vectors of ids, or one LongText; of flat arrays also where each came from."""

    documents: list[Any]
    origins: list[Origin]


@dataclass
class LineBooks:
    """Lines of a block: how many, of how many bytes, and those that hold no document."""

    lines: int = 0
    blank: int = 0
    n_bytes: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    last: tuple[str, int] = ("", 0)
    """The file of the last line, and its number among those of the file."""


def documents_in(job: Job, lines: Sequence[FileLine], books: LineBooks) -> list[Documents]:
    """The documents that `lines` hold, neighbours of one kind together; every line is entered in `books`.

    Raises:
        DataError: a line is damaged, and the job is to stop at such lines.
    """
    found: list[Documents] = []
    for url, line in lines:
        books.lines += 1
        books.last = (url, books.last[1] + 1 if url == books.last[0] else 1)
        if line.content is None:
            books.rejected["too_long"] += 1
            continue
        books.n_bytes += len(line.content) + 1
        document = document_of(url, line, job.content_key)
        if isinstance(document, np.ndarray):
            document = _known_ids(document, job.vocab_size)
        if document is None:
            books.blank += 1
        elif isinstance(document, Rejected):
            if document.reason in BAD_LINE_REASONS and job.on_bad_line == "stop":
                raise _bad_line(job, url, line, document)
            books.rejected[document.reason] += 1
        else:
            if not found or type(document) is not type(found[-1].documents[0]) or isinstance(document, LongText):
                found.append(Documents([], []))
            found[-1].documents.append(document)
            if job.form == FLAT:
                found[-1].origins.append(origin_of(*books.last, line))
    return found


def _known_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray | Rejected:
    try:
        return check_ids(ids, vocab_size)
    except ValueError:
        return Rejected("not_ids")


def _bad_line(job: Job, url: str, line: Line, rejected: Rejected) -> DataError:
    what = {
        "missing_key": f"no key {job.content_key!r}",
        "not_text": f"{job.content_key!r} holds no text",
        "not_ids": f"no vector of ids below {job.vocab_size}",
    }
    found = what.get(rejected.reason, rejected.reason.replace("_", " "))
    if line.offset == 0 and (line.content or b"").lstrip().startswith(b"["):
        found = "a JSON array, where each line should be an object (`jq -c '.[]'` makes them)"
    if url.endswith(TAR):
        return DataError(
            f"{storage.shown(url)}, member at byte {line.offset}: {found}: {(line.content or b'')[:60]!r}. "
            "Repair it, or leave such members out and counted with --on-bad-line skip."
        )
    before = sum(
        1 for earlier in read_lines(url, max_line_bytes=job.max_document_bytes) if earlier.offset < line.offset
    )
    return DataError(
        f"{storage.shown(url)}, line {before + 1}: {found}: {(line.content or b'')[:60]!r}. "
        "Repair it, name the key with --content-key, or leave such lines out and counted with --on-bad-line skip."
    )


def sample_texts(urls: Sequence[str], content_key: str, *, max_characters: int = 1 << 20) -> Iterator[str]:
    """Documents from the beginnings of up to 16 of the files, for trying something on the user's own text."""
    spread = urls[:: max(1, len(urls) // 16)][:16]
    for url in spread:
        left = max_characters // len(spread)
        for line in read_documents(url, content_key, max_bytes=max_characters):
            text = document_of(url, line, content_key) if line.content is not None else None
            if isinstance(text, str):
                yield text[:left]
                left -= len(text)
            if left <= 0 or line.offset > 8 * max_characters:
                break
