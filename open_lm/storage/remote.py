"""Remote files: ranges, sizes and tags over fsspec, each request asked again while its trouble may pass.

The tries of the clients are turned off: one loop, here, waits, logs and counts.
"""

from __future__ import annotations

import io
import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from open_lm.errors import StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

RANGE_BYTES = 8 << 20
TRIES = 8
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 20.0
FIRST_BYTE_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 100_000.0
"""A request slower than this is given up and made again: stores stall, and clients wait for ever."""
_S3 = ("s3", "s3a")
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub",
    "http": "aiohttp", "https": "aiohttp",
}  # fmt: skip


class Stat(NamedTuple):
    """Size of a remote file, and the tag that changes with its content, where the store gives one."""

    size_bytes: int
    etag: str | None


class RangesIgnored(Exception):
    """The server sent the whole file, `content`, where a part was asked for."""

    def __init__(self, content: bytes):
        super().__init__(len(content))
        self.content = content


def shown(url: str) -> str:
    """`url` as it may be printed: without user, password or query, bytes of a name that are no UTF-8 escaped."""
    if "://" not in url or url.startswith("file://"):
        return url.encode(errors="surrogateescape").decode(errors="backslashreplace")
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def redacted(message: str) -> str:
    """`message` without what may be secret in it: queries and users of urls, keys, tokens."""
    without_queries = re.sub(r"(\w+://)(?:[^/\s@]+@)?([^\s?'\"]*)\?[^\s'\")]*", r"\1\2", message)
    without_users = re.sub(r"(\w+://)[^/\s@]+@", r"\1", without_queries)
    return re.sub(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bhf_\w{8,}|(?<=token=)\S+", "***", without_users)


def filesystem(url: str) -> Any:
    """fsspec's filesystem for the scheme of `url`; endpoints and credentials come from the environment.

    Raises:
        StorageError: its package is not installed.
    """
    import fsspec

    scheme = url.split("://")[0]
    settings: dict[str, Any] = {}
    if scheme in _S3:
        settings = {"use_listings_cache": False, "config_kwargs": {"retries": {"max_attempts": 0}}}
    try:
        found = fsspec.filesystem(scheme, **settings)
    except ImportError as error:
        hint = _PACKAGES.get(scheme, f"the fsspec driver of {scheme}")
        raise StorageError(f"{shown(url)}: {scheme}:// needs a package (pip install {hint}).") from error
    except ValueError as error:
        raise storage_error("open", url, error) from error
    if scheme in _S3:
        found.retries = 1
    return found


def stat(url: str) -> Stat:
    """Size and tag of the file at `url`.

    Raises:
        StorageError: it is missing, a folder, or of unknown size.
    """
    info = patiently("read", url, lambda: filesystem(url).info(url))
    if info.get("type") == "directory" or info.get("size") is None:
        raise StorageError(f"cannot read {shown(url)}: is a folder, or its size is not known.")
    return Stat(int(info["size"]), info.get("ETag") or info.get("etag"))


def listing(folder: str) -> dict[str, Stat] | None:
    """Size and tag of every file below remote `folder`, by its name there, in one request for a thousand of them; None
    where the store keeps no list of its files.

    Raises:
        StorageError: it cannot be read.
    """
    if folder.startswith(("http://", "https://")):
        return None
    files = filesystem(folder)
    root = str(files._strip_protocol(folder)).rstrip("/")
    found = patiently("list", folder, lambda: files.find(folder, detail=True))
    return {
        str(path).removeprefix(root).lstrip("/"): Stat(int(info["size"] or 0), _tag(info))
        for path, info in found.items()
    }


def _tag(info: dict[str, Any]) -> str | None:
    """A text that changes with the file's content, of what a listing says of it."""
    found = [info.get(key) for key in ("ETag", "etag", "LastModified", "last_modified", "mtime", "created", "ino")]
    return str(found) if any(value is not None for value in found) else None


def read_range(url: str, start: int, stop: int, etag: str | None = None) -> bytes:
    """Bytes `start` to `stop` of `url`, fewer only where the file ends; with `etag` only of the file that has it.

    Raises:
        StorageError: it cannot be read, or has changed.
        RangesIgnored: the server sent the whole file.
    """
    return patiently("read", url, lambda: _get_range(url, start, stop, etag))


def _get_range(url: str, start: int, stop: int, etag: str | None) -> bytes:
    from fsspec import asyn

    found = filesystem(url)
    get = {"s3": _s3_range, "s3a": _s3_range, "http": _http_range, "https": _http_range}.get(url.split("://")[0])
    deadline = FIRST_BYTE_SECONDS + (stop - start) / SLOWEST_BYTES_PER_SECOND
    if get is None:
        if not getattr(found, "async_impl", False):
            return found.cat_file(url, start=start, end=stop)
        return asyn.sync(found.loop, found._cat_file, url, start=start, end=stop, timeout=deadline)
    try:
        return asyn.sync(found.loop, get, found, url, f"bytes={start}-{stop - 1}", etag, timeout=deadline)
    except asyn.FSTimeoutError:
        raise OSError(f"no {stop - start} bytes in {deadline:.0f} s") from None
    except Exception as error:
        if _status(error) == 412:
            raise StorageError(f"{shown(url)}: changed during the read. Start again.") from error
        raise


async def _s3_range(found: Any, url: str, wanted: str, etag: str | None) -> bytes:
    bucket, key, _ = found.split_path(url)
    condition = {"IfMatch": etag} if etag else {}
    answer = await found._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted, **condition)
    try:
        return await answer["Body"].read()
    finally:
        answer["Body"].close()


