"""Raw files: found by patterns, decompressed, split into lines."""

from __future__ import annotations

import contextlib
import importlib
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple, cast

from open_lm import storage
from open_lm.errors import DataError, StorageError

JSON_ENDINGS = (".jsonl", ".json", ".jsonl.zst", ".jsonl.zstd", ".json.zst", ".json.zstd", ".jsonl.gz", ".json.gz")
TAR = ".tar"
WHOLE = (".txt", ".md")
"""Endings of files that are one document each."""
PACKED = (".zst", ".zstd", ".gz", TAR)
"""Endings of files that can only be read from their start."""
_BATCH_BYTES, _BATCH_LINES = 2 << 20, 1024

BAD_LINE_REASONS = ("malformed_json", "invalid_utf8", "missing_key", "not_text", "not_ids")
"""Reasons that mean a damaged input, which --on-bad-line decides about; `empty` and `too_long` never stop a run."""


class Line(NamedTuple):
    """One line, without its end; None where it is longer than allowed. `offset` counts unpacked bytes."""

    offset: int
    content: bytes | None


FileLine = tuple[str, Line]
"""The file a line or member is of, and itself."""


class Rejected(NamedTuple):
    """A line that gives no text, and why."""

    reason: str


def expand_inputs(
    patterns: tuple[str, ...], flag_name: str, endings: tuple[str, ...] = JSON_ENDINGS, *, within: bool = False
) -> list[str]:
    """The files that paths, urls, globs and folders name, sorted, each once.

    Of folders the files with one of `endings` are taken, at any depth. A url without such an ending is taken for a
    folder when `within` says so.

    Raises:
        StorageError: a pattern matches nothing.
        DataError: a file has none of `endings`.
    """
    found: list[str] = []
    for pattern in patterns:
        whole = within and storage.is_remote(pattern) and not pattern.endswith(endings)
        files = [
            file
            for url in ([pattern] if whole else storage.glob(pattern))
            for file in (_within(url, endings) if whole or _is_local_folder(url) else [url])
        ]
        if not files:
            raise StorageError(f"{flag_name} {storage.shown(pattern)}: no file matches. Check the path.")
        found += files
    for url in found:
        if not url.endswith(endings):
            raise DataError(f"{flag_name} {storage.shown(url)}: need one of {', '.join(endings)}.")
    return sorted(set(found))


def _is_local_folder(url: str) -> bool:
    return not storage.is_remote(url) and storage.local_path(url).is_dir()


def _within(folder: str, endings: tuple[str, ...]) -> list[str]:
    """The files of a folder, which may itself be named as a file is (Spark writes `out.json/part-0.json`)."""
    if storage.is_remote(folder) and any(sign in folder for sign in "*?["):
        return [url for url in storage.glob(storage.join(folder, "**")) if url.endswith(endings)]
    return [url for url in storage.files_within(folder) if url.endswith(endings)]


def is_packed(url: str) -> bool:
    """Whether a raw file can only be read from its start."""
    return url.endswith(PACKED)


def is_whole(url: str) -> bool:
    """Whether a raw file is one document."""
    return url.endswith(WHOLE)


def open_unpacked(url: str) -> IO[bytes]:
    """The content of a raw file as a stream of bytes, unpacked by its ending; a cut-off file is an error at its end."""
    file = storage.open_read(url)
    if url.endswith((".zst", ".zstd")):
        return io.BufferedReader(_Unpacked(file, url, _zstd_frame), 1 << 20)
    if url.endswith(".gz"):
        return io.BufferedReader(_Unpacked(file, url, _gzip_member), 1 << 20)
    return file


def _zstd_frame() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _gzip_member() -> Any:
    return _zlib.decompressobj(31)


_zlib: Any = zlib
with contextlib.suppress(ImportError):  # three times as fast
    _zlib = importlib.import_module("isal.isal_zlib")


def estimated_text_bytes(inputs: Sequence[tuple[str, int]]) -> int:
    """About how much text the (url, size) inputs hold: packed ones by the rate at which 8 of them begin to unpack."""
    packed = [(url, size) for url, size in inputs if is_packed(url) and not url.endswith(TAR)]
    plain = sum(size for _, size in inputs) - sum(size for _, size in packed)
    tried = packed[:: max(1, len(packed) // 8)][:8]
    rates = [_expansion(url) for url, _ in tried]
    return plain + int(sum(size for _, size in packed) * sum(rates) / max(1, len(rates)))


def _expansion(url: str) -> float:
    with open_unpacked(url) as file:
        n_text = len(file.read(4 << 20))
        unpacked = cast(_Unpacked, cast(io.BufferedReader, file).raw)
        return n_text / max(1, unpacked.n_used)


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of frames that follow each other. Reads little at a time, so that no bomb fills the memory."""

    _PIECE = 2048

    def __init__(self, file: IO[bytes], url: str, new_frame: Any):
        super().__init__()
        self._file, self._url, self._new_frame = file, url, new_frame
        self._frame: Any = None
        self._packed, self._ready, self._n_read = b"", memoryview(b""), 0

    @property
    def n_used(self) -> int:
        """Packed bytes that have been unpacked so far."""
        return self._n_read - len(self._packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._packed:
                self._packed = self._file.read(self._PIECE)
                self._n_read += len(self._packed)
            if not self._packed:
                if self._frame is not None:
                    raise DataError(f"{storage.shown(self._url)}: cut off at byte {self._n_read}. Copy it again.")
                return 0
            self._ready = memoryview(self._unpack())
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def _unpack(self) -> bytes:
        import zstandard

        if self._frame is None:
            self._frame = self._new_frame()
        try:
            unpacked = self._frame.decompress(self._packed)
        except (zstandard.ZstdError, zlib.error, _zlib.error) as error:
            raise DataError(
                f"{storage.shown(self._url)}: damaged near packed byte {self._n_read} ({error}). Copy it again."
            ) from None
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return unpacked

    def close(self) -> None:
        self._file.close()
        super().close()


_PIECE = 1 << 20


def read_lines(url: str, *, start: int = 0, stop: int | None = None, max_line_bytes: int) -> Iterator[Line]:
    """The lines that begin in unpacked bytes `start` to `stop`; an unpacked file is not read before `start`."""
    with open_unpacked(url) as file:
        offset = 0
        if start and not is_packed(url):
            offset = file.seek(start - 1)
            line = file.readline(_PIECE)
            offset += len(line)
            while line and line[-1:] != b"\n":  # the rest of a line that began before, of any length
                if stop is not None and offset >= stop:
                    return
                line = file.readline(_PIECE)
                offset += len(line)
        while stop is None or offset < stop:
            line = file.readline(max_line_bytes + 2)
            if not line:
                return
            length = len(line)
            too_long = length > max_line_bytes + 1 or (length == max_line_bytes + 1 and line[-1:] != b"\n")
            while too_long and line[-1:] != b"\n" and (line := file.readline(_PIECE)):
                length += len(line)
            if offset >= start:
                yield Line(offset, None if too_long else line.rstrip(b"\r\n"))
            offset += length


def line_batches(lines: Iterable[FileLine]) -> Iterator[list[FileLine]]:
    """The lines in batches of about 2 MiB, 1024 lines at most: a batch is parsed, and then encoded, as a whole."""
    batch: list[FileLine] = []
    n_bytes = 0
    for url, line in lines:
        batch.append((url, line))
        n_bytes += len(line.content or b"")
        if n_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_LINES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch
