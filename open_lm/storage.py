"""The one door to files: local paths, s3://, http(s):// and hf:// read and written alike, writes all-or-nothing."""

import contextlib
import glob as local_glob
import io
import logging
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from open_lm.errors import StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

_RANGE_BYTES = 8 << 20
_TRIES = 8
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 20.0


def is_remote(url: str) -> bool:
    """Whether `url` has a scheme such as s3:// (file:// counts as local)."""
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> Path:
    """The path a local url names, with ~ expanded."""
    return Path(url.removeprefix("file://")).expanduser()


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, which may be a url."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def parent(url: str) -> str:
    """The folder that holds `url`."""
    return url.rstrip("/").rpartition("/")[0] if is_remote(url) else str(local_path(url).parent)


def shown(url: str) -> str:
    """`url` as it may be printed: without user, password or query."""
    if not is_remote(url):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def redacted(message: str) -> str:
    """`message` without what may be secret in it: queries and users of urls, keys, tokens."""
    without_queries = re.sub(r"(\w+://)(?:[^/\s@]+@)?([^\s?'\"]*)\?[^\s'\")]*", r"\1\2", message)
    without_users = re.sub(r"(\w+://)[^/\s@]+@", r"\1", without_queries)
    return re.sub(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bhf_\w{8,}|(?<=token=)\S+", "***", without_users)


def open_read(url: str) -> IO[bytes]:
    """Open `url` for reading bytes. A remote file is read in ranges; a failed one is asked for again where it broke.

    Raises:
        StorageError: it is missing, is a folder, cannot be reached, or changes while it is read.
    """
    if is_remote(url):
        return io.BufferedReader(_RemoteFile(url), _RANGE_BYTES)
    try:
        return open(local_path(url), "rb")
    except OSError as error:
        raise _storage_error("read", url, error) from error


def read_bytes(url: str) -> bytes:
    """The whole content of `url`."""
    with open_read(url) as file:
        return file.read()


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of `url`; fewer only where the file ends."""
    if is_remote(url):
        return _patiently("read", url, lambda: _filesystem(url).cat_file(url, start=start, end=stop))
    try:
        with open(local_path(url), "rb", buffering=0) as file:
            return os.pread(file.fileno(), stop - start, start)
    except OSError as error:
        raise _storage_error("read", url, error) from error


def read_text(url: str) -> str:
    """The whole content of `url` as UTF-8 text."""
    try:
        return read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise StorageError(f"{shown(url)}: not UTF-8 text ({error}).") from error


def exists(url: str) -> bool:
    """Whether there is a file or folder at `url`."""
    if is_remote(url):
        return bool(_patiently("look for", url, lambda: _filesystem(url).exists(url)))
    return local_path(url).exists()


def size_bytes(url: str) -> int:
    """How many bytes the file at `url` holds."""
    if is_remote(url):
        return int(_patiently("read", url, lambda: _filesystem(url).size(url)))
    try:
        return local_path(url).stat().st_size
    except OSError as error:
        raise _storage_error("read", url, error) from error


def glob(pattern: str) -> list[str]:
    """The files that match `pattern` (`**` crosses folders), sorted; one without wildcards is itself, if it exists."""
    if is_remote(pattern):
        scheme = pattern.split("://")[0]
        found = _patiently("list", pattern, lambda: _filesystem(pattern).glob(pattern))
        return sorted(f"{scheme}://{path}" if "://" not in path else path for path in found)
    matches = local_glob.glob(str(local_path(pattern)), recursive=True)
    literal = [str(local_path(pattern))] if local_path(pattern).exists() else []
    return sorted(set(matches) or set(literal))


@contextlib.contextmanager
def open_atomic(url: str) -> Iterator[IO[bytes]]:
    """Open `url` for writing bytes; it appears whole when the block ends, or not at all when the block raises.

    Local files are written beside their final name, synced to disk and renamed; remote ones are one upload.

    Raises:
        StorageError: the folder cannot be written, or no space is left; nothing stays behind.
    """
    if is_remote(url):
        with _remote_atomic(url) as file:
            yield file
        return
    path = local_path(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise _storage_error("write", url, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _storage_error("write", url, error) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_bytes(url: str, content: bytes) -> None:
    """Write `content` to `url`, all or nothing."""
    with open_atomic(url) as file:
        file.write(content)


def write_text(url: str, content: str) -> None:
    """Write `content` to `url` as UTF-8, all or nothing."""
    write_bytes(url, content.encode())


def remove(url: str) -> None:
    """Delete the file at `url`; a missing one is fine."""
    if is_remote(url):
        with contextlib.suppress(FileNotFoundError):
            _patiently("remove", url, lambda: _filesystem(url).rm(url), missing_is_error=False)
        return
    with contextlib.suppress(FileNotFoundError):
        local_path(url).unlink()


def free_bytes(folder: str) -> int | None:
    """The space left for `folder`; None where the store does not say."""
    if is_remote(folder):
        return None
    stats = os.statvfs(_nearest_existing(local_path(folder)))
    return stats.f_bavail * stats.f_frsize


def require_writable(folder: str, flag_name: str) -> None:
    """Make local `folder` if needed and check that files can be made in it, before any work is done for it."""
    if is_remote(folder):
        return
    try:
        local_path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=local_path(folder)):
            pass
    except OSError as error:
        raise StorageError(
            f"{flag_name} {folder}: cannot write there ({error.strerror}). Choose another folder."
        ) from error


def _nearest_existing(path: Path) -> Path:
    return path if path.exists() else _nearest_existing(path.absolute().parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _filesystem(url: str) -> Any:
    """fsspec's filesystem for the scheme of `url`; endpoints and credentials come from the environment."""
    import fsspec

    scheme = url.split("://")[0]
    try:
        return fsspec.filesystem(scheme, **({"use_listings_cache": False} if scheme in ("s3", "s3a") else {}))
    except ImportError as error:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp"}
        hint = package.get(scheme.removesuffix("s") if scheme == "https" else scheme, f"the fsspec driver of {scheme}")
        raise StorageError(f"{shown(url)}: {scheme}:// needs a package (pip install {hint}).") from error
    except ValueError as error:
        raise _storage_error("open", url, error) from error


def _patiently(action: str, url: str, attempt: Callable[[], T], *, missing_is_error: bool = True) -> T:
    """What `attempt` returns, tried again with growing, random pauses while the trouble may pass.

    Raises:
        StorageError: it is missing or forbidden, or the tries are used up.
    """
    for tries in range(1, _TRIES + 1):
        try:
            return attempt()
        except FileNotFoundError as error:
            if not missing_is_error:
                raise
            raise StorageError(f"cannot {action} {shown(url)}: there is no such file.") from error
        except StorageError:
            raise
        except Exception as error:  # every driver has its own kinds
            if tries == _TRIES or not _may_pass(error):
                raise _storage_error(action, url, error, tries) from error
            pause = random.uniform(0.5, 1) * min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (tries - 1))
            log.warning("%s %s: %s; try %d in %.1f s", action, shown(url), _reason(error), tries + 1, pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help: not for what is forbidden, misused or not there."""
    status = getattr(error, "status", None) or getattr(error, "response", None)
    if isinstance(status, dict):
        status = status.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 409, 425, 429)
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError"):
        return False
    return not isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError | TypeError | ValueError)


class _RemoteFile(io.RawIOBase):
    """A remote file as a stream of ranges. It is the same file to its end: its size and tag are compared."""

    def __init__(self, url: str):
        super().__init__()
        self._url, self._position = url, 0
        self._size, self._tag = self._identity()

    def _identity(self) -> tuple[int, str | None]:
        info = _patiently("read", self._url, lambda: _filesystem(self._url).info(self._url))
        if info.get("type") == "directory" or info.get("size") is None:
            raise StorageError(f"cannot read {shown(self._url)}: is a folder, or its size is not known.")
        return int(info["size"]), info.get("ETag")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size)
        if self._position >= stop:
            return 0
        content = _patiently("read", self._url, lambda: self._range(self._position, stop))
        if stop == self._size and self._tag is not None and self._identity() != (self._size, self._tag):
            raise StorageError(f"{shown(self._url)}: has changed while it was read. Start again.")
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _range(self, start: int, stop: int) -> bytes:
        content = _filesystem(self._url).cat_file(self._url, start=start, end=stop)
        if len(content) == self._size != stop - start:  # a plain web server, which knows no ranges
            content = content[start:stop]
        if len(content) != stop - start:
            raise OSError(f"got {len(content)} of {stop - start} bytes from byte {start}")
        return content


@contextlib.contextmanager
def _remote_atomic(url: str) -> Iterator[IO[bytes]]:
    """One upload when the block ends: the object is made when all of it has arrived, or not at all."""
    with tempfile.NamedTemporaryFile() as buffer:
        yield buffer
        buffer.flush()
        size = buffer.tell()

        def upload() -> None:
            _filesystem(url).put_file(buffer.name, url)
            if (found := _filesystem(url).size(url)) != size:
                raise OSError(f"{found} of {size} bytes arrived")

        _patiently("write", url, upload)


def _reason(error: Exception) -> str:
    return redacted(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _storage_error(action: str, url: str, error: Exception, tries: int = 1) -> StorageError:
    after = f" (tried {tries} times)" if tries > 1 else ""
    return StorageError(f"cannot {action} {shown(url)}: {_reason(error)}{after}.")