async def _http_range(found: Any, url: str, wanted: str, etag: str | None) -> bytes:
    condition = {"If-Match": etag} if etag and not etag.startswith("W/") else {}
    session = await found.set_session()
    async with session.get(found.encode_url(url), headers={"Range": wanted} | condition, **found.kwargs) as answer:
        content = await answer.read()
        if answer.status == 404:
            raise FileNotFoundError(url)
        answer.raise_for_status()
        if answer.status != 206:
            raise RangesIgnored(content)
    return content


def patiently(action: str, url: str, attempt: Callable[[], T], *, missing_is_error: bool = True) -> T:
    """The result of `attempt`, retried with growing, random pauses while the trouble may pass.

    Raises:
        StorageError: it is missing or forbidden, or the tries are used up.
    """
    for tries in range(1, TRIES + 1):
        try:
            return attempt()
        except FileNotFoundError as error:
            if not missing_is_error:
                raise
            raise StorageError(f"cannot {action} {shown(url)}: there is no such file.") from error
        except (StorageError, RangesIgnored):
            raise
        except Exception as error:  # every driver has its own kinds
            if tries == TRIES or not may_pass(error):
                raise storage_error(action, url, error, tries) from error
            pause = random.uniform(0.5, 1) * min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (tries - 1))
            log.warning("%s %s: %s; try %d in %.1f s", action, shown(url), _reason(error), tries + 1, pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def may_pass(error: Exception) -> bool:
    """Whether trying again may help: not for what is forbidden, misused or not there."""
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status in (408, 409, 425, 429)
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError"):
        return False
    return not isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError | TypeError | ValueError)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, of whatever client; s3fs keeps it in the cause."""
    while error is not None:
        status = getattr(error, "status", None) or getattr(error, "response", None)
        if isinstance(status, dict):
            status = status.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def storage_error(action: str, url: str, error: Exception, tries: int = 1) -> StorageError:
    """The error a user sees."""
    after = f" (tried {tries} times)" if tries > 1 else ""
    return StorageError(f"cannot {action} {shown(url)}: {_reason(error)}{after}.")


def _reason(error: Exception) -> str:
    return redacted(getattr(error, "strerror", None) or str(error) or type(error).__name__)


class RemoteFile(io.RawIOBase):
    """A remote file as a stream of ranges. It is the same file to its end: size and tag are compared."""

    def __init__(self, url: str):
        super().__init__()
        self._url, self._position = url, 0
        self._stat = stat(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = self._stat.size_bytes
        self._position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: size}[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        content = self._next(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        pieces = []
        while piece := self._next(RANGE_BYTES):
            pieces.append(piece)
        return b"".join(pieces)

    def _next(self, n_bytes: int) -> bytes:
        size, etag = self._stat
        stop = min(self._position + n_bytes, size)
        if self._position >= stop:
            return b""
        content = patiently("read", self._url, lambda: self._range(self._position, stop))
        if stop == size and etag is not None and stat(self._url) != self._stat:
            raise StorageError(f"{shown(self._url)}: changed during the read. Start again.")
        self._position += len(content)
        return content

    def _range(self, start: int, stop: int) -> bytes:
        try:
            content = _get_range(self._url, start, stop, self._stat.etag)
        except RangesIgnored as whole:  # a plain web server
            content = whole.content[start:stop]
        if len(content) != stop - start:
            raise OSError(f"got {len(content)} of {stop - start} bytes from byte {start}")
        return content
