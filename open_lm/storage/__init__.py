"""The one door to files: local paths, s3://, http(s):// and hf:// read and written alike, writes all-or-nothing."""

import contextlib
import glob as local_glob
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote_to_bytes

from open_lm import faults
from open_lm.errors import StorageError
from open_lm.storage import remote
from open_lm.storage.remote import RemoteFile, filesystem, patiently, redacted, shown, storage_error

__all__ = ["redacted", "shown"]


def is_remote(url: str) -> bool:
    """Whether `url` has a scheme such as s3:// (file:// counts as local)."""
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> Path:
    """The path a local url names, with ~ expanded."""
    return Path(url.removeprefix("file://")).expanduser()


_RAW = "bytes:"


def to_text(url: str) -> str:
    """`url` as JSON may hold it: a local name that is no UTF-8 (a Latin-1 one) with its bytes escaped."""
    try:
        url.encode()
        return url
    except UnicodeEncodeError:
        return _RAW + quote(url.encode(errors="surrogateescape"))


def from_text(text: str) -> str:
    """The url that `to_text` wrote."""
    if not text.startswith(_RAW):
        return text
    return unquote_to_bytes(text.removeprefix(_RAW)).decode(errors="surrogateescape")


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, which may be a url."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def is_same(one: str, other: str) -> bool:
    """Whether two names, each local or remote, are of the same place."""
    if is_remote(one) or is_remote(other):
        return one.rstrip("/") == other.rstrip("/")
    return local_path(one).resolve() == local_path(other).resolve()


def is_inside(path: str, folder: str) -> bool:
    """Whether `path` is in `folder` (or that itself), each local or remote."""
    if is_remote(path) or is_remote(folder):
        return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
    return local_path(path).resolve().is_relative_to(local_path(folder).resolve())


def parent(url: str) -> str:
    """The folder that holds `url`."""
    return url.rstrip("/").rpartition("/")[0] if is_remote(url) else str(local_path(url).parent)


def found_near(named: str, place: str) -> str:
    """A path that a run or manifest stored, relative to the working folder of that time: looked for here, then in all
    folders above `place`, one of which is usually that folder. As it is where it is in none.

    Of a pattern (`{000..007}.tar`, `*.npy`) the folder counts.
    """
    fixed = named[: min((named.index(c) for c in "*?[{" if c in named), default=len(named))]
    known = fixed if fixed == named else f"{os.path.dirname(fixed)}/"
    if is_remote(named) or is_remote(place) or local_path(known or ".").exists():
        return named
    above = local_path(place).absolute().parents
    return next((str(folder / named) for folder in above if (folder / known).exists()), named)


def open_read(url: str) -> IO[bytes]:
    """Open `url` for reading bytes. A remote file is read in ranges; a failed one is asked for again where it broke.

    Raises:
        StorageError: it is missing, is a folder, cannot be reached, or changes while it is read.
    """
    if is_remote(url):
        return io.BufferedReader(RemoteFile(url), remote.RANGE_BYTES)
    try:
        return open(local_path(url), "rb")
    except OSError as error:
        raise storage_error("read", url, error) from error


def read_bytes(url: str) -> bytes:
    """The whole content of `url`."""
    with open_read(url) as file:
        return file.read()


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of `url`; fewer only where the file ends."""
    if is_remote(url):
        try:
            return remote.read_range(url, start, stop)
        except remote.RangesIgnored as whole:
            return whole.content[start:stop]
    try:
        with open(local_path(url), "rb", buffering=0) as file:
            return os.pread(file.fileno(), stop - start, start)
    except OSError as error:
        raise storage_error("read", url, error) from error


def read_text(url: str) -> str:
    """The whole content of `url` as UTF-8 text."""
    try:
        return read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise StorageError(f"{shown(url)}: not UTF-8 text ({error}).") from error


def exists(url: str) -> bool:
    """Whether there is a file or folder at `url`."""
    if is_remote(url):
        return bool(patiently("look for", url, lambda: filesystem(url).exists(url)))
    return local_path(url).exists()


def size_bytes(url: str) -> int:
    """Size in bytes of the file at `url`."""
    if is_remote(url):
        return remote.stat(url).size_bytes
    try:
        return local_path(url).stat().st_size
    except OSError as error:
        raise storage_error("read", url, error) from error


def glob(pattern: str) -> list[str]:
    """The files that match `pattern` (`**` crosses folders), sorted; what exists under that very name is itself."""
    if is_remote(pattern):
        scheme = pattern.split("://")[0]
        found = patiently("list", pattern, lambda: filesystem(pattern).glob(pattern))
        return sorted(f"{scheme}://{path}" if "://" not in path else path for path in found)
    if local_path(pattern).exists():
        return [str(local_path(pattern))]
    return sorted(set(local_glob.glob(str(local_path(pattern)), recursive=True)))


def files_within(folder: str) -> list[str]:
    """All files in a folder, at any depth, sorted, but for hidden local ones; signs in its name are no wildcards."""
    if is_remote(folder):
        scheme = folder.split("://")[0]
        found = patiently("list", folder, lambda: filesystem(folder).find(folder))
        return sorted(f"{scheme}://{path}" if "://" not in path else path for path in found)
    files: list[str] = []
    for root, folders, names in os.walk(local_path(folder)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(root, name) for name in names if not name.startswith(".")]
    return sorted(files)


def glob_in(folder: str, pattern: str) -> list[str]:
    """As `glob`, below `folder`, whose name is taken as it is: it may hold `[` or `*`."""
    return glob(join(local_glob.escape(folder), pattern))


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
        faults.at("file.open", str(path))
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise storage_error("write", url, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            faults.at("file.sync", str(path))
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        faults.at("file.rename", str(path))
        os.replace(temporary, path)
        faults.at("file.renamed", str(path))
        _sync_folder(path.parent)
    except OSError as error:
        raise storage_error("write", url, error) from error
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
            patiently("remove", url, lambda: filesystem(url).rm(url), missing_is_error=False)
        return
    faults.at("file.remove", url)
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


def probe_writable(folder: str) -> None:
    """Write and remove a small object below a remote folder, so that a forbidden one is found before any work.

    Raises:
        StorageError: it cannot be written.
    """
    if is_remote(folder):
        url = join(folder, ".write-probe")
        write_bytes(url, b"\n")
        remove(url)


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


@contextlib.contextmanager
def _remote_atomic(url: str) -> Iterator[IO[bytes]]:
    """One upload when the block ends: the object is made when all of it has arrived, or not at all."""
    with tempfile.NamedTemporaryFile() as buffer:
        yield buffer
        buffer.flush()
        size = buffer.tell()

        def upload() -> None:
            filesystem(url).put_file(buffer.name, url)
            if (found := filesystem(url).size(url)) != size:
                raise OSError(f"{found} of {size} bytes arrived")

        patiently("write", url, upload)
